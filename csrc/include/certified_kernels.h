// The certified encoder's kernels of one instruction set: the float32 pass, its epilogue, and the float64 score.
// Included by for_each_isa.h inside a namespace: no guard.
#include "encode_kernels.h"

#if QSCOPE_ISA == 2
struct Wide {
  __m512d lo, hi;
};
QSCOPE_INLINE Wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
QSCOPE_INLINE Wide to_double(Vec a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
          _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)))};
}
QSCOPE_INLINE Wide fma(Wide a, Wide b, Wide c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
QSCOPE_INLINE void store(double* p, Wide a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}
constexpr int kScoreRows = 4, kScoreVecs = 2;
#elif QSCOPE_ISA == 1
struct Wide {
  __m256d v[4];
};
QSCOPE_INLINE Wide wide_zero() {
  const __m256d z = _mm256_setzero_pd();
  return {{z, z, z, z}};
}
QSCOPE_INLINE Wide to_double(Vec a) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1))}};
}
QSCOPE_INLINE Wide fma(Wide a, Wide b, Wide c) {
  QSCOPE_UNROLL
  for (int i = 0; i < 4; ++i) c.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return c;
}
QSCOPE_INLINE void store(double* p, Wide a) {
  QSCOPE_UNROLL
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, a.v[i]);
}
constexpr int kScoreRows = 2, kScoreVecs = 1;
#else
struct Wide {
  double v[16];
};
QSCOPE_INLINE Wide wide_zero() { return {}; }
QSCOPE_INLINE Wide to_double(Vec a) {
  Wide r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i];
  return r;
}
QSCOPE_INLINE Wide fma(Wide a, Wide b, Wide c) {  // products of float32 numbers are exact: the same bits as fused
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
QSCOPE_INLINE void store(double* p, Wide a) { std::memcpy(p, a.v, sizeof(a.v)); }
constexpr int kScoreRows = 1, kScoreVecs = 1;
#endif

template <typename T>
QSCOPE_INLINE Wide load_double(const T* p) {
  return to_double(load(p));
}
#if QSCOPE_ISA == 2
QSCOPE_INLINE Wide load_double(const float* p) {
  return {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
#endif

QSCOPE_INLINE double tree_sum(Wide a) {
  double c[16];
  store(c, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) c[i] += c[i + width];
  }
  return c[0];
}

// The score of R rows and V features: 16 float64 chains each (chain d mod 16), summed as a tree, plus the bias,
// rounded once. Nothing about the batch, the threads or the instruction set enters the bits. The pointers x[0..2R)
// must exist: those after the first R are read ahead, and so are the V rows at `ahead`.
template <int R, int V, typename T>
QSCOPE_INLINE void score_tile(const float* const* x, const T* W, const T* ahead, int64_t stride, const float* bias,
                              int64_t D, float* const* out) {
  Wide acc[R][V];
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) {
    QSCOPE_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = wide_zero();
  }
  const int64_t whole = D / 16 * 16;
  for (int64_t d = 0; d < whole; d += 16) {
    Wide w[V];
    QSCOPE_UNROLL
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(ahead + v * stride + d);
      w[v] = load_double(W + v * stride + d);
    }
    QSCOPE_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (V == 1) __builtin_prefetch(x[r + R] + d);  // with more features the rows are near already
      const Wide a = load_double(x[r] + d);
      QSCOPE_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(a, w[v], acc[r][v]);
    }
  }
  if (whole < D) {
    float tail[R + V][16] = {};
    for (int64_t d = whole; d < D; ++d) {
      for (int r = 0; r < R; ++r) tail[r][d - whole] = x[r][d];
      for (int v = 0; v < V; ++v) tail[R + v][d - whole] = widen(W[v * stride + d]);
    }
    QSCOPE_UNROLL
    for (int r = 0; r < R; ++r) {
      QSCOPE_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = fma(to_double(load(tail[r])), to_double(load(tail[R + v])), acc[r][v]);
    }
  }
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) {
    QSCOPE_UNROLL
    for (int v = 0; v < V; ++v) {
      out[r][v] = static_cast<float>(tree_sum(acc[r][v]) + (bias == nullptr ? 0.0 : static_cast<double>(bias[v])));
    }
  }
}

template <int R, typename T>
QSCOPE_INLINE void score_strip(const float* const* x, const T* W, int64_t features, const T* ahead, const float* bias,
                               int64_t D, float* const* out) {
  for (int64_t f = 0; f < features;) {
    float* to[R];
    for (int r = 0; r < R; ++r) to[r] = out[r] + f;
    const float* b = bias == nullptr ? nullptr : bias + f;
    if (f + kScoreVecs <= features) {
      score_tile<R, kScoreVecs>(x, W + f * D, W + (f + kScoreVecs) * D, D, b, D, to);
      f += kScoreVecs;
    } else {
      score_tile<R, 1>(x, W + f * D, ahead, D, b, D, to);
      ++f;
    }
  }
}

