// The k best scores of every row: one read with a running threshold, then a sort of the k survivors.
#define QSCOPE_BODY "select_kernels.h"
#include "for_each_isa.h"

#include "common.h"
#include "topk_select.h"

namespace qscope {

template <typename T>
void select_rows(const T* scores, int64_t N, int64_t F, int64_t k, bool relu, T* values, int32_t* indices) {
  const int64_t slots = num_threads();
  const int32_t capacity = static_cast<int32_t>(list_capacity(k, F, 16));
  Buffer<Candidate> items(slots * capacity);
  share_out(N, slots, [&](int64_t slot, int64_t n) {
    TopList list;
    reset(list, items.get() + slot * capacity);
    QSCOPE_DISPATCH(scan_row(scores + n * F, F, static_cast<int32_t>(k), capacity, list));
    if (list.nan) return write_nan_row(k, values + n * k, indices + n * k);
    sort_best(list.items, list.count, k);
    for (int64_t j = 0; j < k; ++j) {
      const Candidate& best = list.items[j];
      const float value = relu && !(best.value > 0.0f) ? 0.0f : best.value + 0.0f;  // -0 + 0 is +0
      narrow(value, values + n * k + j);
      indices[n * k + j] = best.index;
    }
  });
}

template void select_rows(const float*, int64_t, int64_t, int64_t, bool, float*, int32_t*);
template void select_rows(const bf16*, int64_t, int64_t, int64_t, bool, bf16*, int32_t*);
template void select_rows(const f16*, int64_t, int64_t, int64_t, bool, f16*, int32_t*);

namespace {

std::tuple<Tensor, Tensor> topk_select(Tensor scores, int64_t k) {
  require(scores.dim() == 2, "scores must be [N, F]");
  require(1 <= k && k <= scores.size(1) && scores.size(1) <= std::numeric_limits<int32_t>::max(),
          "k must be in 1..F");
  scores = torch::stable::contiguous(scores);
  const int64_t N = scores.size(0), F = scores.size(1);
  Tensor values = new_tensor(scores, {N, k}, scores.scalar_type());
  Tensor indices = new_tensor(scores, {N, k}, ScalarType::Int);
  with_float_type(scores, "scores", [&](auto* t) {
    using T = std::remove_cvref_t<decltype(*t)>;
    select_rows(data<T>(scores), N, F, k, false, mutable_data<T>(values), mutable_data<int32_t>(indices));
  });
  return {values, indices};
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) { m.impl("topk_select", TORCH_BOX(&qscope::topk_select)); }
