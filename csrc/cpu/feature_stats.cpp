// feature_stats_: statistics of every feature, added up in place. A thread owns a range of features and goes through
// all entries in token order, so that no sum depends on the number of threads.
#include <limits>

#include "common.h"

namespace qscope {
namespace {

constexpr int64_t kStep = 1024;  // entries of which a thread first lists its own
constexpr int64_t kEntriesPerThread = 1 << 15;  // a quarter of a millisecond: less does not pay for a second thread
constexpr int64_t kLine = 16;  // features per cache line of the smallest table: threads share no line
constexpr int64_t kAhead = 8;  // entries whose table cells are fetched beforehand

bool counts(float a) { return a > 0.0f && a <= std::numeric_limits<float>::max(); }  // false for NaN

struct Tables {
  int64_t G, F, M;
  int64_t* count;
  double *total, *total_sq;
  float *peak, *top_values;
  int64_t* top_tokens;
};

template <typename T, typename I>
struct Codes {
  const T* acts;
  const I* features;
  const int32_t* groups;  // null: every token is in group 0
  int64_t N, K, first_token;
};

// Whether an entry that counts has a feature outside 0..F-1.
template <typename T, typename I>
bool out_of_range(const Codes<T, I>& in, const Tables& t, int64_t slots) {
  const int64_t rows = std::max<int64_t>(1, kEntriesPerThread / in.K);
  std::atomic<bool> found{false};
  share_out((in.N + rows - 1) / rows, slots, [&](int64_t, int64_t task) {
    bool bad = false;
    for (int64_t n = task * rows; n < std::min(in.N, (task + 1) * rows); ++n) {
      if (in.groups != nullptr && (in.groups[n] < 0 || in.groups[n] >= t.G)) continue;
      for (int64_t i = n * in.K; i < (n + 1) * in.K; ++i) {
        const bool outside = static_cast<uint64_t>(in.features[i]) >= static_cast<uint64_t>(t.F);
        bad |= outside & counts(widen(in.acts[i]));
      }
    }
    if (bad) found = true;
  });
  return found;
}

// Keeps a row sorted by value descending, then token ascending; what falls off its end is dropped.
void insert(float value, int64_t token, int64_t M, float* values, int64_t* tokens) {
  const auto before_row = [&](int64_t j) {
    return value > values[j] || (value == values[j] && token < tokens[j]);
  };
  if (!before_row(M - 1)) return;
  int64_t j = M - 1;
  for (; j > 0 && before_row(j - 1); --j) {
    values[j] = values[j - 1];
    tokens[j] = tokens[j - 1];
  }
  values[j] = value;
  tokens[j] = token;
}

template <typename T, typename I>
void add_entry(const Codes<T, I>& in, const Tables& t, int64_t i) {
  const int64_t n = i / in.K, f = in.features[i], cell = in.groups == nullptr ? f : in.groups[n] * t.F + f;
  const float a = widen(in.acts[i]);
  t.count[cell] += 1;
  t.total[cell] += double{a};
  t.total_sq[cell] += double{a} * double{a};
  if (a > t.peak[cell]) t.peak[cell] = a;
  if (t.M > 0) insert(a, in.first_token + n, t.M, t.top_values + f * t.M, t.top_tokens + f * t.M);
}

template <typename T, typename I>
void fetch(const Codes<T, I>& in, const Tables& t, int64_t i) {
  const int64_t f = in.features[i], cell = in.groups == nullptr ? f : in.groups[i / in.K] * t.F + f;
  __builtin_prefetch(t.count + cell, 1);
  __builtin_prefetch(t.total + cell, 1);
  __builtin_prefetch(t.total_sq + cell, 1);
  __builtin_prefetch(t.peak + cell, 1);
  if (t.M > 0) __builtin_prefetch(t.top_values + (f + 1) * t.M - 1);
}

// Adds the entries of features begin..end-1.
template <typename T, typename I>
void add_range(const Codes<T, I>& in, const Tables& t, int64_t begin, int64_t end) {
  int64_t mine[kStep];
  const uint64_t width = static_cast<uint64_t>(end - begin);
  const int64_t entries = in.N * in.K;
  for (int64_t i0 = 0; i0 < entries; i0 += kStep) {
    int64_t found = 0;
    for (int64_t i = i0; i < std::min(entries, i0 + kStep); ++i) {
      mine[found] = i;  // no branch: whose an entry is cannot be predicted
      found += (static_cast<uint64_t>(int64_t{in.features[i]} - begin) < width) & counts(widen(in.acts[i]));
    }
    if (in.groups != nullptr) {
      int64_t kept = 0;
      for (int64_t j = 0; j < found; ++j) {
        const int32_t g = in.groups[mine[j] / in.K];
        mine[kept] = mine[j];
        kept += (g >= 0) & (g < t.G);
      }
      found = kept;
    }
    for (int64_t j = 0; j < found; ++j) {
      if (j + kAhead < found) fetch(in, t, mine[j + kAhead]);
      add_entry(in, t, mine[j]);
    }
  }
}

template <typename T, typename I>
void add_all(const Codes<T, I>& in, const Tables& t) {
  const int64_t entries = in.N * in.K;
  const int64_t slots = std::min(num_threads(), 1 + entries / kEntriesPerThread);
  if (out_of_range(in, t, slots)) {
    throw std::out_of_range("feature_stats_: an active entry has a feature outside 0.." + std::to_string(t.F - 1));
  }
  const int64_t lines = (t.F + kLine - 1) / kLine, share = (lines + slots - 1) / slots * kLine;
  share_out((t.F + share - 1) / share, slots, [&](int64_t, int64_t task) {
    add_range(in, t, task * share, std::min(t.F, (task + 1) * share));
  });
}

bool is_table(const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype && t.is_contiguous();
}

void feature_stats(Tensor acts, Tensor indices, Tensor count, Tensor total, Tensor total_sq, Tensor peak,
                   std::optional<Tensor> groups, std::optional<Tensor> top_values, std::optional<Tensor> top_tokens,
                   Tensor first_token) {
  require(acts.dim() == 2 && indices.dim() == 2 && acts.size(0) == indices.size(0) && acts.size(1) == indices.size(1),
          "top_acts and top_indices must both be [N, K]");
  require(count.dim() == 2, "the tables must be [G, F]");
  const int64_t N = acts.size(0), K = acts.size(1), G = count.size(0), F = count.size(1);
  require(is_table(count, G, F, ScalarType::Long) && is_table(total, G, F, ScalarType::Double) &&
              is_table(total_sq, G, F, ScalarType::Double) && is_table(peak, G, F, ScalarType::Float),
          "count, total, total_sq and peak must be contiguous [G, F]: int64, float64, float64, float32");
  require(groups ? groups->dim() == 1 && groups->size(0) == N && groups->scalar_type() == ScalarType::Int : G == 1,
          "groups must be [N] int32; without it the tables must be [1, F]");
  require(top_values.has_value() == top_tokens.has_value(), "top_values and top_tokens must come together");
  const int64_t M = top_values && top_values->dim() == 2 ? top_values->size(1) : 0;
  require(!top_values || (is_table(*top_values, F, M, ScalarType::Float) &&
                          is_table(*top_tokens, F, M, ScalarType::Long)),
          "top_values and top_tokens must be contiguous [F, M]: float32, int64");
  require(first_token.numel() == 1 && first_token.scalar_type() == ScalarType::Long, "first_token must be a [] int64");
  if (N * K * F == 0) return;
  acts = torch::stable::contiguous(acts);
  indices = torch::stable::contiguous(indices);
  if (groups) groups = torch::stable::contiguous(*groups);
  const Tables tables{G, F, M, mutable_data<int64_t>(count), mutable_data<double>(total),
                      mutable_data<double>(total_sq), mutable_data<float>(peak),
                      M > 0 ? mutable_data<float>(*top_values) : nullptr,
                      M > 0 ? mutable_data<int64_t>(*top_tokens) : nullptr};
  with_float_type(acts, "top_acts", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    const auto run = [&](auto* i) {
      using I = std::remove_cvref_t<decltype(*i)>;
      add_all(Codes<T, I>{data<T>(acts), data<I>(indices), groups ? data<int32_t>(*groups) : nullptr, N, K,
                          *data<int64_t>(first_token)},
              tables);
    };
    if (indices.scalar_type() == ScalarType::Int) return run(static_cast<const int32_t*>(nullptr));
    require(indices.scalar_type() == ScalarType::Long, "top_indices must be int32 or int64");
    run(static_cast<const int64_t*>(nullptr));
  });
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) { m.impl("feature_stats_", TORCH_BOX(&qscope::feature_stats)); }
