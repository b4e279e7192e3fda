// C entry point of the row select; see topk_select.cuh.
#include "topk_select.cuh"

namespace {

using namespace qscope;

template <typename Score, int THREADS, int VECTORS, int BLOCKS_PER_SM>
void launch(const SelectArguments<Score>& args, int64_t rows, cudaStream_t stream) {
  const auto kernel = topk_select_kernel<Score, THREADS, VECTORS, BLOCKS_PER_SM>;
  QSCOPE_LAUNCH(kernel, dim3(static_cast<unsigned>(rows)), dim3(THREADS), args.capacity * sizeof(uint64_t), stream,
                args);
}

template <typename Score>
bool launch_for(int threads, const SelectArguments<Score>& args, int64_t rows, cudaStream_t stream) {
  // Four vectors per thread and four more on their way: 64 KiB in flight per SM. At 64 registers a thread, that is
  // half of an SM's threads.
  switch (threads) {
    case 256:
      launch<Score, 256, 4, 4>(args, rows, stream);
      return true;
    case 1024:
      launch<Score, 1024, 4, 1>(args, rows, stream);
      return true;
#ifdef QSCOPE_EMULATED
    case 64:  // many small chunks: tests reach every path with short rows
      launch<Score, 64, 2, 1>(args, rows, stream);
      return true;
#endif
    default:
      return false;
  }
}

template <typename Score>
bool select(const void* scores, int64_t rows, int64_t row_stride, int64_t columns, int k, bool relu, bool merge,
            int64_t first_column, void* values, int32_t* indices, int threads, cudaStream_t stream) {
  using Storage = typename Score::Storage;
  const SelectArguments<Score> args = {static_cast<const Storage*>(scores), row_stride,
                                       static_cast<uint32_t>(columns),      k,
                                       list_capacity(k),                    relu,
                                       merge,                               static_cast<uint32_t>(first_column),
                                       static_cast<Storage*>(values),       indices};
  return launch_for(threads, args, rows, stream);
}

}  // namespace

// Selects the k largest of every row of scores. dtype: 0 float32, 1 float16, 2 bfloat16. Strides in elements; the last
// dimension is contiguous. threads per row: 256 or 1024. merge: see SelectArguments. values [rows, k] and
// indices [rows, k] are contiguous. Returns a cudaError_t; never waits and never allocates.
extern "C" int qscope_topk_select(const void* scores, int dtype, int64_t rows, int64_t row_stride, int64_t columns,
                                  int k, int relu, int merge, int64_t first_column, void* values, int32_t* indices,
                                  int threads, void* stream) {
  constexpr int64_t LIMIT = int64_t{1} << 31;
  const bool good = k >= 1 && k <= 256 && columns >= (merge ? 1 : k) && first_column >= 0 &&
                    first_column + columns < LIMIT && rows >= 0 && rows < LIMIT;
  if (!good) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  bool known = false;
  if (dtype == 0) {
    known = select<Float32>(scores, rows, row_stride, columns, k, relu, merge, first_column, values, indices, threads, on);
  } else if (dtype == 1) {
    known = select<Float16>(scores, rows, row_stride, columns, k, relu, merge, first_column, values, indices, threads, on);
  } else if (dtype == 2) {
    known = select<BFloat16>(scores, rows, row_stride, columns, k, relu, merge, first_column, values, indices, threads, on);
  }
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}
