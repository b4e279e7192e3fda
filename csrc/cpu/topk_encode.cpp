// relu(topk(x W_enc^T + b_enc)): scores of 32 features at a time are compared with each row's running threshold while
// they are still in cache, so that the [N, F] scores never exist.
#include "encode.h"

#define QSCOPE_BODY "encode_kernels.h"
#include "for_each_isa.h"

#include "common.h"
#include "topk_select.h"

namespace qscope {
namespace {

constexpr int64_t kRowBlock = 512;            // rows per pass over the weights; each pass packs them once more
constexpr int64_t kListBytes = 64ll << 20;    // candidate lists of all threads together
constexpr int64_t kScoreBytes = 64ll << 20;   // bf16 scores of one block of rows

struct Encoder {
  int64_t N, D, F, k, slots, block_rows;
  int32_t capacity;

  Encoder(int64_t N, int64_t D, int64_t F, int64_t k) : N(N), D(D), F(F), k(k), slots(num_threads()) {
    capacity = static_cast<int32_t>(list_capacity(k, F, kPanel));
    const int64_t row_bytes = slots * capacity * static_cast<int64_t>(sizeof(Candidate));
    const int64_t fit = std::max<int64_t>(kTileRows, kListBytes / row_bytes / kTileRows * kTileRows);
    block_rows = std::min({kRowBlock / kTileRows * kTileRows, fit, (N + kTileRows - 1) / kTileRows * kTileRows});
  }

  template <typename TX>
  void pack_rows(const TX* x, EncodeBlock block, float* out) const {
    share_out((block.rows + kTileRows - 1) / kTileRows, slots, [&](int64_t, int64_t tile) {
      const int64_t n0 = tile * kTileRows, M = block.tile_rows(n0), end = std::min(M, block.rows - n0);
      float* to = out + n0 * D;
      for (int64_t r = 0; r < M; ++r) {
        for (int64_t d = 0; d < D; ++d) to[d * M + r] = r < end ? widen(x[(n0 + r) * D + d]) : 0.0f;
      }
    });
  }

  // Merges the threads' lists of one row and writes its k best.
  void finish(TopList* lists, int64_t rows, int64_t row, float* values, int32_t* indices) const {
    bool nan = false;
    std::vector<Candidate> all;
    for (int64_t s = 0; s < slots; ++s) {
      const TopList& list = lists[s * rows + row];
      nan = nan || list.nan;
      all.insert(all.end(), list.items, list.items + list.count);
    }
    if (nan) return write_nan_row(k, values, indices);
    std::partial_sort(all.begin(), all.begin() + k, all.end(), before);
    for (int64_t j = 0; j < k; ++j) {
      values[j] = all[j].value > 0.0f ? all[j].value : 0.0f;
      indices[j] = all[j].index;
    }
  }

  template <typename TX, typename TW>
  void run(const TX* x, const TW* W, const float* bias, float* values, int32_t* indices) const {
    Buffer<float> rows(block_rows * D), panels(slots * kDepth * kPanel), scores(slots * block_rows * kPanel);
    Buffer<Candidate> items(slots * block_rows * capacity);
    std::vector<TopList> lists(static_cast<size_t>(slots * block_rows));
    for (int64_t n0 = 0; n0 < N; n0 += block_rows) {
      const EncodeBlock block{rows.get(), bias, std::min(block_rows, N - n0), D, F, static_cast<int32_t>(k), capacity};
      pack_rows(x + n0 * D, block, rows.get());
      for (size_t i = 0; i < lists.size(); ++i) reset(lists[i], items.get() + i * capacity);
      share_out((F + kPanel - 1) / kPanel, slots, [&](int64_t slot, int64_t panel) {
        QSCOPE_DISPATCH(encode_panel(block, W, panel, panels.get() + slot * kDepth * kPanel,
                                     scores.get() + slot * block_rows * kPanel, lists.data() + slot * block.rows));
      });
      share_out(block.rows, slots, [&](int64_t, int64_t r) {
        finish(lists.data(), block.rows, r, values + (n0 + r) * k, indices + (n0 + r) * k);
      });
    }
  }
};

void encode_exact(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, int64_t k, const Tensor& values,
                  const Tensor& indices) {
  const Encoder encoder(x.size(0), x.size(1), W.size(0), k);
  const std::optional<Tensor> bias = b ? std::optional<Tensor>(float_contiguous(*b)) : std::nullopt;
  with_float_type(x, "x", [&](auto* tx) {
    with_float_type(W, "W_enc", [&](auto* tw) {
      using TX = std::remove_cvref_t<decltype(*tx)>;
      using TW = std::remove_cvref_t<decltype(*tw)>;
      encoder.run(data<TX>(x), data<TW>(W), bias ? data<float>(*bias) : nullptr, mutable_data<float>(values),
                  mutable_data<int32_t>(indices));
    });
  });
}

Tensor linear(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(W),
                                    torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void encode_bf16(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, int64_t k, const Tensor& values,
                 const Tensor& indices) {
  const auto cast = [](const Tensor& t) { return torch::stable::to(t, ScalarType::BFloat16); };
  const Tensor weight = cast(W);
  const std::optional<Tensor> bias = b ? std::optional<Tensor>(cast(*b)) : std::nullopt;
  const int64_t N = x.size(0), F = W.size(0), step = std::max<int64_t>(1, kScoreBytes / (2 * F));
  for (int64_t n0 = 0; n0 < N; n0 += step) {
    const int64_t rows = std::min(step, N - n0);
    Tensor part = x;
    const Tensor scores =
        torch::stable::contiguous(linear(cast(torch::stable::narrow(part, 0, n0, rows)), weight, bias));
    require(scores.scalar_type() == ScalarType::BFloat16, "the scores must be bfloat16: autocast must be off here");
    select_rows(data<bf16>(scores), rows, F, k, /*relu=*/true, mutable_data<bf16>(values) + n0 * k,
                mutable_data<int32_t>(indices) + n0 * k);
  }
}

std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor W, std::optional<Tensor> b, int64_t k, std::string precision) {
  require(x.dim() == 2 && W.dim() == 2 && x.size(1) == W.size(1), "x must be [N, D] and W_enc [F, D]");
  require(!b || (b->dim() == 1 && b->size(0) == W.size(0)), "b_enc must be [F]");
  require(1 <= k && k <= W.size(0) && W.size(0) <= std::numeric_limits<int32_t>::max(), "k must be in 1..F");
  require(precision == "exact" || precision == "bf16", "precision must be 'exact' or 'bf16'");
  const bool exact = precision == "exact";
  Tensor values = new_tensor(x, {x.size(0), k}, exact ? ScalarType::Float : ScalarType::BFloat16);
  Tensor indices = new_tensor(x, {x.size(0), k}, ScalarType::Int);
  if (exact) {
    encode_exact(torch::stable::contiguous(x), torch::stable::contiguous(W), b, k, values, indices);
  } else {
    encode_bf16(x, W, b, k, values, indices);
  }
  return {values, indices};
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) { m.impl("topk_encode", TORCH_BOX(&qscope::topk_encode)); }
