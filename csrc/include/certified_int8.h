// The certified encoder's int8 pass (AVX512-VNNI). Included by certified.cpp inside namespace avx512, with that set
// enabled: no guard. Half the instructions of the bfloat16 pass for a bound some eight times as wide; sums are exact.

// One row of x or W as codes in -127..127 times a scale.
struct Coded {
  float scale;
  int32_t total;  // sum of the codes
  Sums sums;
};

template <typename T>
QSCOPE_INLINE __m512 load_columns(const T* row, int64_t count) {
  if (__builtin_expect(count >= 16, 1)) return load(row).v;
  float part[16] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = widen(row[i]);
  return _mm512_loadu_ps(part);
}

// codes[0..padded_codes(D)): of x - mu, or of w, whose product with mu is in the sums. A row without a usable largest
// value (zeros, NaN) has codes of no value: what was lost says so.
template <bool kCentre, typename T>
Coded encode_row(const T* row, const float* mu, int64_t D, int8_t* codes) {
  Coded out{0, 0, {0, 0, 0}};
  __m512 most = _mm512_setzero_ps();
  for (int64_t d0 = 0; d0 < D; d0 += kSlab) {
    __m512 dot = _mm512_setzero_ps();
    for (int64_t d = d0; d < std::min(D, d0 + kSlab); d += 16) {
      __m512 a = load_columns(row + d, D - d);
      const __m512 m = load_columns(mu + d, D - d);
      if (kCentre) a = _mm512_sub_ps(a, m);
      if (!kCentre) dot = _mm512_fmadd_ps(a, m, dot);
      most = _mm512_max_ps(_mm512_abs_ps(a), most);
    }
    out.sums.dot += tree_sum(to_double(Vec{dot}));
  }
  const float peak = _mm512_reduce_max_ps(most);
  const bool usable = peak >= 0x1p-100f;
  out.scale = usable ? peak / 127 : 0.0f;
  const __m512 scale = _mm512_set1_ps(out.scale), inverse = _mm512_set1_ps(usable ? 127 / peak : 0.0f);
  const __m512i zero_codes = _mm512_setzero_si512(), bound = _mm512_set1_epi32(127);  // a NaN converts to -2^31
  __m512i total = zero_codes;
  for (int64_t d0 = 0; d0 < D; d0 += kSlab) {
    __m512 kept = _mm512_setzero_ps(), lost = kept;
    for (int64_t d = d0; d < std::min(D, d0 + kSlab); d += 16) {
      __m512 a = load_columns(row + d, D - d);
      if (kCentre) a = _mm512_sub_ps(a, load_columns(mu + d, D - d));
      const __m512i near = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
      const __m512i code = _mm512_max_epi32(_mm512_min_epi32(near, bound), _mm512_sub_epi32(zero_codes, bound));
      const __m512 whole = _mm512_cvtepi32_ps(code), v = _mm512_mul_ps(whole, scale);
      const __m512 r = _mm512_fnmadd_ps(whole, scale, a);
      kept = _mm512_fmadd_ps(v, v, kept);
      lost = _mm512_fmadd_ps(r, r, lost);
      total = _mm512_add_epi32(total, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + d), _mm512_cvtsepi32_epi8(code));
    }
    out.sums.kept += tree_sum(to_double(Vec{kept}));
    out.sums.lost += tree_sum(to_double(Vec{lost}));
  }
  const int64_t coded = (D + 15) / 16 * 16;
  std::memset(codes + coded, 0, static_cast<size_t>(padded_codes(D) - coded));
  out.total = _mm512_reduce_add_epi32(total);
  return out;
}

// q = x - mu, packed [D/4][kTileRows][4] for row r of its tile; codes are stored plus 128, as the instruction wants.
inline Coded encode_x(const float* x, const float* mu, int64_t D, int64_t r, int8_t* scratch, void* tile) {
  const Coded coded = encode_row<true>(x, mu, D, scratch);
  uint32_t* out = static_cast<uint32_t*>(tile) + r;
  for (int64_t p = 0; p < padded_codes(D) / 4; ++p) {
    uint32_t four;
    std::memcpy(&four, scratch + 4 * p, 4);
    out[p * kTileRows] = four ^ 0x80808080u;
  }
  return coded;
}

// A panel of W: bounds, scales, and codes[D/4][32][4]. scratch: 16 rows of padded_codes(D) + 64 bytes.
template <typename T>
void encode_panel(const T* W, int64_t width, const float* bias, const float* mu, const BoundTerms& terms, int64_t D,
                  int8_t* scratch, CodedPanel& panel) {
  const int64_t quads = padded_codes(D) / 4, stride = padded_codes(D) + 64;
  std::memset(static_cast<void*>(&panel), 0, sizeof(panel));
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t count = std::clamp<int64_t>(width - half * 16, 0, 16);
    if (count < 16) std::memset(scratch, 0, static_cast<size_t>(16 * stride));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t f = half * 16 + i;
      const Coded coded = encode_row<false>(W + f * D, mu, D, scratch + i * stride);
      terms.feature(coded.sums, bias == nullptr ? 0.0f : bias[f], D, panel.bound, f);
      panel.scale[f] = coded.scale;
      panel.offset[f] = -128 * coded.total;
    }
    for (int64_t p = 0; p < quads; p += 16) {
      transpose16(reinterpret_cast<const uint32_t*>(scratch) + p, stride / 4, panel.codes + p * kPanel + half * 16,
                  kPanel);
    }
  }
}

QSCOPE_MULTIPLY(multiply_int8, int32_t, "vpdpbusd")

// c[rows][32] = packed rows times a panel. `next`: `ahead` bytes that will be wanted after this panel.
inline void multiply_panel_int8(const PassBlock& block, const CodedPanel& panel, float* c, const char* next,
                                int64_t ahead) {
  const uint32_t* x = static_cast<const uint32_t*>(block.x);
  const int64_t quads = padded_codes(block.D) / 4, stride = ahead / (block.tiles() * quads);
  const __m512i offset0 = _mm512_load_si512(panel.offset), offset1 = _mm512_load_si512(panel.offset + 16);
  const __m512 scale0 = _mm512_load_ps(panel.scale), scale1 = _mm512_load_ps(panel.scale + 16);
  for (int64_t t = 0; t < block.tiles(); ++t, next += quads * stride) {
    float* tile = c + t * kTileRows * kPanel;
    for (int64_t r = 0; r < kTileRows; ++r) {
      _mm512_store_si512(tile + r * kPanel, offset0);
      _mm512_store_si512(tile + r * kPanel + 16, offset1);
    }
    multiply_int8(x + t * quads * kTileRows, panel.codes, quads, reinterpret_cast<int32_t*>(tile), next, stride);
    for (int64_t r = 0; r < std::min<int64_t>(kTileRows, block.rows - t * kTileRows); ++r) {
      float* row = tile + r * kPanel;
      const __m512 scale = _mm512_set1_ps(block.bounds[t * kTileRows + r].scale);
      const __m512 p = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(row)), scale);
      const __m512 q = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(row + 16)), scale);
      _mm512_store_ps(row, _mm512_mul_ps(p, scale0));
      _mm512_store_ps(row + 16, _mm512_mul_ps(q, scale1));
    }
  }
}
