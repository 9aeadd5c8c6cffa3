// The span term of distillation_loss: gathers both sides' rows once and writes four sums.
#include "spans.h"

#include "levels.h"
#include "parallel.h"

namespace mtllm::cpu::MTLLM_LEVEL {

void span_sums(const States& student, const SpanTerm& spans, std::int64_t width, float* sums, double* partial,
               float* scratch, int threads) {
  parallel_rows(spans.count, kPieceSpans, threads, [&](std::int64_t start, std::int64_t stop, int thread) {
    float* x = scratch + thread * kScratchRows * width;
    float* t = x + width;
    double* of_piece = partial + start / kPieceSpans * 4;
    for (int i = 0; i < 4; i++) of_piece[i] = 0;
    for (std::int64_t s = start; s < stop; s++) {
      if (!vectors_of(student, spans, s, width, x, t)) continue;
      const Angles angles = angles_of(x, t, width);
      const bool cosine = spans.loss.kind == LossKind::kCosine;
      of_piece[0] += cosine ? 1 - angles.cosine : distance(x, t, width, spans.loss);
      of_piece[1] += angles.cosine;
      of_piece[2] += angles.x_norm - angles.t_norm;
      of_piece[3] += 1;
    }
  });
  double totals[4] = {};
  for (std::int64_t piece = 0; piece * kPieceSpans < spans.count; piece++)
    for (int i = 0; i < 4; i++) totals[i] += partial[piece * 4 + i];
  for (int i = 0; i < 4; i++) sums[i] = static_cast<float>(totals[i]);
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
