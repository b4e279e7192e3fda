// The running list of a row's best scores: value descending, then lowest index.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace qscope {

struct Candidate {
  float value;
  int32_t index;
};

inline bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Moves the k best to the front, in order; -0 becomes +0, NaN must not be among them. Whole numbers that descend in that
// order are sorted: comparing them takes no branch.
inline void sort_best(Candidate* items, int64_t count, int64_t k) {
  std::vector<uint64_t> keys(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const float value = items[i].value + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    keys[static_cast<size_t>(i)] = uint64_t{bits} << 32 | ~static_cast<uint32_t>(items[i].index);
  }
  if (k < count) std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<uint64_t>());
  std::sort(keys.begin(), keys.begin() + k, std::greater<uint64_t>());
  for (int64_t i = 0; i < k; ++i) {
    const uint64_t key = keys[static_cast<size_t>(i)];
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
    std::memcpy(&items[i].value, &bits, 4);
    items[i].index = static_cast<int32_t>(~static_cast<uint32_t>(key));
  }
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
