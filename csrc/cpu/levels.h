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

}  // namespace mtllm::cpu::MTLLM_LEVEL
