// Adam on one row: every operation is rounded to float32, in the order of qscope/reference/row_adam_.py.
// Included by for_each_isa.h inside a namespace: no guard.

// The last D mod 16 elements, with zeros behind them.
template <typename T>
struct Rest {
  T v[16];
  Rest(const T* p, int64_t n) : v{} { std::memcpy(v, p, sizeof(T) * n); }
};

// The sixteen lanes, added pairwise.
QSCOPE_INLINE float total(Vec sum) {
  alignas(64) float lanes[16];
  store(lanes, sum);
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// <g, g>, <g, w> and <w, w> of the scaled gradient and the row: lane j of 16 adds the elements d = j mod 16.
template <typename T>
void adam_sums(const T* grad, const float* w, int64_t D, float scale, float* gg, float* gw, float* ww) {
  const Vec factor = broadcast(scale);
  Vec squares = zero(), products = zero(), sizes = zero();
  for (int64_t d = 0; d < D; d += 16) {
    Vec g, x;
    if (d + 16 <= D) {
      g = load(grad + d), x = load(w + d);
    } else {
      g = load(Rest<T>(grad + d, D - d).v), x = load(Rest<float>(w + d, D - d).v);
    }
    g = mul(g, factor);
    squares = add(squares, mul(g, g));
    products = add(products, mul(g, x));
    sizes = add(sizes, mul(x, x));
  }
  *gg = total(squares), *gw = total(products), *ww = total(sizes);
}

template <typename T>
QSCOPE_INLINE void adam_16(const T* grad, float* w, float* m, float* v, const AdamNumbers& n, const AdamRow& row,
                           bool project) {
  const Vec x = load(w);
  Vec g = mul(load(grad), broadcast(n.scale));
  if (project) g = sub(g, mul(broadcast(row.along), x));
  const Vec first = add(mul(load(m), broadcast(row.decay1)), mul(broadcast(n.rest1), g));
  const Vec second = add(mul(load(v), broadcast(row.decay2)), mul(mul(broadcast(n.rest2), g), g));
  const Vec root = add(div(sqrt(second), broadcast(n.root2)), broadcast(n.eps));
  store(m, first);
  store(v, second);
  store(w, sub(x, mul(broadcast(n.rate), div(first, root))));
}

template <typename T>
void adam_move(const T* grad, float* w, float* m, float* v, int64_t D, const AdamNumbers& n, const AdamRow& row,
               bool project) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) adam_16(grad + d, w + d, m + d, v + d, n, row, project);
  if (d == D) return;
  const Rest<T> g(grad + d, D - d);
  Rest<float> x(w + d, D - d), first(m + d, D - d), second(v + d, D - d);
  adam_16(g.v, x.v, first.v, second.v, n, row, project);
  std::memcpy(w + d, x.v, sizeof(float) * (D - d));
  std::memcpy(m + d, first.v, sizeof(float) * (D - d));
  std::memcpy(v + d, second.v, sizeof(float) * (D - d));
}

inline void scale_row(float* w, int64_t D, float factor) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) store(w + d, mul(load(w + d), broadcast(factor)));
  for (; d < D; ++d) w[d] *= factor;
}

inline void round_row(const float* w, int64_t D, bf16* out) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) {
    for (int j = 0; j < 16; ++j) narrow(w[d + j], out + d + j);  // a fixed count: vectorised at -O2 too
  }
  for (; d < D; ++d) narrow(w[d], out + d);
}
