// The certified encoder's bfloat16 pass (AVX512-BF16). Included by certified.cpp inside namespace avx512, with that
// set enabled: no guard.

// Sixteen rows of pairs become pairs of sixteen rows.
QSCOPE_INLINE void transpose16(const uint32_t* rows, int64_t stride, uint32_t* out, int64_t out_stride) {
  __m512i a[16], b[16];
  QSCOPE_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
  QSCOPE_UNROLL
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  QSCOPE_UNROLL
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4g + j], lane l: column 4l + j of rows 4g..4g+3
  QSCOPE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512i p = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), q = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i s = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88),
                  t = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_store_si512(out + (0 + j) * out_stride, _mm512_shuffle_i32x4(p, s, 0x88));
    _mm512_store_si512(out + (8 + j) * out_stride, _mm512_shuffle_i32x4(p, s, 0xdd));
    _mm512_store_si512(out + (4 + j) * out_stride, _mm512_shuffle_i32x4(q, t, 0x88));
    _mm512_store_si512(out + (12 + j) * out_stride, _mm512_shuffle_i32x4(q, t, 0xdd));
  }
}

// Rounds 32 floats to bfloat16 and returns the pairs; adds up squares of the rounded values and of what was lost.
// The instruction flushes subnormal inputs to zero; the residual is taken from what it returned.
QSCOPE_INLINE __m512i round32(__m512 a, __m512 b, __m512& kept, __m512& lost) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  const __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
  const __m512 w =
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
  const __m512 r = _mm512_sub_ps(a, v), s = _mm512_sub_ps(b, w);
  kept = _mm512_fmadd_ps(v, v, kept);
  lost = _mm512_fmadd_ps(r, r, lost);
  kept = _mm512_fmadd_ps(w, w, kept);
  lost = _mm512_fmadd_ps(s, s, lost);
  return both;
}

// Columns [0, len) of a row, len <= kSlab: rounded pairs, padded with zeros to a multiple of 32 columns.
// `minus` is subtracted from the row, `times` multiplied with it; each may be null.
template <bool kCentre, typename T>
QSCOPE_INLINE void round_slab(const T* row, const float* mu, int64_t len, int64_t ahead, uint32_t* out,
                              Sums& sums) {
  __m512 kept = _mm512_setzero_ps(), lost = kept, dot = kept;
  for (int64_t d = 0; d < len; d += 32) {
    alignas(64) float tail[2][32];
    const float* m = mu + d;
    Vec a, b;
    __builtin_prefetch(row + ahead + d, 0, 2);
    __builtin_prefetch(row + ahead + d + 16, 0, 2);
    if (__builtin_expect(d + 32 <= len, 1)) {
      a = load(row + d);
      b = load(row + d + 16);
    } else {
      for (int64_t i = 0; i < 32; ++i) {
        tail[0][i] = d + i < len ? widen(row[d + i]) : 0.0f;
        tail[1][i] = d + i < len ? mu[d + i] : 0.0f;
      }
      a = load(tail[0]);
      b = load(tail[0] + 16);
      m = tail[1];
    }
    const __m512 m0 = _mm512_loadu_ps(m), m1 = _mm512_loadu_ps(m + 16);
    if (kCentre) {
      a.v = _mm512_sub_ps(a.v, m0);
      b.v = _mm512_sub_ps(b.v, m1);
    } else {
      dot = _mm512_fmadd_ps(a.v, m0, dot);
      dot = _mm512_fmadd_ps(b.v, m1, dot);
    }
    _mm512_storeu_si512(out + d / 2, round32(a.v, b.v, kept, lost));
  }
  sums.kept += tree_sum(to_double(Vec{kept}));
  sums.lost += tree_sum(to_double(Vec{lost}));
  sums.dot += tree_sum(to_double(Vec{dot}));
}

inline int64_t padded_pairs(int64_t D) { return (D + 31) / 32 * 16; }

// packed[pairs][2][16] = columns [0, len) of the panel's rows; `next` elements further, those wanted after them
template <typename T>
void round_panel(const T* W, int64_t width, int64_t D, int64_t len, int64_t next, const float* mu, uint32_t* packed,
                 Sums* sums) {
  alignas(64) uint32_t slab[16][kSlab / 2];
  if (width < kPanel) std::memset(packed, 0, sizeof(uint32_t) * padded_pairs(len) * kPanel);
  for (int64_t d0 = 0; d0 < len; d0 += kSlab) {
    const int64_t part = std::min(kSlab, len - d0), pairs = padded_pairs(part);
    const int64_t ahead = d0 + kSlab < len ? kSlab : next - d0;
    for (int64_t half = 0; half * 16 < width; ++half) {
      const int64_t count = std::min<int64_t>(16, width - half * 16);
      if (count < 16) std::memset(slab, 0, sizeof(slab));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t f = half * 16 + i;
        round_slab<false>(W + f * D + d0, mu + d0, part, ahead, slab[i], sums[f]);
      }
      for (int64_t p = 0; p < pairs; p += 16) {
        transpose16(slab[0] + p, kSlab / 2, packed + (d0 / 2 + p) * kPanel + half * 16, kPanel);
      }
    }
  }
}

// q = x - mu in bfloat16, packed [pairs][kTileRows] for row r of its tile
inline Sums round_row(const float* x, const float* mu, int64_t D, int64_t r, void* tile) {
  alignas(64) uint32_t slab[kSlab / 2];
  uint32_t* out = static_cast<uint32_t*>(tile) + r;
  Sums sums{0, 0, 0};
  for (int64_t d0 = 0; d0 < D; d0 += kSlab) {
    const int64_t part = std::min(kSlab, D - d0), pairs = padded_pairs(part);
    round_slab<true>(x + d0, mu + d0, part, 0, slab, sums);
    for (int64_t p = 0; p < pairs; ++p) out[(d0 / 2 + p) * kTileRows] = slab[p];
  }
  return sums;
}

