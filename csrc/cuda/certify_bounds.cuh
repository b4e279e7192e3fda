// Certified encode, part 1: what the bound on the error of a low-precision score is made of.
//
// Score: s = float32(S64 + b), S64 the dot product of x and w in float64, 16 chains and a tree (rescore.cuh).
// Pass:  p = tensor-core product of q = bfloat16(float32(x - mu)) with v = bfloat16(w), summed in float32;
//        beta = float32(mu . w + b).
// Theorem: for every row and feature in range, |s - (p + beta)| <= A |w| + B |w - v| + C with
//   A = |x - mu - q| + (gamma + 8u) |q| + delta (|q| + |x - mu - q| + |mu|)
//   B = (1 + gamma + 8u) |q|
//   C = e |mu| |w| + 8u |beta| + tiny
// where u = 2^-24, delta bounds the float64 chains of S64, e the float64 sum mu . w, tiny what underflow can add up to.
// Proof: x.w = q.v + q.(w - v) + (x - mu - q).w + mu.w, each product bounded by norms (Cauchy-Schwarz), and |v| is
// at most |w| + |w - v|. The multiples of u cover roundings proportional to p and beta: two additions of float32 on
// the way to an interval, the rounding of beta and that of s, five at most. kSafe covers the evaluation of the bound.
//
// Assumption about the hardware, not about the data: the sum of p is wrong by at most gamma |q| |v|. A tensor core
// shifts a block of products and the accumulator to the largest exponent among them, cuts off what falls below its
// adder, adds, and cuts the sum to 24 bits; studies (Fasi et al., PeerJ Computer Science 330; Khattak and Mikaitis,
// arXiv 2512.07004) find such adders, a few bits wider than a float32. With blocks of 8 and 1 bit more (taken for 8.x)
// a step of 16 products loses less than 2^-19 of the largest magnitude so far, with blocks of 16 and 2 bits more (9.0)
// less than 2^-20; |q| |v| bounds that magnitude. gamma is (D / 16 + 16) times the loss of a step. A test on a GPU
// measures it.
//
// "In range" is norms up to 2^60: no product overflows. A feature out of range, or not finite, is a candidate of every
// row; a row out of range is scored in full.
#pragma once

#include <cmath>

#include "select_common.cuh"

namespace qscope {

constexpr int BOUND_THREADS = 256;
constexpr int BOUND_GROUP = 64;  // features that share one coarse bound
constexpr double kUnit = 0x1p-24;
constexpr double kSafe = 1 + 0x1p-17;
constexpr double kLargest = 0x1p60;

struct FeatureBound {
  float norm, lost, beta, constant;  // |w| (infinite out of range), |w - v|, beta, C: each rounded up except beta
};

struct RowBound {
  float A, B;  // A is infinite for a row out of range
};

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) < infinity(); }

// The smallest float not below a value from 0 to the largest float.
__device__ __forceinline__ float round_up(double value) {
  const float near = static_cast<float>(value);
  return static_cast<double>(near) < value ? __uint_as_float(__float_as_uint(near) + 1) : near;
}

// To nearest even. A NaN stays one, what is too large becomes infinite.
__device__ __forceinline__ uint16_t to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return BFloat16::lane(bits, 0); }

// A stored element as float32, exactly.
template <typename Type>
__device__ __forceinline__ float widen(const typename Type::Storage* values, int64_t at) {
  return Type::lane(Type::bits(values[at]), 0);
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}

// Which weights are meant: WHOLE ones (v and what it lost), the pair v + bfloat16(w - v), or v alone.
enum class Weights : int { WHOLE = 0, PAIR = 1, HIGH = 2 };

template <typename Type>
struct PrepareArguments {
  const typename Type::Storage* W;  // [F, D] contiguous
  int64_t features, D;
  const float* mu;      // [D]
  const double* mean;   // |mu|, rounded up
  const float* bias;    // [F] or null
  Weights weights;
  double scale;         // of the bound: 1, less in tests
  uint16_t* high;       // [F, D] or null
  uint16_t* low;        // [F, D], PAIR only
  FeatureBound* bounds;  // [F]
  float* beta;           // [F]
};

