// Shared by the encoder's instruction sets: sizes of its blocks and the description of a block of rows.
#pragma once

#include <cstdint>

#include "toplist.h"

namespace qscope {

constexpr int kPanel = 32;      // features whose scores are computed together
constexpr int kTileRows = 12;   // rows whose scores are computed together: 12 x 2 AVX-512 accumulators
constexpr int64_t kDepth = 2048;  // columns per pass: 256 KB of packed weights stay in the L2 cache

struct EncodeBlock {
  const float* x;     // packed: tiles of kTileRows rows (the last one padded to tile_rows), each [D][rows]
  const float* bias;  // [F] or null
  int64_t rows, D, F;
  int32_t k, capacity;

  // Rows that the tile starting at row n is padded to.
  int tile_rows(int64_t n) const {
    const int64_t left = rows - n;
    return left > 8 ? kTileRows : left > 4 ? 8 : left > 2 ? 4 : left > 1 ? 2 : 1;
  }
};

}  // namespace qscope