// c[12][32] += x[steps][12]^T w[steps][32], a step being a 32-bit group of columns. Written in assembly: GCC 12 spills
// the 24 accumulators of the same loop in intrinsics. `next` is read ahead, `stride` bytes per step.
#define QSCOPE_LOAD(r, a, b) "vmovaps " #r "*128(%[c]), %%zmm" #a "\n\tvmovaps " #r "*128+64(%[c]), %%zmm" #b "\n\t"
#define QSCOPE_SAVE(r, a, b) "vmovaps %%zmm" #a ", " #r "*128(%[c])\n\tvmovaps %%zmm" #b ", " #r "*128+64(%[c])\n\t"
#define QSCOPE_STEP(dot, r, t, a, b)               \
  "vpbroadcastd " #r "*4(%[x]), %%zmm" #t "\n\t"   \
  dot " %%zmm0, %%zmm" #t ", %%zmm" #a "\n\t"      \
  dot " %%zmm1, %%zmm" #t ", %%zmm" #b "\n\t"
#define QSCOPE_ALL(f)                                                                                   \
  f(0, 8, 9) f(1, 10, 11) f(2, 12, 13) f(3, 14, 15) f(4, 16, 17) f(5, 18, 19) f(6, 20, 21) f(7, 22, 23) \
      f(8, 24, 25) f(9, 26, 27) f(10, 28, 29) f(11, 30, 31)
#define QSCOPE_MULTIPLY(name, sum_type, dot)                                                                           \
  QSCOPE_INLINE void name(const uint32_t* x, const uint32_t* w, int64_t steps, sum_type* c, const char* next,          \
                          int64_t stride) {                                                                            \
    asm volatile(                                                                                                      \
        QSCOPE_ALL(QSCOPE_LOAD)                                                                                        \
        ".p2align 5\n"                                                                                                 \
        "1:\n\t"                                                                                                       \
        "vmovaps (%[w]), %%zmm0\n\t"                                                                                   \
        "vmovaps 64(%[w]), %%zmm1\n\t"                                                                                 \
        "prefetcht0 1024(%[w])\n\t"                                                                                    \
        "prefetcht0 1088(%[w])\n\t"                                                                                    \
        QSCOPE_STEP(dot, 0, 2, 8, 9) QSCOPE_STEP(dot, 1, 3, 10, 11) QSCOPE_STEP(dot, 2, 4, 12, 13)                     \
        QSCOPE_STEP(dot, 3, 5, 14, 15)                                                                                 \
        "prefetcht2 (%[next])\n\t"                                                                                     \
        QSCOPE_STEP(dot, 4, 2, 16, 17) QSCOPE_STEP(dot, 5, 3, 18, 19) QSCOPE_STEP(dot, 6, 4, 20, 21)                   \
        QSCOPE_STEP(dot, 7, 5, 22, 23)                                                                                 \
        "prefetcht0 576(%[x])\n\t"                                                                                     \
        QSCOPE_STEP(dot, 8, 2, 24, 25) QSCOPE_STEP(dot, 9, 3, 26, 27) QSCOPE_STEP(dot, 10, 4, 28, 29)                  \
        QSCOPE_STEP(dot, 11, 5, 30, 31)                                                                                \
        "add $128, %[w]\n\t"                                                                                           \
        "add $48, %[x]\n\t"                                                                                            \
        "add %[stride], %[next]\n\t"                                                                                   \
        "dec %[steps]\n\t"                                                                                             \
        "jnz 1b\n\t"                                                                                                   \
        QSCOPE_ALL(QSCOPE_SAVE)                                                                                        \
        : [x] "+r"(x), [w] "+r"(w), [steps] "+r"(steps), [next] "+r"(next)                                             \
        : [c] "r"(c), [stride] "r"(stride)                                                                             \
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",   \
          "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",  \
          "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");                                              \
  }

QSCOPE_MULTIPLY(multiply_bf16, float, "vdpbf16ps")

template <typename T>
void multiply_panel_bf16(const PassBlock& block, const T* W, int64_t width, uint32_t* packed, float* c, Sums* sums) {
  const uint32_t* x = static_cast<const uint32_t*>(block.x);
  const int64_t pairs = padded_pairs(block.D), tiles = block.tiles();
  std::memset(c, 0, sizeof(float) * tiles * kTileRows * kPanel);
  const char* next = reinterpret_cast<const char*>(W + width * block.D);  // read ahead only: need not exist
  const int64_t stride = sizeof(T) * kPanel * block.D / (tiles * pairs);
  for (int64_t d0 = 0; d0 < block.D; d0 += kDepth) {
    const int64_t len = std::min(kDepth, block.D - d0), steps = padded_pairs(len);
    const int64_t after = d0 + kDepth < block.D ? kDepth : kPanel * block.D - d0;
    round_panel(W + d0, width, block.D, len, after, block.mu + d0, packed, sums);
    for (int64_t t = 0; t < tiles; ++t, next += steps * stride) {
      multiply_bf16(x + (t * pairs + d0 / 2) * kTileRows, packed, steps, c + t * kTileRows * kPanel, next, stride);
    }
  }
}

template <typename T>
void pass_panel_bf16(const PassBlock& block, const T* W, int64_t first, uint32_t* packed, float* c, PanelBound& bound) {
  const int64_t width = std::min<int64_t>(kPanel, block.F - first);
  Sums sums[kPanel] = {};
  multiply_panel_bf16(block, W + first * block.D, width, packed, c, sums);
  bound_panel(block, sums, first, width, bound);
}
