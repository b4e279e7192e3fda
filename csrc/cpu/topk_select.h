// Row-wise selection, also used by the encoder's bf16 path.
#pragma once

#include <cstdint>

#include "vec16_common.h"

namespace qscope {

inline void write_nan(float* p) { *p = std::numeric_limits<float>::quiet_NaN(); }
inline void write_nan(bf16* p) { p->bits = 0x7fc0; }
inline void write_nan(f16* p) { p->bits = 0x7e00; }

template <typename T>
void write_nan_row(int64_t k, T* values, int32_t* indices) {
  for (int64_t j = 0; j < k; ++j) {
    write_nan(values + j);
    indices[j] = static_cast<int32_t>(j);
  }
}

// scores [N, F] -> values [N, k] and indices [N, k], value descending, then lowest index; negative values become 0
// when `relu` is set.
template <typename T>
void select_rows(const T* scores, int64_t N, int64_t F, int64_t k, bool relu, T* values, int32_t* indices);

}  // namespace qscope
