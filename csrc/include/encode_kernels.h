// Scores of one panel of 32 features for a block of rows, and the append of those that may be among the k best.
// Every dot product is one chain of fused multiply-adds in ascending d: its bits depend on nothing else.
// Included by for_each_isa.h inside a namespace: no guard.

// Accumulators held in registers at a time: rows x vectors of 16 features.
#if QSCOPE_ISA == 2
constexpr int kSubRows = 12, kSubVecs = 2;
#elif QSCOPE_ISA == 1
constexpr int kSubRows = 6, kSubVecs = 1;
#else
constexpr int kSubRows = 4, kSubVecs = 1;
#endif

// c[R rows][V*16 of 32] (+)= x[len][stride]^T w[len][32]
template <int R, int V>
QSCOPE_INLINE void multiply_sub(const float* x, int stride, const float* w, int64_t len, float* c, bool first) {
  Vec acc[R][V];
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) {
    QSCOPE_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = first ? zero() : load(c + r * kPanel + v * 16);
  }
  for (int64_t d = 0; d < len; ++d, x += stride, w += kPanel) {
    Vec b[V];
    QSCOPE_UNROLL
    for (int v = 0; v < V; ++v) b[v] = load(w + v * 16);
    QSCOPE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec a = broadcast(x[r]);
      QSCOPE_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) {
    QSCOPE_UNROLL
    for (int v = 0; v < V; ++v) store(c + r * kPanel + v * 16, acc[r][v]);
  }
}

template <int M>
void multiply_tile(const float* x, const float* w, int64_t len, float* c, bool first) {
  constexpr int R = M < kSubRows ? M : kSubRows;
  for (int v = 0; v < 2; v += kSubVecs) {
    for (int r = 0; r + R <= M; r += R) {
      multiply_sub<R, kSubVecs>(x + r, M, w + v * 16, len, c + r * kPanel + v * 16, first);
    }
    if constexpr (M % R != 0) {
      constexpr int done = M / R * R;
      multiply_sub<M % R, kSubVecs>(x + done, M, w + v * 16, len, c + done * kPanel + v * 16, first);
    }
  }
}

inline void multiply(int M, const float* x, const float* w, int64_t len, float* c, bool first) {
  switch (M) {
    case 1: return multiply_tile<1>(x, w, len, c, first);
    case 2: return multiply_tile<2>(x, w, len, c, first);
    case 4: return multiply_tile<4>(x, w, len, c, first);
    case 8: return multiply_tile<8>(x, w, len, c, first);
    default: return multiply_tile<kTileRows>(x, w, len, c, first);
  }
}

#if QSCOPE_ISA > 0
QSCOPE_INLINE __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
QSCOPE_INLINE __m256 eight(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
QSCOPE_INLINE __m256 eight(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// out[j][0..7] = rows[0..7][j] for eight consecutive columns j
template <typename T>
QSCOPE_INLINE void transpose8(const T* rows, int64_t stride, float* out) {
  __m256 a[8], b[8];
  QSCOPE_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = eight(rows + i * stride);
  QSCOPE_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  QSCOPE_UNROLL
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  QSCOPE_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * kPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kPanel, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// out[len][32] = W[rows][len]^T in float32, absent features zero; W points at the first column wanted
template <typename T>
void pack_panel(const T* W, int64_t rows, int64_t D, int64_t len, float* out) {
  if (rows < kPanel) std::memset(out, 0, sizeof(float) * len * kPanel);
  int64_t f = 0;
#if QSCOPE_ISA > 0
  for (; f + 8 <= rows; f += 8) {
    int64_t d = 0;
    for (; d + 8 <= len; d += 8) transpose8(W + f * D + d, D, out + d * kPanel + f);
    for (; d < len; ++d) {
      for (int64_t i = f; i < f + 8; ++i) out[d * kPanel + i] = widen(W[i * D + d]);
    }
  }
#endif
  for (; f < rows; ++f) {
    for (int64_t d = 0; d < len; ++d) out[d * kPanel + f] = widen(W[f * D + d]);
  }
}

// Adds the bias and appends what beats the row's threshold.
QSCOPE_INLINE void collect(float* c, const float* bias, uint32_t valid, int32_t first, TopList& list,
                           const EncodeBlock& block) {
  const Vec tau = broadcast(list.tau);
  const Vec lo = add(load(c), load(bias)), hi = add(load(c + 16), load(bias + 16));
  const uint32_t mask = (not_le(lo, tau) | not_le(hi, tau) << 16) & valid;
  if (__builtin_expect(mask != 0, 0)) {
    store(c, lo);
    store(c + 16, hi);
    append(list, mask, c, first, block.k, block.capacity, kPanel);
  }
}

template <typename T>
void encode_panel(const EncodeBlock& block, const T* W, int64_t panel, float* packed, float* c, TopList* lists) {
  const int64_t D = block.D, first = panel * kPanel, width = std::min<int64_t>(kPanel, block.F - first);
  const uint32_t valid = width == kPanel ? ~0u : (1u << width) - 1;
  alignas(64) float bias[kPanel] = {};
  if (block.bias != nullptr) std::memcpy(bias, block.bias + first, sizeof(float) * width);
  for (int64_t d0 = 0; d0 < D; d0 += kDepth) {
    const int64_t len = std::min<int64_t>(kDepth, D - d0);
    pack_panel(W + first * D + d0, width, D, len, packed);
    for (int64_t n = 0; n < block.rows; n += kTileRows) {
      const int M = block.tile_rows(n);
      float* tile = c + n * kPanel;
      multiply(M, block.x + n * D + d0 * M, packed, len, tile, d0 == 0);
      if (d0 + len < D) continue;
      const int64_t end = std::min<int64_t>(kTileRows, block.rows - n);
      for (int64_t r = 0; r < end; ++r) {
        collect(tile + r * kPanel, bias, valid, static_cast<int32_t>(first), lists[n + r], block);
      }
    }
  }
}
