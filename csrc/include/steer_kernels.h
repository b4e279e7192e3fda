// The residual's side of steering: a row read as float32, and the row plus what is added to it, rounded once.
// Included by for_each_isa.h inside a namespace: no guard.

#include "sparse_kernels.h"

template <typename T>
void widen_row(const T* h, int64_t D, float* x) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) store(x + d, load(h + d));
  for (; d < D; ++d) x[d] = widen(h[d]);
}

template <typename T>
void add_to_row(const float* delta, int64_t D, T* h) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) {
    alignas(64) float sum[16];
    store(sum, add(load(h + d), load(delta + d)));
    T rounded[16];
    for (int j = 0; j < 16; ++j) narrow(sum[j], rounded + j);
    std::memcpy(h + d, rounded, sizeof(rounded));
  }
  for (; d < D; ++d) narrow(widen(h[d]) + delta[d], h + d);
}
