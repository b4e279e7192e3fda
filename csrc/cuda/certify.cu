// C entry points of the certified encode up to its candidates; see certify_bounds.cuh and certify.cuh. Each returns a
// cudaError_t, never waits and never allocates. dtype: 0 float32, 1 float16, 2 bfloat16.
#include "certify.cuh"

namespace {

using namespace qscope;

dim3 warps_for(int64_t count) {
  return dim3(static_cast<unsigned>((count + BOUND_THREADS / WARP - 1) / (BOUND_THREADS / WARP)));
}

bool countable(int64_t count) { return count >= 0 && count < (int64_t{1} << 31); }

template <typename Type>
void prepare(const void* W, int64_t F, int64_t D, const float* mu, const double* mean, const float* bias, int weights,
             double scale, uint16_t* high, uint16_t* low, FeatureBound* bounds, float* beta, cudaStream_t stream) {
  const PrepareArguments<Type> args = {static_cast<const typename Type::Storage*>(W),
                                       F, D, mu, mean, bias, static_cast<Weights>(weights), scale, high, low,
                                       bounds, beta};
  QSCOPE_LAUNCH(prepare_features<Type>, warps_for(F), dim3(BOUND_THREADS), 0, stream, args);
}

template <typename Type>
void centre(const void* x, int64_t rows, int64_t row_stride, int64_t D, const float* mu, const double* mean,
            double gamma, double scale, uint16_t* centred, RowBound* bounds, cudaStream_t stream) {
  const CentreArguments<Type> args = {static_cast<const typename Type::Storage*>(x),
                                      rows, row_stride, D, mu, mean, gamma, scale, centred, bounds};
  QSCOPE_LAUNCH(centre_rows<Type>, warps_for(rows), dim3(BOUND_THREADS), 0, stream, args);
}

}  // namespace

// Rounds W [F, D] to bfloat16 and bounds what that loses. high may be null (W is bfloat16 itself), low is used by
// weights == 1; bounds [F] of four floats, beta [F]. mean: |mu| in GPU memory, rounded up.
extern "C" int qscope_exact_prepare(const void* W, int dtype, int64_t F, int64_t D, const float* mu,
                                    const double* mean, const float* bias, int weights, double scale, uint16_t* high,
                                    uint16_t* low, void* bounds, float* beta, void* stream) {
  if (!countable(F) || D < 0 || weights < 0 || weights > 2 || (weights == 1 && low == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (F == 0) return cudaSuccess;
  const auto call = dtype == 0 ? prepare<Float32> : dtype == 1 ? prepare<Float16> : dtype == 2 ? prepare<BFloat16>
                                                                                               : nullptr;
  if (call == nullptr) return cudaErrorInvalidValue;
  call(W, F, D, mu, mean, bias, weights, scale, high, low, static_cast<FeatureBound*>(bounds), beta,
       static_cast<cudaStream_t>(stream));
  return cudaGetLastError();
}

// centred [rows, D] = bfloat16(x - mu), and bounds [rows] of two floats.
extern "C" int qscope_exact_centre(const void* x, int dtype, int64_t rows, int64_t row_stride, int64_t D,
                                   const float* mu, const double* mean, double gamma, double scale, uint16_t* centred,
                                   void* bounds, void* stream) {
  if (!countable(rows) || D < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const auto call = dtype == 0 ? centre<Float32> : dtype == 1 ? centre<Float16> : dtype == 2 ? centre<BFloat16>
                                                                                             : nullptr;
  if (call == nullptr) return cudaErrorInvalidValue;
  call(x, rows, row_stride, D, mu, mean, gamma, scale, centred, static_cast<RowBound*>(bounds),
       static_cast<cudaStream_t>(stream));
  return cudaGetLastError();
}

// Candidates of each row; see CertifyArguments. threads per row: 256, which gives the lists a capacity of 2048.
extern "C" int qscope_exact_certify(const float* scores, int64_t rows, int64_t stride, int64_t columns,
                                    int64_t first_column, int last, int k, const void* row_bounds, const void* bounds,
                                    const float* beta, const void* groups, int32_t* list_column, float* list_low,
                                    float* list_high, int32_t* counts, float* taus, int32_t* feature_counts,
                                    int32_t* flagged, int threads, void* stream) {
  const bool good = countable(rows) && stride % 4 == 0 && stride >= columns && columns > 0 && first_column >= 0 &&
                    first_column % BOUND_GROUP == 0 && first_column + columns < (int64_t{1} << 31) && k >= 1 &&
                    k <= 256 && reinterpret_cast<uintptr_t>(scores) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(beta) % 16 == 0;
  if (!good) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const CertifyArguments args = {scores,      stride,   columns,   first_column, k,      last != 0,
                                 static_cast<const RowBound*>(row_bounds), static_cast<const FeatureBound*>(bounds),
                                 beta,        static_cast<const FeatureBound*>(groups), list_column, list_low,
                                 list_high,   counts,   taus,      feature_counts, flagged};
  const dim3 grid(static_cast<unsigned>(rows));
  const auto on = static_cast<cudaStream_t>(stream);
  if (threads == 256) {
    QSCOPE_LAUNCH(certify_rows<256>, grid, dim3(256), 0, on, args);
#ifdef QSCOPE_EMULATED
  } else if (threads == 64) {  // many small chunks and a list of 512: tests reach every path with short rows
    QSCOPE_LAUNCH(certify_rows<64>, grid, dim3(64), 0, on, args);
#endif
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
