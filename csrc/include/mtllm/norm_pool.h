// RMSNorm fused with per-sentence pooling over packed tokens; see mtllm_fast/ops/norm_pool/chunks.py for the partition.
#pragma once

#include <cstdint>

#include "mtllm/status.h"

namespace mtllm {

enum class Pooling : int { kMean = 0, kCls = 1, kEos = 2 };

// pooled [B, D] of dtype or null; normed_mean [B, D] fp32 or null; partial [T / chunk + B + 1, D] fp32 (mean only).
// weight is fp32 if weight_is_float32, else of dtype; null, with pooled null too: the states are normed already.
Status norm_pool_forward(DType dtype, const void* hidden_states, std::int64_t row_stride, const void* weight,
                         bool weight_is_float32, const std::int32_t* cu_seqlens, void* pooled, float* normed_mean,
                         float* partial, std::int64_t num_tokens, std::int64_t num_sentences, std::int64_t width,
                         std::int64_t chunk, float eps, Pooling pooling, cudaStream_t stream);

// grad_hidden [T, D] of dtype, contiguous, every element written; grad_pooled [B, D] of dtype, contiguous.
Status norm_pool_backward(DType dtype, const void* grad_pooled, const void* hidden_states, std::int64_t row_stride,
                          const void* weight, bool weight_is_float32, const std::int32_t* cu_seqlens, void* grad_hidden,
                          std::int64_t num_tokens, std::int64_t num_sentences, std::int64_t width, std::int64_t chunk,
                          float eps, Pooling pooling, cudaStream_t stream);

}  // namespace mtllm
