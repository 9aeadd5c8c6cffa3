// N values of type T that move together, in loads and stores of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mtllm {

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T values[N];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// A load of data that this kernel reads once: it leaves the cache first.
template <typename T, int N>
__device__ Vec<T, N> load_streaming(const T* address) {
  if constexpr (sizeof(Vec<T, N>) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
    return reinterpret_cast<const Vec<T, N>&>(bits);
  } else {
    return *reinterpret_cast<const Vec<T, N>*>(address);
  }
}

template <typename T, int N>
__device__ Vec<float, N> load_floats(const T* address) {
  const Vec<T, N> loaded = *reinterpret_cast<const Vec<T, N>*>(address);
  Vec<float, N> floats;
#pragma unroll
  for (int n = 0; n < N; ++n) floats.values[n] = to_float(loaded.values[n]);
  return floats;
}

template <typename T, int N>
__device__ void store_floats(T* address, const Vec<float, N>& floats) {
  Vec<T, N> rounded;
#pragma unroll
  for (int n = 0; n < N; ++n) rounded.values[n] = from_float<T>(floats.values[n]);
  *reinterpret_cast<Vec<T, N>*>(address) = rounded;
}

}  // namespace mtllm
