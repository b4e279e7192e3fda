// Appends to `list` the scores of one row that may be among its k best, in one read of the row.
// Included by for_each_isa.h inside a namespace: no guard.

template <typename T>
void scan_row(const T* row, int64_t F, int32_t k, int32_t capacity, TopList& list) {
  constexpr int64_t kStep = 64;  // one branch per 64 scores: nearly all of them are below the threshold
  alignas(64) float scores[16];
  int64_t f = 0;
  for (; f + kStep <= F; f += kStep) {
    const Vec tau = broadcast(list.tau);
    uint64_t mask = 0;
    QSCOPE_UNROLL
    for (int v = 0; v < 4; ++v) mask |= static_cast<uint64_t>(not_le(load(row + f + v * 16), tau)) << (v * 16);
    if (__builtin_expect(mask == 0, 1)) continue;
    for (int v = 0; v < 4; ++v) {
      const uint32_t part = static_cast<uint32_t>(mask >> (v * 16)) & 0xffffu;
      if (part == 0) continue;
      store(scores, load(row + f + v * 16));
      append(list, part, scores, static_cast<int32_t>(f + v * 16), k, capacity, 16);
    }
  }
  for (; f < F; ++f) {
    scores[0] = widen(row[f]);
    if (!(scores[0] <= list.tau)) append(list, 1, scores, static_cast<int32_t>(f), k, capacity, 16);
  }
}
