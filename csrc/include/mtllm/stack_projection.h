// The stack's first stage on half-precision states: products for few tokens, and what follows a product of any size.
// Composite, order of its rows and formulas: mtllm_fast/ops/stack_projection/composite.py and reference.py.
#pragma once

#include <cstdint>

#include "mtllm/status.h"

namespace mtllm {

// What is the same for every call on one set of weights. N = heads * head_dim columns, the first num_rotated are rotated.
struct StackShape {
  std::int64_t num_tokens, width, columns, num_rotated, head_dim;  // T, D, N
  float eps;
};

// Rotary tables of dtype, or float32 if is_float32; cos null: no rotation. position_ids int64 [T] or null: row t is t.
struct RopeTables {
  const void* cos;
  const void* sin;
  std::int64_t row_stride;
  bool is_float32;
  const std::int64_t* position_ids;
};

// x [T, D] of dtype, raw [T, N] fp32 = e (weight + residual)^T, squares [D / 32 rounded up, T] fp32: sums of x * x over 32
// columns. Each weight is read once per 32 tokens. up_bias (of dtype, or fp32) and residual may be null. d % 8 == 0.
Status stack_products(DType dtype, const void* states, std::int64_t d, const void* up_weight, const void* up_bias,
                      bool up_bias_is_float32, const void* weight, const void* residual, void* x, float* raw,
                      float* squares, const StackShape& shape, cudaStream_t stream);

// qkv [T, N] of dtype = rope(rstd * (raw + bias) + qkv_bias), in the order of the heads, and rstd [T]. squares null: the
// sums are taken from x. qkv_bias may be null. D, head_dim % 8 == 0.
Status stack_epilogue(DType dtype, const void* x, const float* squares, const float* raw, const float* bias,
                      const float* qkv_bias, const RopeTables& rope, void* qkv, float* rstd, const StackShape& shape, cudaStream_t stream);

// grad_hidden [T, D] and grad_raw [T, N] (interleaved) of dtype; every element written.
Status stack_backward(DType dtype, const void* grad_x, const void* grad_qkv, const void* x, const void* qkv,
                      const float* rstd, const float* qkv_bias, const RopeTables& rope, void* grad_hidden, void* grad_raw,
                      const StackShape& shape, cudaStream_t stream);

}  // namespace mtllm
