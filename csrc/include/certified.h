// A float32 result at the price of a low-precision pass: the bound that decides which features are scored again in
// float64. docs/exact.md states the theorem and proves it; the names here are those used there.
//
// Score: s = float32(S64 + b), where S64 is the dot product of x and w in float64 in a fixed order.
// Pass:  p = the low-precision product of q = round(x - mu) with v = round(w), beta = mu . w + b.
// Bound: |s - (p + beta)| <= A |w| + B |w - v| + C for every row and feature whose magnitudes are in range;
//   A = |x - mu - q| + (gamma + 8u) |q| + delta (|x|)     rounding of x, accumulation of the pass, of the score
//   B = (1 + gamma + 8u) |q|                               rounding of w
//   C = (e |mu| |w|) + 8u |beta| + underflow               the folded mean, final roundings
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "encode.h"
#include "toplist.h"

namespace qscope {

constexpr int64_t kSlab = 512;   // columns summed in float32 before the sum moves to float64
constexpr int64_t kScoreAhead = 4;  // rows read ahead of the one being scored
constexpr double kUnit = 0x1p-24;
constexpr double kSafe = 1 + 0x1p-17;      // above every rounding in the evaluation of the bound itself
constexpr double kLargest = 0x1p60;        // norms above it are out of range: their product could overflow

constexpr int64_t kMostColumns = 1 << 22;  // gamma of more terms would not be small

// Of one row of x or W: sums over its rounded values, over what rounding lost, and the product with mu.
struct Sums {
  double kept, lost, dot;
};

struct RowBound {
  float A, B;
};

// Of one panel of 32 features. Features out of range have an infinite norm, which makes them candidates of every row.
struct PanelBound {
  alignas(64) float norm[kPanel], lost[kPanel], above[kPanel], below[kPanel];
};

// Square root of a sum of squares that was accumulated in float32 over slabs: never below the true norm.
inline double norm_above(double sum, int64_t D) {
  return std::sqrt(sum * (1 + 0x1p-18) + static_cast<double>(D) * 0x1p-148) * kSafe;
}

struct BoundTerms {
  double mean;   // |mu|
  double gamma;  // of a sum of D + 2 rounded terms
  double delta;  // of the float64 score
  double tiny;   // what flushing and gradual underflow can add up to
  double scale;  // 1; tests weaken the bound with it

  BoundTerms(int64_t D, double mean, double scale)
      : mean(mean),
        gamma((D + 2) * kUnit / (1 - (D + 2) * kUnit)),
        delta((D / 16 + 16) * 0x1p-52),
        tiny((4 * D + 16) * 0x1p-126),
        scale(scale) {}

  // False if the row is out of range.
  bool row(const Sums& sums, int64_t D, RowBound& out) const {
    const double q = norm_above(sums.kept, D), r = norm_above(sums.lost, D) + 0x1p-23 * q;
    out.A = static_cast<float>((r + (gamma + 8 * kUnit) * q + delta * (q + r + mean)) * kSafe * scale);
    out.B = static_cast<float>((1 + gamma + 8 * kUnit) * q * kSafe * scale);
    return q + r + mean <= kLargest && D <= kMostColumns;
  }

  void feature(const Sums& sums, float bias, int64_t D, PanelBound& out, int64_t i) const {
    const double lost = norm_above(sums.lost, D), norm = norm_above(sums.kept, D) + lost;
    const double beta = sums.dot + bias;
    const double C = (64 * kUnit * mean * norm + 8 * kUnit * std::fabs(beta) + tiny) * kSafe * scale;
    const bool in_range = norm <= kLargest && std::fabs(beta) <= kLargest * kLargest;
    out.norm[i] = in_range ? static_cast<float>(norm * kSafe) : std::numeric_limits<float>::infinity();
    out.lost[i] = static_cast<float>(lost * kSafe);
    out.above[i] = static_cast<float>(beta + C);
    out.below[i] = static_cast<float>(beta - C);
  }
};

struct Contender {
  float high, low;
  int32_t index;
};

// One thread's contenders for one row.
struct Contenders {
  std::vector<Contender> items;
  size_t trigger = 0;
  bool overflow = false;

  void reset(int64_t k) {
    items.clear();
    trigger = static_cast<size_t>(k + std::max<int64_t>(3 * k, 128));
    overflow = false;
  }
};

// The k-th largest lower bound; minus infinity if there are fewer.
inline float kth_low(const std::vector<Contender>& items, int64_t k, std::vector<float>& scratch) {
  if (static_cast<int64_t>(items.size()) < k) return -std::numeric_limits<float>::infinity();
  scratch.resize(items.size());
  for (size_t i = 0; i < items.size(); ++i) scratch[i] = items[i].low;
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
  return scratch[static_cast<size_t>(k - 1)];
}

inline void drop(std::vector<Contender>& items, float threshold) {
  size_t kept = 0;
  for (const Contender& item : items) {
    items[kept] = item;
    kept += item.high > threshold;
  }
  items.resize(kept);
}

// A row's threshold, shared by the threads: the float below the largest of their k-th largest lower bounds. A feature
// whose upper bound does not exceed it scores strictly less than k others.
inline void raise(std::atomic<float>& threshold, float low) {
  const float tau = low < std::numeric_limits<float>::infinity()
                        ? std::nextafter(low, -std::numeric_limits<float>::infinity())
                        : low;
  float seen = threshold.load(std::memory_order_relaxed);
  while (seen < tau && !threshold.compare_exchange_weak(seen, tau, std::memory_order_relaxed)) {
  }
}

// What the threads share about one block of rows.
struct PassBlock {
  const void* x;      // packed rows: tiles of kTileRows, [D][kTileRows] float32 or [D/2][kTileRows][2] bfloat16
  const float* mu;    // [D]
  const float* bias;  // [F] or null
  const RowBound* bounds;
  std::atomic<float>* thresholds;
  int64_t rows, D, F, k;
  size_t limit;  // contenders per row and thread above which a row is computed in full
  BoundTerms terms;

  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
};

inline void shrink(Contenders& list, const PassBlock& block, int64_t row, std::vector<float>& scratch) {
  std::atomic<float>& threshold = block.thresholds[row];
  raise(threshold, kth_low(list.items, block.k, scratch));
  drop(list.items, threshold.load(std::memory_order_relaxed));
  if (list.items.size() > block.limit) {
    list.overflow = true;
    list.items.clear();
    raise(threshold, std::numeric_limits<float>::infinity());
  }
  list.trigger = list.items.size() + static_cast<size_t>(std::max<int64_t>(3 * block.k, 128));
}

// Adds the flagged features of a panel. What is not finite can be anything: it is kept, and counts for nothing.
inline void contend(Contenders& list, uint32_t mask, const float* scores, const PanelBound& panel, int32_t first,
                    const PassBlock& block, int64_t row, std::vector<float>& scratch) {
  if (list.overflow) return;
  const RowBound bound = block.bounds[row];
  while (mask) {
    const int i = __builtin_ctz(mask);
    mask &= mask - 1;
    const float eps = bound.A * panel.norm[i] + bound.B * panel.lost[i];
    const float high = scores[i] + panel.above[i] + eps, low = scores[i] + panel.below[i] - eps;
    const bool finite = std::isfinite(high) && std::isfinite(low);
    list.items.push_back({finite ? high : std::numeric_limits<float>::infinity(),
                          finite ? low : -std::numeric_limits<float>::infinity(), first + i});
  }
  if (list.items.size() >= list.trigger) shrink(list, block, row, scratch);
}

}  // namespace qscope
