// Exact encode on the CPU: see csrc/include/certified.h.
#pragma once

#include "common.h"

namespace qscope {

// What is known about each row's answer; both may be null.
struct Certificate {
  int32_t* candidates;  // features whose exact score was computed: F for a row computed in full
  float* margin;        // the k-th score exceeds that of every other feature by at least this
};

// Weights rounded beforehand; both null where they are rounded in every call.
struct CodedWeights {
  const float* mu;    // [D]
  const char* codes;  // ceil(F / 32) panels of coded_panel_bytes(D) for that mu
};

// x [N, D] and W [F, D] contiguous, bias [F] float32 or null -> values [N, k] float32 after ReLU, indices [N, k].
void encode_exact(const Tensor& x, const Tensor& W, const std::optional<Tensor>& bias, CodedWeights coded, int64_t k,
                  float* values, int32_t* indices, Certificate certificate);

// Bytes of the codes of W [F, D]; 0 where this CPU does not use any.
int64_t coded_bytes(int64_t F, int64_t D);

// Fills `codes`, coded_bytes(F, D) aligned to 64 bytes. W [F, D] contiguous, bias [F] float32 or null, mu [D] float32.
void encode_weights(const Tensor& W, const std::optional<Tensor>& bias, const float* mu, char* codes);

}  // namespace qscope
