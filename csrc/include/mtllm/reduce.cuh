// Sums over a warp and over a block, always in the same order.
#pragma once

#include "mtllm/vec.cuh"

namespace mtllm {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sums N values at once over the block, for the price of one; every thread gets the sums. scratch: kMaxWarps rows.
template <int N>
__device__ void block_sum(float (&x)[N], Vec<float, N>* scratch) {
  Vec<float, N> sums;
#pragma unroll
  for (int n = 0; n < N; ++n) sums.values[n] = warp_sum(x[n]);
  __syncthreads();  // the sums of the previous call have been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sums;
  __syncthreads();
  sums = scratch[0];
#pragma unroll 2  // more would cost registers that the rows in flight need
  for (int warp = 1; warp < blockDim.x / kWarp; ++warp) {
    const Vec<float, N> other = scratch[warp];
#pragma unroll
    for (int n = 0; n < N; ++n) sums.values[n] += other.values[n];
  }
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = sums.values[n];
}

}  // namespace mtllm
