// What every entry point takes and gives: pointers, sizes and a stream in, a status out. No exceptions, no exit, no
// torch. The caller has made the pointers' device current.
#pragma once

#include <cuda_runtime.h>

namespace mtllm {

// 0, a cudaError_t, or one of the negative codes below; status_message() says it in words.
using Status = int;
constexpr Status kUnsupportedArgument = -1;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline const char* status_message(Status status) {
  if (status == kUnsupportedArgument) return "an argument is outside of what this kernel supports";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace mtllm
