// The span term of distillation_loss, and the gradient of the whole loss in the student's states. The specification:
// mtllm_fast/ops/distillation_loss/reference.py; the partition of the backward: mtllm_fast/ops/norm_pool/chunks.py.
#pragma once

#include <cstdint>

#include "mtllm/status.h"

namespace mtllm {

// One model's S bags of packed rows: bag s has the rows indices[offsets[s] : offsets[s + 1]], or, where offsets is null, row
// s alone. weight is fp32 if weight_is_float32, else of dtype; null: the states are normed already.
struct SpanSide {
  DType dtype;
  const void* states;
  std::int64_t row_stride;
  const void* weight;
  bool weight_is_float32;
  float eps;
  const std::int64_t* indices;
  const std::int64_t* offsets;
};

enum class LossKind : int { kMse = 0, kSmoothL1 = 1, kCosine = 2 };

struct LossShape {
  LossKind kind;
  float beta;
  std::int64_t width;
};

// sums [blocks, 4] fp32, whose sums over the blocks are, over the spans with tokens on both sides: the losses, the cosines,
// |x| - |t|, how many. scratch [blocks, 2, D] fp32, of which only wide rows use some.
Status distillation_spans(const SpanSide& student, const SpanSide& teacher, const LossShape& shape, float* sums,
                          float* scratch, std::int64_t num_spans, std::int64_t blocks, cudaStream_t stream);

// grad_hidden [T, D] of the student's dtype, contiguous, every element written; grad_pooled [B, D], grad_loss and span_scale
// are fp32. The spans of token t are token_spans[token_offsets[t] : token_offsets[t + 1]]; token_offsets null: no spans.
// grad_weight [T / chunk + B + 1, D] fp32, zero before, or null: its sum over the slots is the gain's gradient.
// scratch [T / chunk + B + 1, 2, D] fp32, as above.
Status distillation_backward(const SpanSide& student, const SpanSide& teacher, const LossShape& shape,
                             const float* grad_loss, const float* span_scale, const float* grad_pooled,
                             const std::int32_t* cu_seqlens, const std::int64_t* token_offsets,
                             const std::int64_t* token_spans, void* grad_hidden, float* grad_weight,
                             float* scratch, std::int64_t num_tokens, std::int64_t num_sentences,
                             std::int64_t chunk, cudaStream_t stream);

}  // namespace mtllm
