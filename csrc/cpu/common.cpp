// The instruction set in use, and the check of indices that every sparse operator makes.
#include "common.h"

namespace qscope {

std::atomic<int> isa_in_use{static_cast<int>(best_isa())};

namespace {

template <typename I>
std::vector<int32_t> check(const I* indices, int64_t count, int64_t F) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= F) {
      throw std::out_of_range("index " + std::to_string(indices[i]) + " is outside 0.." + std::to_string(F - 1) +
                              ", the rows of the weight matrix given");
    }
    out[static_cast<size_t>(i)] = static_cast<int32_t>(indices[i]);
  }
  return out;
}

}  // namespace

std::vector<int32_t> checked_indices(const Tensor& indices, int64_t F) {
  require(F <= std::numeric_limits<int32_t>::max(), "more than 2^31-1 features");
  const Tensor plain = torch::stable::contiguous(indices);
  if (plain.scalar_type() == ScalarType::Int) return check(data<int32_t>(plain), plain.numel(), F);
  require(plain.scalar_type() == ScalarType::Long, "indices must be int32 or int64");
  return check(data<int64_t>(plain), plain.numel(), F);
}

}  // namespace qscope

// Lowers the instruction set (for tests: level 0 portable, 1 AVX2, 2 AVX-512; a negative level asks only) and returns
// the one in use.
extern "C" int qscope_cpu_isa(int level) {
  if (level >= 0) qscope::isa_in_use = std::min(level, static_cast<int>(qscope::best_isa()));
  return qscope::isa_in_use;
}
