// Pairs of a row and a feature, grouped by feature, so that a row of W is read once for all the rows of x that need it.
#pragma once

#include "certified.h"
#include "common.h"

namespace qscope {

constexpr int64_t kFeatureTask = 64;

template <typename T>
struct Pairs {
  std::vector<int64_t> offset;  // [F + 1]
  std::vector<const T*> from;   // rows of x; kScoreAhead more follow
  std::vector<Place> to;
};

// Items begin[r]..end[r] of each row's list.
template <typename T>
Pairs<T> group(int64_t F, const std::vector<const T*>& rows, const Contenders* lists, const std::vector<int64_t>& begin,
               const std::vector<int64_t>& end) {
  Pairs<T> pairs;
  std::vector<int64_t>& offset = pairs.offset;
  offset.assign(static_cast<size_t>(F + 1), 0);
  const auto each = [&](const auto& f) {
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t i = begin[r]; i < end[r]; ++i) f(r, i, static_cast<size_t>(lists[r].index[static_cast<size_t>(i)]));
    }
  };
  each([&](size_t, int64_t, size_t feature) { ++offset[feature + 1]; });
  for (size_t f = 0; f < static_cast<size_t>(F); ++f) offset[f + 1] += offset[f];
  const size_t count = static_cast<size_t>(offset.back());
  pairs.from.assign(count + kScoreAhead, rows[0]);
  pairs.to.resize(count);
  std::vector<int64_t> next(offset.begin(), offset.end() - 1);
  each([&](size_t r, int64_t i, size_t feature) {
    const size_t at = static_cast<size_t>(next[feature]++);
    pairs.from[at] = rows[r];
    pairs.to[at] = {static_cast<int32_t>(r), static_cast<int32_t>(i)};
  });
  return pairs;
}

// One task's part of the features: f(feature, its first pair, number of pairs, the feature wanted next).
template <typename T, typename E>
void for_features(const Pairs<T>& pairs, int64_t task, const E& f) {
  const std::vector<int64_t>& offset = pairs.offset;
  const int64_t end = std::min(static_cast<int64_t>(offset.size()) - 1, (task + 1) * kFeatureTask);
  const auto wanted = [&](int64_t g) {
    while (g < end && offset[static_cast<size_t>(g)] == offset[static_cast<size_t>(g) + 1]) ++g;
    return g;
  };
  for (int64_t g = wanted(task * kFeatureTask); g < end;) {
    const int64_t begin = offset[static_cast<size_t>(g)], after = wanted(g + 1);
    f(g, begin, offset[static_cast<size_t>(g) + 1] - begin, after);
    g = after;
  }
}

}  // namespace qscope
