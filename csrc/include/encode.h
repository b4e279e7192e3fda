// Sizes of the encoder's blocks, shared by its instruction sets.
#pragma once

#include <cstdint>

namespace qscope {

constexpr int kPanel = 32;        // features whose scores are computed together
constexpr int kTileRows = 12;     // rows whose scores are computed together: 12 x 2 AVX-512 accumulators
constexpr int64_t kDepth = 2048;  // columns per pass over the rows: 256 KB of packed weights stay in the L2 cache

}  // namespace qscope