// One warp per feature. W is read once.
template <typename Type>
__global__ void __launch_bounds__(BOUND_THREADS) prepare_features(const PrepareArguments<Type> args) {
  const int lane = threadIdx.x % WARP;
  const int64_t f = static_cast<int64_t>(blockIdx.x) * (BOUND_THREADS / WARP) + threadIdx.x / WARP;
  if (f >= args.features) return;
  double norm = 0, lost = 0, dot = 0;
#pragma unroll 4
  for (int64_t d = lane; d < args.D; d += WARP) {
    const int64_t at = f * args.D + d;
    const float whole = widen<Type>(args.W, at);
    const uint16_t high = to_bfloat16(whole);
    const float rest = whole - from_bfloat16(high);  // exact
    double meant = whole, missing = rest;
    if (args.weights == Weights::PAIR) {
      const uint16_t low = to_bfloat16(rest);
      args.low[at] = low;
      missing = from_bfloat16(low);
      meant = static_cast<double>(from_bfloat16(high)) + missing;
    } else if (args.weights == Weights::HIGH) {
      meant = from_bfloat16(high);
      missing = 0;
    }
    if (args.high != nullptr) args.high[at] = high;
    norm = fma(meant, meant, norm);
    lost = fma(missing, missing, lost);
    dot = fma(meant, static_cast<double>(args.mu[d]), dot);
  }
  norm = sqrt(warp_sum(norm)) * kSafe;
  lost = sqrt(warp_sum(lost)) * kSafe;
  dot = warp_sum(dot);
  if (lane != 0) return;
  const double D = static_cast<double>(args.D);
  const double beta = dot + (args.bias == nullptr ? 0.0 : static_cast<double>(args.bias[f]));
  const double constant = ((D / 32 + 16) * 0x1p-52 * *args.mean * norm + 8 * kUnit * fabs(beta) +
                           (4 * D + 16) * 0x1p-126) * kSafe * args.scale;
  FeatureBound bound = {infinity(), 0.0f, 0.0f, 0.0f};
  if (norm <= kLargest && lost <= kLargest && fabs(beta) <= kLargest * 0x1p40) {  // all false for NaN
    bound = {round_up(norm), round_up(lost), static_cast<float>(beta), round_up(constant)};
  }
  args.bounds[f] = bound;
  args.beta[f] = bound.beta;
}

template <typename Type>
struct CentreArguments {
  const typename Type::Storage* x;  // row n starts at n * row_stride
  int64_t rows, row_stride, D;
  const float* mu;
  const double* mean;
  double gamma, scale;
  uint16_t* centred;  // [rows, D]
  RowBound* bounds;   // [rows]
};

// One warp per row.
template <typename Type>
__global__ void __launch_bounds__(BOUND_THREADS) centre_rows(const CentreArguments<Type> args) {
  const int lane = threadIdx.x % WARP;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (BOUND_THREADS / WARP) + threadIdx.x / WARP;
  if (n >= args.rows) return;
  double norm = 0, lost = 0;
#pragma unroll 4
  for (int64_t d = lane; d < args.D; d += WARP) {
    const float value = widen<Type>(args.x, n * args.row_stride + d), mean = args.mu[d];
    const uint16_t q = to_bfloat16(value - mean);
    args.centred[n * args.D + d] = q;
    const double kept = from_bfloat16(q), rest = static_cast<double>(value) - static_cast<double>(mean) - kept;
    norm = fma(kept, kept, norm);
    lost = fma(rest, rest, lost);
  }
  const double q = sqrt(warp_sum(norm)) * kSafe, mean = *args.mean;
  // The second term: the two subtractions that make `rest` are rounded.
  const double r = sqrt(warp_sum(lost)) * kSafe + 0x1p-50 * (q + mean);
  if (lane != 0) return;
  const double delta = (static_cast<double>(args.D) / 16 + 16) * 0x1p-52, safe = kSafe * args.scale;
  RowBound bound = {infinity(), infinity()};
  if (q + r + mean <= kLargest) {
    bound.A = round_up((r + (args.gamma + 8 * kUnit) * q + delta * (q + r + mean)) * safe);
    bound.B = round_up((1 + args.gamma + 8 * kUnit) * q * safe);
  }
  args.bounds[n] = bound;
}

}  // namespace qscope
