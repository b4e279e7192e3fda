// sparse_decode, sparse_dot and sparse_outer: gathers of weight rows, rows of the result in parallel.
#define QSCOPE_BODY "sparse_kernels.h"
#include "for_each_isa.h"

#include "common.h"

namespace qscope {
namespace {

constexpr int64_t kRowsPerTask = 4;

int64_t tasks_for(int64_t n) { return (n + kRowsPerTask - 1) / kRowsPerTask; }

template <typename T>
void round_row(const float* sum, const float* bias, int64_t D, T* out) {
  if (bias == nullptr) {
    for (int64_t d = 0; d < D; ++d) narrow(sum[d], out + d);
  } else {
    for (int64_t d = 0; d < D; ++d) narrow(sum[d] + bias[d], out + d);
  }
}

Tensor sparse_decode(Tensor values, Tensor indices, Tensor W, std::optional<Tensor> b) {
  require(values.dim() == 2 && indices.dim() == 2 && values.size(0) == indices.size(0) &&
              values.size(1) == indices.size(1),
          "top_acts and top_indices must both be [N, K]");
  require(W.dim() == 2 && (!b || (b->dim() == 1 && b->size(0) == W.size(1))), "W_dec must be [F, D] and b_dec [D]");
  const int64_t N = values.size(0), K = values.size(1), D = W.size(1);
  const std::vector<int32_t> ids = checked_indices(indices, W.size(0));
  values = float_contiguous(values);
  W = torch::stable::contiguous(W);
  const std::optional<Tensor> bias = b ? std::optional<Tensor>(float_contiguous(*b)) : std::nullopt;
  Tensor y = new_tensor(W, {N, D}, W.scalar_type());
  const int64_t slots = num_threads();
  Buffer<float> sums(slots * D);
  with_float_type(W, "W_dec", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    share_out(tasks_for(N), slots, [&](int64_t slot, int64_t task) {
      float* sum = sums.get() + slot * D;
      for (int64_t n = task * kRowsPerTask; n < std::min(N, (task + 1) * kRowsPerTask); ++n) {
        QSCOPE_DISPATCH(weighted_rows(data<float>(values) + n * K, ids.data() + n * K, K, (N - n) * K, data<T>(W), D,
                                      sum));
        round_row(sum, bias ? data<float>(*bias) : nullptr, D, mutable_data<T>(y) + n * D);
      }
    });
  });
  return y;
}

Tensor sparse_dot(Tensor g, Tensor indices, Tensor W) {
  require(g.dim() == 2 && indices.dim() == 2 && W.dim() == 2 && g.size(0) == indices.size(0) &&
              g.size(1) == W.size(1),
          "g must be [N, D], indices [N, K] and W [F, D]");
  const int64_t N = g.size(0), K = indices.size(1), D = W.size(1);
  const std::vector<int32_t> ids = checked_indices(indices, W.size(0));
  g = float_contiguous(g);
  W = torch::stable::contiguous(W);
  Tensor out = new_tensor(g, {N, K}, ScalarType::Float);
  with_float_type(W, "W", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    share_out(tasks_for(N), num_threads(), [&](int64_t, int64_t task) {
      for (int64_t n = task * kRowsPerTask; n < std::min(N, (task + 1) * kRowsPerTask); ++n) {
        QSCOPE_DISPATCH(dot_rows(data<float>(g) + n * D, ids.data() + n * K, K, (N - n) * K, data<T>(W), D,
                                 mutable_data<float>(out) + n * K));
      }
    });
  });
  return out;
}

// The entries of values and indices sorted by feature, ascending n inside a feature.
struct ByFeature {
  std::vector<int64_t> begin;  // [F + 1]
  std::vector<int32_t> row;
  std::vector<float> value;

  ByFeature(const std::vector<int32_t>& ids, const float* values, int64_t K, int64_t F)
      : begin(static_cast<size_t>(F + 1), 0), row(ids.size()), value(ids.size()) {
    for (int32_t f : ids) ++begin[f + 1];
    for (int64_t f = 0; f < F; ++f) begin[f + 1] += begin[f];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t at = next[ids[i]]++;
      row[at] = static_cast<int32_t>(i / static_cast<size_t>(K));
      value[at] = values[i];
    }
  }
};

std::tuple<Tensor, Tensor> sparse_outer(Tensor values, Tensor indices, Tensor g, int64_t F) {
  require(values.dim() == 2 && indices.dim() == 2 && values.size(0) == indices.size(0) &&
              values.size(1) == indices.size(1) && g.dim() == 2 && g.size(0) == values.size(0),
          "values and indices must be [N, K] and g [N, D]");
  require(F >= 1 && g.size(0) <= std::numeric_limits<int32_t>::max(), "d_sae must be at least 1");
  const int64_t D = g.size(1);
  values = float_contiguous(values);
  g = torch::stable::contiguous(g);
  const ByFeature lists(checked_indices(indices, F), data<float>(values), values.size(1), F);
  Tensor rows = new_tensor(g, {F, D}, ScalarType::Float), sums = new_tensor(g, {F}, ScalarType::Float);
  // A feature costs its entries plus the write of its row: equal shares of both, many more than threads.
  const int64_t slots = num_threads(), entries = static_cast<int64_t>(lists.row.size());
  const int64_t share = std::max<int64_t>(1, (entries + F) / (32 * slots));
  std::vector<int64_t> bounds{0};
  for (int64_t f = 0; f < F; ++f) {
    if (lists.begin[f] + f - (lists.begin[bounds.back()] + bounds.back()) >= share) bounds.push_back(f);
  }
  bounds.push_back(F);
  with_float_type(g, "g", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    share_out(static_cast<int64_t>(bounds.size()) - 1, slots, [&](int64_t, int64_t task) {
      for (int64_t f = bounds[task]; f < bounds[task + 1]; ++f) {
        const int64_t i = lists.begin[f], count = lists.begin[f + 1] - i;
        QSCOPE_DISPATCH(weighted_rows(lists.value.data() + i, lists.row.data() + i, count, entries - i, data<T>(g), D,
                                      mutable_data<float>(rows) + f * D));
        float sum = 0.0f;
        for (int64_t j = i; j < i + count; ++j) sum += lists.value[j];
        mutable_data<float>(sums)[f] = sum;
      }
    });
  });
  return {rows, sums};
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&qscope::sparse_decode));
  m.impl("sparse_dot", TORCH_BOX(&qscope::sparse_dot));
  m.impl("sparse_outer", TORCH_BOX(&qscope::sparse_outer));
}
