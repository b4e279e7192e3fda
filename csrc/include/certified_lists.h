// Lists of contenders. Included by certified_kernels.h inside a namespace: no guard.

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Those of 16 contenders that the mask names, to list position `to`. Writes 16 places.
QSCOPE_INLINE void keep16(Contenders& list, int64_t to, Vec high, Vec low, const int32_t* index, uint32_t mask) {
#if QSCOPE_ISA == 2
  const __mmask16 m = static_cast<__mmask16>(mask);
  const __m512i which = _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(index));
  _mm512_storeu_ps(list.high.data() + to, _mm512_maskz_compress_ps(m, high.v));
  _mm512_storeu_ps(list.low.data() + to, _mm512_maskz_compress_ps(m, low.v));
  _mm512_storeu_si512(list.index.data() + to, which);
#else
  float highs[16], lows[16];
  store(highs, high);
  store(lows, low);
  for (; mask != 0; mask &= mask - 1, ++to) {
    const size_t at = static_cast<size_t>(to);
    const int i = __builtin_ctz(mask);
    list.high[at] = highs[i];
    list.low[at] = lows[i];
    list.index[at] = index[i];
  }
#endif
}

QSCOPE_INLINE uint32_t lanes(int64_t count) { return count >= 16 ? 0xffffu : (1u << count) - 1; }

// Drops what does not exceed the threshold; returns the larger of `bound` and the upper bounds dropped.
inline float drop(Contenders& list, float threshold, float bound) {
  list.room(16);
  const Vec tau = broadcast(threshold);
  int64_t kept = 0;
  for (int64_t i = 0; i < list.count; i += 16) {
    const Vec high = load(list.high.data() + i), low = load(list.low.data() + i);
    const uint32_t valid = lanes(list.count - i), mask = not_le(high, tau) & valid;
    if (bound < threshold) {  // nothing dropped is above it
      for (uint32_t out = valid & ~mask; out != 0; out &= out - 1) {
        bound = std::max(bound, list.high[static_cast<size_t>(i + __builtin_ctz(out))]);
      }
    }
    keep16(list, kept, high, low, list.index.data() + i, mask);
    kept += __builtin_popcount(mask);
  }
  list.count = kept;
  return bound;
}

inline int64_t count_above(const Contenders& list, float limit) {
  const Vec floor = broadcast(limit);
  int64_t above = 0;
  for (int64_t i = 0; i < list.count; i += 16) {
    above += __builtin_popcount(not_le(load(list.low.data() + i), floor) & lanes(list.count - i));
  }
  return above;
}

// The smallest and largest finite lower bound.
struct Range {
  float least, most;
};

inline Range range_of_lows(const Contenders& list) {
  const float largest = std::numeric_limits<float>::max();
  Vec least = broadcast(largest), most = broadcast(kNone);
  const int64_t whole = list.count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const Vec low = load(list.low.data() + i);
    least = minimum(low, least);
    most = maximum(low, most);
  }
  float lows[16], highs[16];
  store(lows, least);
  store(highs, most);
  Range range{*std::min_element(lows, lows + 16), *std::max_element(highs, highs + 16)};
  const bool finite = range.least > kNone;
  if (!finite) range.least = largest;
  for (int64_t i = finite ? whole : 0; i < list.count; ++i) {
    const float low = list.low[static_cast<size_t>(i)];
    if (low > kNone) range.least = std::min(range.least, low);
    range.most = std::max(range.most, low);
  }
  return range;
}

// A float that is not above the k-th largest lower bound, and near it: bisection, whose counting is cheaper than a
// selection. Minus infinity if there is none.
inline float near_kth_low(const Contenders& list, int64_t k, int steps) {
  if (list.count < k) return kNone;
  auto [floor, ceiling] = range_of_lows(list);
  const float under = below(floor);
  if (count_above(list, under) < k) return kNone;
  for (int step = 0; step < steps; ++step) {
    const float middle = floor + (ceiling - floor) / 2;
    (count_above(list, middle) >= k ? floor : ceiling) = middle;
  }
  return floor;
}

// The k-th largest lower bound: whatever the order in which threads listed and dropped, what it excludes is the same.
inline float kth_low(const Contenders& list, int64_t k) {
  const float floor = near_kth_low(list, k, 8);
  if (floor == kNone) return kNone;
  std::vector<float> lows;
  for (size_t i = 0; i < static_cast<size_t>(list.count); ++i) {
    if (list.low[i] >= floor) lows.push_back(list.low[i]);
  }
  std::nth_element(lows.begin(), lows.begin() + (k - 1), lows.end(), std::greater<float>());
  return lows[static_cast<size_t>(k - 1)];
}

inline void shrink(Contenders& list, const PassBlock& block, int64_t row) {
  std::atomic<float>& threshold = block.thresholds[row];
  raise(threshold, near_kth_low(list, block.k, 8));
  drop(list, threshold.load(std::memory_order_relaxed), std::numeric_limits<float>::infinity());
  if (list.count > block.thread_limit) {
    list.clear();
    list.overflow = true;
    raise(threshold, std::numeric_limits<float>::infinity());
  }
  list.trigger = list.count + std::max<int64_t>({block.k, 128, list.count / 4});
}

// What is not finite can be anything: it is kept, and counts for nothing.
inline void narrow_to(Contenders& list, int64_t position, float low, float high) {
  const bool finite = std::isfinite(high) && std::isfinite(low);
  list.high[static_cast<size_t>(position)] = finite ? high : std::numeric_limits<float>::infinity();
  list.low[static_cast<size_t>(position)] = finite ? low : kNone;
}

// A score takes the place of both bounds. A NaN can be anything, and stays the only such item of a finished list.
// False if the score is not between its bounds.
inline bool settle_item(Contenders& list, int64_t position, float low) {
  const size_t at = static_cast<size_t>(position);
  const float score = list.low[at], high = list.high[at];
  const bool nan = std::isnan(score);
  list.high[at] = nan ? std::numeric_limits<float>::infinity() : score;
  if (nan) list.low[at] = kNone;
  return nan || (score >= low && score <= high);
}

// Adds the flagged ones of 16 features.
QSCOPE_INLINE void contend(Contenders& list, uint32_t mask, Vec high, Vec low, int32_t first) {
  alignas(64) int32_t index[16];
  for (int i = 0; i < 16; ++i) index[i] = first + i;
  const int64_t before = list.count;
  list.room(32);
  keep16(list, before, high, low, index, mask);
  list.count += __builtin_popcount(mask);
  const Vec most = broadcast(std::numeric_limits<float>::max()), least = broadcast(-std::numeric_limits<float>::max());
  if (__builtin_expect(((not_le(high, most) | not_le(least, low)) & mask) == 0, 1)) return;
  for (int64_t i = before; i < list.count; ++i) {
    narrow_to(list, i, list.low[static_cast<size_t>(i)], list.high[static_cast<size_t>(i)]);
  }
}

// Puts those whose lower bound exceeds the threshold first; returns their number.
inline int64_t split(Contenders& list, float threshold) {
  int64_t first = 0;
  for (int64_t i = 0; i < list.count; ++i) {
    const size_t from = static_cast<size_t>(i), to = static_cast<size_t>(first);
    if (!(list.low[from] > threshold)) continue;
    std::swap(list.high[from], list.high[to]);
    std::swap(list.low[from], list.low[to]);
    std::swap(list.index[from], list.index[to]);
    ++first;
  }
  return first;
}
