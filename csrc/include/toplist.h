// The running list of a row's best scores: value descending, then lowest index.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace qscope {

struct Candidate {
  float value;
  int32_t index;
};

inline bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Candidates arrive in ascending index order. While `tau` is NaN everything is taken; after the first compaction
// only scores above the k-th best so far: an equal one with a higher index loses to k earlier ones.
struct TopList {
  Candidate* items;
  int32_t count;
  float tau;
  bool nan;
};

inline void reset(TopList& list, Candidate* items) {
  list = {items, 0, std::numeric_limits<float>::quiet_NaN(), false};
}

inline void compact(TopList& list, int32_t k) {
  if (list.count < k) return;
  std::nth_element(list.items, list.items + (k - 1), list.items + list.count, before);
  list.count = k;
  list.tau = list.items[k - 1].value;
}

// Room for one list: compaction costs about as much as the appends between two of them.
inline int64_t list_capacity(int64_t k, int64_t F, int64_t step) {
  return std::min(k + std::max<int64_t>(3 * k, 128), F) + step;
}

// Adds the flagged ones of `width` <= 32 scores, whose indices start at `first`. A NaN condemns the row.
inline void append(TopList& list, uint32_t mask, const float* scores, int32_t first, int32_t k, int32_t capacity,
                   int32_t step) {
  while (mask) {
    const int lane = __builtin_ctz(mask);
    mask &= mask - 1;
    if (std::isnan(scores[lane])) {
      list.nan = true;
      list.tau = std::numeric_limits<float>::infinity();
      return;
    }
    list.items[list.count++] = {scores[lane], first + lane};
  }
  if (list.count > capacity - step) compact(list, k);
}

}  // namespace qscope
