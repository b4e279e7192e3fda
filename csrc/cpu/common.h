// What the CPU operators share: argument checks, dtype dispatch, scratch memory and the thread pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "vec16_common.h"

namespace qscope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// Calls f with a null pointer of the element type of `tensor`.
template <typename F>
void with_float_type(const Tensor& tensor, const char* name, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(static_cast<const float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<const bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<const f16*>(nullptr));
    default: throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16");
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor float_contiguous(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// Uninitialised scratch memory aligned to a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(std::max<int64_t>(n, 1)),
                                             std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

inline int64_t num_threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Hands out tasks 0..tasks-1 in ascending order to the threads as they become free: f(slot, task), where calls with
// the same slot < slots never overlap. Which thread takes which task must not change any result.
template <typename F>
void share_out(int64_t tasks, int64_t slots, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(slots, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task = next++; task < tasks; task = next++) f(slot, task);
    }
  });
}

// Indices [N, K] as int32, each checked to lie in 0..F-1.
std::vector<int32_t> checked_indices(const Tensor& indices, int64_t F);

}  // namespace qscope
