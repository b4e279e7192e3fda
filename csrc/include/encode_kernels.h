// The float32 product of a tile of rows with a panel of 32 features: one float32 chain per element.
// Included by for_each_isa.h inside a namespace: no guard.

// Accumulators held in registers at a time: rows x vectors of 16 features.
#if QSCOPE_ISA == 2
constexpr int kSubRows = 12, kSubVecs = 2;
#elif QSCOPE_ISA == 1
constexpr int kSubRows = 6, kSubVecs = 1;
#else
constexpr int kSubRows = 4, kSubVecs = 1;
#endif

// a * b + c, fused or not: the bound of the pass allows for a rounding of each product.
#if QSCOPE_ISA > 0
QSCOPE_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#else
QSCOPE_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
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
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(a, b[v], acc[r][v]);
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