// out[r][0..features-1]: scores of some rows with consecutive features; kScoreAhead more pointers must follow x, and
// `ahead` is the row of W wanted after these
template <typename T>
void score_rows(const float* const* x, int64_t rows, const T* W, int64_t features, const T* ahead, const float* bias,
                int64_t D, float* const* out) {
  int64_t r = 0;
  for (; r + kScoreRows <= rows; r += kScoreRows) score_strip<kScoreRows>(x + r, W, features, ahead, bias, D, out + r);
  if constexpr (kScoreRows > 2) {
    for (; r + 2 <= rows; r += 2) score_strip<2>(x + r, W, features, ahead, bias, D, out + r);
  }
  for (; r < rows; ++r) score_strip<1>(x + r, W, features, ahead, bias, D, out + r);
}

// Scores of a panel of features for rows computed in full.
template <typename T>
void score_panel(const float* const* x, int64_t rows, const T* W, int64_t first, int64_t features, const float* bias,
                 int64_t D, int64_t k, int32_t capacity, float* scores, TopList* lists) {
  std::vector<float*> out(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) out[static_cast<size_t>(r)] = scores + r * kPanel;
  score_rows(x, rows, W + first * D, features, W + (first + features) * D, bias == nullptr ? nullptr : bias + first, D,
             out.data());
  for (int64_t r = 0; r < rows; ++r) {
    uint32_t mask = 0;
    for (int64_t i = 0; i < features; ++i) {
      mask |= static_cast<uint32_t>(!(out[r][i] <= lists[r].tau)) << i;
    }
    if (mask != 0) {
      append(lists[r], mask, out[r], static_cast<int32_t>(first), static_cast<int32_t>(k), capacity, kPanel);
    }
  }
}

#include "certified_lists.h"

// Products of a feature with R float16 rows, in 16 float32 chains, then float64; 2R - 1 pointers must exist.
template <int R, typename T>
QSCOPE_INLINE void multiply_rows(const f16* const* q, const T* w, const T* ahead, int64_t D, double* out) {
  Vec acc[R];
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = zero();
  const int64_t whole = D / 16 * 16;
  for (int64_t d = 0; d < whole; d += 16) {
    __builtin_prefetch(ahead + d);
    const Vec a = load(w + d);
    QSCOPE_UNROLL
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(q[r + R] + d, 0, 2);
      acc[r] = fma(load(q[r] + d), a, acc[r]);
    }
  }
  QSCOPE_UNROLL
  for (int r = 0; r < R; ++r) {
    out[r] = tree_sum(to_double(acc[r]));
    for (int64_t d = whole; d < D; ++d) out[r] += static_cast<double>(widen(q[r][d])) * widen(w[d]);
  }
}

// Narrows the intervals of feature i of a panel: `count` float16 rows, each with its place in a list; kScoreAhead more
// pointers must follow q.
template <typename T>
void refine_rows(const f16* const* q, const Place* places, int64_t count, const T* w, const T* ahead,
                 const PassBlock& block, const PanelBound& panel, int64_t i, Contenders* lists) {
  double product[4];
  for (int64_t r = 0; r < count;) {
    const int64_t left = count - r, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (some == 4) multiply_rows<4>(q + r, w, ahead, block.D, product);
    if (some == 2) multiply_rows<2>(q + r, w, ahead, block.D, product);
    if (some == 1) multiply_rows<1>(q + r, w, ahead, block.D, product);
    for (int64_t j = 0; j < some; ++j) {
      const Place place = places[r + j];
      const RowBound& bound = block.bounds[place.row];
      const float p = static_cast<float>(product[j]) * bound.half_scale, eps = bound.half_A * panel.norm[i];
      narrow_to(lists[place.row], place.position, p + panel.below[i] - eps, p + panel.above[i] + eps);
    }
    r += some;
  }
}

// q = x - mu in float16, scaled so that the largest is just in range.
inline Sums halve_row(const float* x, const float* mu, int64_t D, f16* out, float& scale) {
  float most = 0;
  for (int64_t d = 0; d < D; ++d) most = std::max(most, std::fabs(x[d] - mu[d]));
  const int exponent = most >= 0x1p-100f && most <= 0x1p100f ? std::ilogb(most) : 0;
  const float up = std::ldexp(1.0f, 14 - exponent);
  scale = std::ldexp(1.0f, exponent - 14);
  Sums sums{0, 0, 0};
  for (int64_t d0 = 0; d0 < D; d0 += kSlab) {
    Vec kept = zero(), lost = zero();
    int64_t d = d0;
    for (; d + 16 <= std::min(D, d0 + kSlab); d += 16) {
      const Vec a = sub(load(x + d), load(mu + d));
      store(out + d, mul(a, broadcast(up)));
      const Vec v = mul(load(out + d), broadcast(scale)), r = sub(a, v);
      kept = fma(v, v, kept);
      lost = fma(r, r, lost);
    }
    sums.kept += tree_sum(to_double(kept));
    sums.lost += tree_sum(to_double(lost));
    for (; d < std::min(D, d0 + kSlab); ++d) {
      const float a = x[d] - mu[d];
      narrow(a * up, out + d);
      const double v = static_cast<double>(widen(out[d])) * scale, r = a - v;
      sums.kept += v * v;
      sums.lost += r * r;
    }
  }
  return sums;
}

