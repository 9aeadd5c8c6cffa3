// csrc's mtllm/mma.cuh for a CPU: the lanes of a warp put their fragments down and each computes its four elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace mtllm {

inline float half_of(uint32_t word, int high, __nv_bfloat16 x) {
  x.bits = static_cast<uint16_t>(word >> (16 * high));
  return __bfloat162float(x);
}
inline float half_of(uint32_t word, int high, __half x) {
  x.bits = static_cast<uint16_t>(word >> (16 * high));
  return __half2float(x);
}

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static uint32_t words[32][32][6];  // per warp and lane
  emulated::Block& block = *emulated::block;
  const int warp = block.current / 32, lane = block.current % 32;
  std::copy_n(a, 4, words[warp][lane]);
  std::copy_n(b, 2, words[warp][lane] + 4);
  emulated::wait(block.warps[warp], 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = words[warp][row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t right = words[warp][column * 4 + k % 8 / 2][4 + k / 8];
      d[i] += half_of(left, k % 2, T{}) * half_of(right, k % 2, T{});
    }
  }
  emulated::wait(block.warps[warp], 32);
}

}  // namespace mtllm
