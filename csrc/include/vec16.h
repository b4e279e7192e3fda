// Sixteen floats in the registers of one instruction set. Included by for_each_isa.h inside a namespace: no guard.

#if QSCOPE_ISA == 2

struct Vec {
  __m512 v;
};
QSCOPE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
QSCOPE_INLINE Vec broadcast(float s) { return {_mm512_set1_ps(s)}; }
QSCOPE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
QSCOPE_INLINE Vec load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
QSCOPE_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
QSCOPE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
QSCOPE_INLINE void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
QSCOPE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QSCOPE_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
QSCOPE_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
QSCOPE_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
QSCOPE_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
QSCOPE_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
QSCOPE_INLINE Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // of a NaN: whatever
QSCOPE_INLINE Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
QSCOPE_INLINE uint32_t not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }

#elif QSCOPE_ISA == 1

struct Vec {
  __m256 lo, hi;
};
QSCOPE_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
QSCOPE_INLINE Vec broadcast(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
QSCOPE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QSCOPE_INLINE __m256 load8(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
QSCOPE_INLINE __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <typename T>
QSCOPE_INLINE Vec load(const T* p) {
  return {load8(p), load8(p + 8)};
}
QSCOPE_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
QSCOPE_INLINE void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
QSCOPE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
QSCOPE_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
QSCOPE_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
QSCOPE_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
QSCOPE_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
QSCOPE_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
QSCOPE_INLINE Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
QSCOPE_INLINE Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
QSCOPE_INLINE uint32_t not_le(Vec a, Vec b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLE_UQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLE_UQ));
  return static_cast<uint32_t>(lo) | static_cast<uint32_t>(hi) << 8;
}

#else

struct Vec {
  float v[16];
};
QSCOPE_INLINE Vec broadcast(float s) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = s;
  return r;
}
QSCOPE_INLINE Vec zero() { return broadcast(0.0f); }
template <typename T>
QSCOPE_INLINE Vec load(const T* p) {
  Vec r;
  for (int i = 0; i < 16; ++i) r.v[i] = widen(p[i]);
  return r;
}
QSCOPE_INLINE void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
QSCOPE_INLINE void store(f16* p, Vec a) {
  for (int i = 0; i < 16; ++i) narrow(a.v[i], p + i);
}
QSCOPE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 16; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
QSCOPE_INLINE Vec add(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
QSCOPE_INLINE Vec sub(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
QSCOPE_INLINE Vec mul(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
QSCOPE_INLINE Vec div(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}
QSCOPE_INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < 16; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}
QSCOPE_INLINE Vec minimum(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
QSCOPE_INLINE Vec maximum(Vec a, Vec b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
QSCOPE_INLINE uint32_t not_le(Vec a, Vec b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(!(a.v[i] <= b.v[i])) << i;
  return mask;
}

#endif
