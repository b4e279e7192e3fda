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
constexpr int64_t kGroup = 4;   // panels multiplied before their products are looked at
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
  float scale;        // of the int8 codes
  float half_A;       // A of the float16 row that narrows the intervals, whose products have exact features (B = 0)
  float half_scale;   // of that row: a power of two
};

// Of one panel of 32 features. Features out of range have an infinite norm, which makes them candidates of every row.
struct PanelBound {
  alignas(64) float norm[kPanel], lost[kPanel], above[kPanel], below[kPanel];
};

// One panel of W as int8 codes: W[first + i][4p + j] = scale[i] * codes[p][i][j], nearly. Codes of `columns` follow.
struct CodedPanel {
  PanelBound bound;
  alignas(64) float scale[kPanel];
  int32_t offset[kPanel];  // -128 times the sum of a feature's codes: the codes of x are stored plus 128
  uint32_t codes[];
};

inline int64_t padded_codes(int64_t D) { return (D + 63) / 64 * 64; }
inline int64_t coded_panel_bytes(int64_t D) { return static_cast<int64_t>(sizeof(CodedPanel)) + kPanel * padded_codes(D); }
constexpr int64_t kMostCodedColumns = 1 << 16;  // their sum stays below 2^31

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
    const double q = norm_above(sums.kept, D), lost = norm_above(sums.lost, D), r = lost + 0x1p-23 * (q + lost);
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

  // A of a row rounded to float16: products with features as they are, summed in 16 chains, then in float64.
  float half(const Sums& sums, int64_t D) const {
    const double q = norm_above(sums.kept, D), lost = norm_above(sums.lost, D), r = lost + 0x1p-23 * (q + lost);
    const double steps = (D / 16 + 8) * kUnit;
    return static_cast<float>((r + (2 * steps + 8 * kUnit) * q + delta * (q + r + mean)) * kSafe * scale);
  }
};

// One thread's contenders for one row: upper bounds, lower bounds (at last the scores) and features.
struct Contenders {
  std::vector<float> high, low;
  std::vector<int32_t> index;
  int64_t count = 0, trigger = 0;
  int64_t first = 0;  // so many of them come first whose lower bound exceeds the threshold
  bool overflow = false;

  void room(int64_t more) {  // beyond `count`, for whole vectors
    const size_t need = static_cast<size_t>(count + more);
    if (high.size() >= need) return;
    for (std::vector<float>* column : {&high, &low}) column->resize(need + need / 2);
    index.resize(need + need / 2);
  }
  void clear() { *this = Contenders(); }
};

// Where a contender of a feature is.
struct Place {
  int32_t row, position;
};

// The float below `low`: what does not exceed it is smaller than k scores.
inline float below(float low) {
  const float infinity = std::numeric_limits<float>::infinity();
  return low < infinity ? std::nextafter(low, -infinity) : low;
}

// A row's threshold, shared by the threads: the float below the largest of their k-th largest lower bounds. A feature
// whose upper bound does not exceed it scores strictly less than k others.
inline void raise(std::atomic<float>& threshold, float low) {
  const float tau = below(low);
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
  int64_t limit;         // contenders of a row above which another pass has to decide
  int64_t thread_limit;  // and of a row in one thread's list
  BoundTerms terms;

  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
};

}  // namespace qscope
