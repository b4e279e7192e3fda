// Weighted sums of rows and dot products with rows: the two gathers behind decode and its gradients.
// Included by for_each_isa.h inside a namespace: no guard.

constexpr int kRowsAtOnce = 4;  // rows read side by side: enough streams to hide memory latency, sum order unchanged

template <typename T, int R>
QSCOPE_INLINE void add_rows(const float* values, const T* const* rows, const T* const* ahead, int64_t D, float* y,
                            bool first) {
  constexpr int64_t kLine = 64 / sizeof(T) / 16;  // vectors per cache line
  Vec v[R];
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) v[r] = broadcast(values[r]);
  int64_t d = 0;
  for (; d + 16 * kLine <= D; d += 16 * kLine) {
    QSCOPE_UNROLL
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead[r] + d, 0, 2);
    QSCOPE_UNROLL
    for (int j = 0; j < kLine; ++j) {
      Vec sum = first ? zero() : load(y + d + 16 * j);
      QSCOPE_UNROLL
      for (int r = 0; r < R; ++r) sum = fma(v[r], load(rows[r] + d + 16 * j), sum);
      store(y + d + 16 * j, sum);
    }
  }
  for (; d < D; ++d) {
    float sum = first ? 0.0f : y[d];
    for (int r = 0; r < R; ++r) sum = std::fma(values[r], widen(rows[r][d]), sum);
    y[d] = sum;
  }
}

// y[D] = sum over the `count` entries of values[i] * base[ids[i]], in ascending i; `left` >= count entries of ids may
// be read ahead.
template <typename T>
void weighted_rows(const float* values, const int32_t* ids, int64_t count, int64_t left, const T* base, int64_t D,
                   float* y) {
  if (count == 0) std::memset(y, 0, sizeof(float) * D);
  for (int64_t i = 0; i < count; i += kRowsAtOnce) {
    const int64_t R = std::min<int64_t>(kRowsAtOnce, count - i);
    const T *rows[kRowsAtOnce], *ahead[kRowsAtOnce];
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      rows[r] = base + int64_t{ids[i + std::min(r, R - 1)]} * D;
      ahead[r] = base + int64_t{ids[std::min(i + R + r, left - 1)]} * D;
    }
    switch (R) {
      case 4: add_rows<T, 4>(values + i, rows, ahead, D, y, i == 0); break;
      case 3: add_rows<T, 3>(values + i, rows, ahead, D, y, i == 0); break;
      case 2: add_rows<T, 2>(values + i, rows, ahead, D, y, i == 0); break;
      default: add_rows<T, 1>(values + i, rows, ahead, D, y, i == 0);
    }
  }
}

// out[i] = <g, base[ids[i]]>: lane j of 16 sums the elements d = j mod 16, then the lanes are added pairwise.
template <typename T>
void dot_rows(const float* g, const int32_t* ids, int64_t count, int64_t left, const T* base, int64_t D, float* out) {
  constexpr int64_t kLine = 64 / sizeof(T) / 16;
  for (int64_t i = 0; i < count; i += kRowsAtOnce) {
    const int64_t R = std::min<int64_t>(kRowsAtOnce, count - i);
    const T *rows[kRowsAtOnce], *ahead[kRowsAtOnce];
    Vec sum[kRowsAtOnce];
    QSCOPE_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      rows[r] = base + int64_t{ids[i + std::min<int64_t>(r, R - 1)]} * D;
      ahead[r] = base + int64_t{ids[std::min<int64_t>(i + R + r, left - 1)]} * D;
      sum[r] = zero();
    }
    int64_t d = 0;
    for (; d + 16 * kLine <= D; d += 16 * kLine) {
      QSCOPE_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) __builtin_prefetch(ahead[r] + d, 0, 2);
      QSCOPE_UNROLL
      for (int j = 0; j < kLine; ++j) {
        const Vec x = load(g + d + 16 * j);
        QSCOPE_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) sum[r] = fma(x, load(rows[r] + d + 16 * j), sum[r]);
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      alignas(64) float lanes[16];
      store(lanes, sum[r]);
      for (int64_t t = d; t < D; ++t) lanes[t % 16] = std::fma(g[t], widen(rows[r][t]), lanes[t % 16]);
      for (int width = 8; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      }
      out[i + r] = lanes[0];
    }
  }
}
