// Kernels with the faults that the emulator must report, and what it must get right; see test_emulator.py.
#include "../../csrc/cuda/device.cuh"

namespace {

// Kind 0: correct. 1: a barrier in a branch. 2: two different barriers. 3: a lane missing at a warp barrier.
// 4: a thread returns early. 5: reads one element too far. 6: shared memory is read before it is written.
__global__ void faulty(int kind, const uint32_t* in, uint32_t* out, int size) {
  __shared__ uint32_t shared[64];
  __shared__ uint32_t sum;
  const int i = threadIdx.x;
  if (kind == 4 && i == 5) return;
  if (kind == 6) {
    out[i] = shared[i];
    return;
  }
  if (i == 0) sum = 0;
  shared[i] = in[kind == 5 ? i + 1 : i];
  if (kind == 1) {
    if (i < 40) __syncthreads();
  } else if (kind == 2) {
    if (i < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  if (kind == 3 && i == 40) return;
  const uint32_t of_warp = __reduce_add_sync(0xffffffffu, shared[i]);
  if (i % 32 == 0) atomicAdd(&sum, of_warp);
  const int odd = __syncthreads_count(shared[i] & 1);
  const uint32_t left = __shfl_up_sync(0xffffffffu, shared[i], 1);
  const uint32_t ballot = __ballot_sync(0xffffffffu, shared[i] & 1);
  out[i] = sum + static_cast<uint32_t>(odd) + left + ballot + shared[size - 1 - i];
}

}  // namespace

extern "C" void emulator_run(int kind, const uint32_t* in, uint32_t* out) {
  QSCOPE_LAUNCH(faulty, dim3(2), dim3(64), 0, nullptr, kind, in, out, 64);
}

extern "C" float emulator_half_to_float(uint16_t bits) { return qscope::half_to_float(bits); }
extern "C" uint16_t emulator_float_to_half(float value) { return qscope::float_to_half(value); }
