// relu(topk(x W_enc^T + b_enc)): the operators. "exact" is certified.cpp; "bf16" ranks torch's bfloat16 product a block
// of rows at a time.
#include "certified_encode.h"
#include "topk_select.h"

namespace qscope {
namespace {

constexpr int64_t kScoreBytes = 64ll << 20;  // bf16 scores of one block of rows

std::optional<Tensor> float_bias(const std::optional<Tensor>& b) {
  return b ? std::optional<Tensor>(float_contiguous(*b)) : std::nullopt;
}

void check(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, int64_t k) {
  require(x.dim() == 2 && W.dim() == 2 && x.size(1) == W.size(1), "x must be [N, D] and W_enc [F, D]");
  require(!b || (b->dim() == 1 && b->size(0) == W.size(0)), "b_enc must be [F]");
  require(1 <= k && k <= W.size(0) && W.size(0) <= std::numeric_limits<int32_t>::max(), "k must be in 1..F");
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
  check(x, W, b, k);
  require(precision == "exact" || precision == "bf16", "precision must be 'exact' or 'bf16'");
  const bool exact = precision == "exact";
  Tensor values = new_tensor(x, {x.size(0), k}, exact ? ScalarType::Float : ScalarType::BFloat16);
  Tensor indices = new_tensor(x, {x.size(0), k}, ScalarType::Int);
  if (exact) {
    encode_exact(torch::stable::contiguous(x), torch::stable::contiguous(W), float_bias(b), {nullptr, nullptr}, k,
                 mutable_data<float>(values), mutable_data<int32_t>(indices), {nullptr, nullptr});
  } else {
    encode_bf16(x, W, b, k, values, indices);
  }
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> certified(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b,
                                                     CodedWeights coded, int64_t k) {
  const int64_t N = x.size(0);
  Tensor values = new_tensor(x, {N, k}, ScalarType::Float), indices = new_tensor(x, {N, k}, ScalarType::Int);
  Tensor candidates = new_tensor(x, {N}, ScalarType::Int), margin = new_tensor(x, {N}, ScalarType::Float);
  encode_exact(torch::stable::contiguous(x), torch::stable::contiguous(W), float_bias(b), coded, k,
               mutable_data<float>(values), mutable_data<int32_t>(indices),
               {mutable_data<int32_t>(candidates), mutable_data<float>(margin)});
  return {values, indices, candidates, margin};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_encode_certified(Tensor x, Tensor W, std::optional<Tensor> b,
                                                                 int64_t k) {
  check(x, W, b, k);
  return certified(x, W, b, {nullptr, nullptr}, k);
}

std::vector<Tensor> pack_encoder(Tensor W, std::optional<Tensor> b, Tensor mu, [[maybe_unused]] bool pair) {
  require(W.dim() == 2 && mu.dim() == 1 && mu.size(0) == W.size(1), "W_enc must be [F, D] and mu [D]");
  require(!b || (b->dim() == 1 && b->size(0) == W.size(0)), "b_enc must be [F]");
  const Tensor weights = torch::stable::contiguous(W), centre = float_contiguous(mu);
  Tensor codes = new_tensor(W, {coded_bytes(W.size(0), W.size(1))}, ScalarType::Byte);
  if (codes.numel() > 0) encode_weights(weights, float_bias(b), data<float>(centre), mutable_data<char>(codes));
  return {codes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_encode_packed(Tensor x, Tensor W, std::optional<Tensor> b, Tensor mu,
                                                              std::vector<Tensor> packed, int64_t k) {
  check(x, W, b, k);
  require(mu.dim() == 1 && mu.size(0) == W.size(1) && packed.size() == 1, "mu must be [D], packed one tensor of codes");
  const Tensor centre = float_contiguous(mu), &codes = packed[0];
  if (codes.numel() == 0 || coded_bytes(W.size(0), W.size(1)) == 0) return certified(x, W, b, {nullptr, nullptr}, k);
  require(codes.scalar_type() == ScalarType::Byte && codes.numel() == coded_bytes(W.size(0), W.size(1)) &&
              reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 64 == 0 && codes.is_contiguous(),
          "the codes must be those that pack_encoder made of these weights");
  return certified(x, W, b, {data<float>(centre), data<char>(codes)}, k);
}

}  // namespace
}  // namespace qscope

STABLE_TORCH_LIBRARY_IMPL(qscope, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&qscope::topk_encode));
  m.impl("topk_encode_certified", TORCH_BOX(&qscope::topk_encode_certified));
  m.impl("pack_encoder", TORCH_BOX(&qscope::pack_encoder));
  m.impl("topk_encode_packed", TORCH_BOX(&qscope::topk_encode_packed));
}