// Sums of squares and the product with mu, each slab of columns in 16 float32 chains.
template <typename T>
Sums sum_row(const T* row, const float* mu, int64_t D) {
  Sums sums{0, 0, 0};
  for (int64_t begin = 0; begin < D; begin += kSlab) {
    const int64_t end = std::min(D, begin + kSlab);
    Vec kept = zero(), dot = zero();
    int64_t d = begin;
    for (; d + 16 <= end; d += 16) {
      const Vec a = load(row + d);
      kept = multiply_add(a, a, kept);
      dot = multiply_add(a, load(mu + d), dot);
    }
    for (; d < end; ++d) {
      const double a = widen(row[d]);
      sums.kept += a * a;
      sums.dot += a * mu[d];
    }
    sums.kept += tree_sum(to_double(kept));
    sums.dot += tree_sum(to_double(dot));
  }
  return sums;
}

// Lists those of kGroup panels of features, from `first` on, that may belong to the k best of a row.
// c[kGroup][room][32] are the pass's products. Rows come outside: the end of a list is fetched once for the group.
inline void contend_panels(const PassBlock& block, const float* c, const PanelBound* panels, int64_t first,
                           Contenders* lists) {
  const int64_t room = block.tiles() * kTileRows * kPanel, width = std::min<int64_t>(kGroup * kPanel, block.F - first);
  for (int64_t n = 0; n < block.rows; ++n) {
    Contenders& list = lists[n];
    if (n + 2 < block.rows) {
      const Contenders& soon = lists[n + 2];
      __builtin_prefetch(soon.high.data() + soon.count, 1);
      __builtin_prefetch(soon.low.data() + soon.count, 1);
      __builtin_prefetch(soon.index.data() + soon.count, 1);
    }
    if (list.overflow) continue;
    const Vec A = broadcast(block.bounds[n].A), B = broadcast(block.bounds[n].B);
    for (int64_t i = 0; i < width; i += 16) {
      const int64_t panel = i / kPanel, at = i % kPanel;
      const PanelBound& bound = panels[panel];
      const Vec p = load(c + panel * room + n * kPanel + at);
      const Vec eps = fma(B, load(bound.lost + at), mul(A, load(bound.norm + at)));
      const Vec high = add(add(p, load(bound.above + at)), eps);
      const Vec tau = broadcast(block.thresholds[n].load(std::memory_order_relaxed));
      const uint32_t mask = not_le(high, tau) & lanes(width - i);
      if (mask == 0) continue;
      contend(list, mask, high, sub(add(p, load(bound.below + at)), eps), static_cast<int32_t>(first + i));
      if (list.count >= list.trigger) shrink(list, block, n);
    }
  }
}

// c[rows][32] = packed rows times one panel of W in float32, and the sums of its features
template <typename T>
void multiply_panel(const PassBlock& block, const T* W, int64_t width, float* packed, float* c, Sums* sums) {
  const float* x = static_cast<const float*>(block.x);
  for (int64_t f = 0; f < width; ++f) sums[f] = sum_row(W + f * block.D, block.mu, block.D);
  for (int64_t d0 = 0; d0 < block.D; d0 += kDepth) {
    const int64_t len = std::min(kDepth, block.D - d0);
    pack_panel(W + d0, width, block.D, len, packed);
    for (int64_t t = 0; t < block.tiles(); ++t) {
      multiply_tile<kTileRows>(x + (t * block.D + d0) * kTileRows, packed, len, c + t * kTileRows * kPanel, d0 == 0);
    }
  }
}

inline void bound_panel(const PassBlock& block, const Sums* sums, int64_t first, int64_t width, PanelBound& bound) {
  bound = {};
  for (int64_t i = 0; i < width; ++i) {
    block.terms.feature(sums[i], block.bias == nullptr ? 0.0f : block.bias[first + i], block.D, bound, i);
  }
}

template <typename T>
void pass_panel(const PassBlock& block, const T* W, int64_t first, float* packed, float* c, PanelBound& bound) {
  const int64_t width = std::min<int64_t>(kPanel, block.F - first);
  Sums sums[kPanel] = {};
  multiply_panel(block, W + first * block.D, width, packed, c, sums);
  bound_panel(block, sums, first, width, bound);
}

// q = x - mu in float32, packed [D][kTileRows] for row r of its tile
inline Sums pack_row(const float* x, const float* mu, int64_t D, int64_t r, void* tile) {
  float* out = static_cast<float*>(tile) + r;
  Sums sums{0, 0, 0};
  for (int64_t d = 0; d < D; ++d) {
    const float q = x[d] - mu[d];
    sums.kept += static_cast<double>(q) * q;
    out[d * kTileRows] = q;
  }
  return sums;
}
