// Exact encode on the CPU: see csrc/include/certified.h.
#pragma once

#include "common.h"

namespace qscope {

// What is known about each row's answer; both may be null.
struct Certificate {
  int32_t* candidates;  // features whose exact score was computed: F for a row computed in full
  float* margin;        // the k-th score exceeds that of every other feature by at least this
};

// x [N, D] and W [F, D] contiguous, bias [F] float32 or null -> values [N, k] float32 after ReLU, indices [N, k].
void encode_exact(const Tensor& x, const Tensor& W, const std::optional<Tensor>& bias, int64_t k, float* values,
                  int32_t* indices, Certificate certificate);

}  // namespace qscope
