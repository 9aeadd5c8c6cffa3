// The kernels of the level that is being compiled.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace mtllm::cpu::MTLLM_LEVEL {

void pool(const States&, const Sentences&, Pooling, float* mean, float* partial, int threads);
void span_sums(const States& student, const SpanTerm&, std::int64_t width, float* sums, double* partial, float* scratch,
               int threads);
void backward(const States&, const Sentences&, Pooling, const float* grad_pooled, const SpanTerm*, void* grad_hidden,
              float* grad_weight, float* by_piece, float* scratch, int threads);
void rms_norm(const Heads& x, const Heads* residual, const float* weight, float eps, void* normed, void* summed, float* rstd,
              int threads);
void rms_norm_backward(const Heads& grad_normed, const Heads* grad_summed, const Heads& x, const float* weight,
                       const float* rstd, void* grad, float* grad_weight, int threads);
void rope(const Heads& x, const float* cos, const float* sin, std::int64_t table_stride, float sign, void* out,
          std::int64_t out_token_stride, int threads);
void swiglu(const Heads& gate, const Heads& up, void* out, std::int64_t out_stride, int threads);
void swiglu_backward(const Heads& grad, const Heads& gate, const Heads& up, void* grad_gate, std::int64_t gate_stride,
                     void* grad_up, std::int64_t up_stride, int threads);
void attention(const Heads& q, const Heads& k, const Heads& v, const Sentences&, std::int64_t longest, float scale, void* out,
               float* scratch, int threads);

}  // namespace mtllm::cpu::MTLLM_LEVEL
