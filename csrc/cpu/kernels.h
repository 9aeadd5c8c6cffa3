// What every kernel for the CPU takes: addresses, sizes and a number of threads. No torch, no Python, no exceptions.
// All levels (instruction sets) offer the same table of kernels; dispatch.cpp picks one.
#pragma once

#include <cstdint>

namespace mtllm::cpu {

using Status = int;
constexpr Status kUnsupportedArgument = -1;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Pooling : int { kMean = 0, kCls = 1, kEos = 2 };
enum class LossKind : int { kMse = 0, kSmoothL1 = 1, kCosine = 2 };

// Tokens per piece of work; fixed, so that a result depends on no number of threads.
constexpr std::int64_t kPieceTokens = 64;
constexpr std::int64_t kPieceSpans = 64;
constexpr std::int64_t kScratchRows = 7;  // per thread, of the backward

// Rows of states [T, width] with adjacent columns, and how a row h becomes the vector y that is compared:
// y = weight * h * rsqrt(mean(h^2) + eps), or h itself where there is no norm.
struct States {
  DType dtype;
  const void* data;
  std::int64_t row_stride;
  const float* weight;  // null: the states are normed already
  float eps;
};

// Bags of rows in CSR form; without offsets, bag s is row s.
struct Bags {
  const std::int64_t* indices;
  const std::int64_t* offsets;
};

struct Sentences {
  const std::int32_t* ends;  // cu_seqlens [count + 1]
  std::int64_t count;
  std::int64_t tokens;  // of all rows, those after the last sentence too
  std::int64_t width;
};

struct Loss {
  LossKind kind;
  float beta;
};

struct SpanTerm {
  States teacher;
  Bags student_bags;
  Bags teacher_bags;
  std::int64_t count;
  Loss loss;
  const std::int64_t* token_offsets;  // backward only: CSR of the spans of each of the student's tokens
  const std::int64_t* token_spans;
  float scale;  // backward only: what a span's loss counts for in the scalar that is differentiated
};

// Rows [tokens, heads, width] with adjacent columns; heads is 1 for whole states.
struct Heads {
  DType dtype;
  const void* data;
  std::int64_t token_stride, head_stride;
  std::int64_t tokens, heads, width;
};

// Floats of scratch per thread of `attention`; the vectors of no level are wider than 16 floats.
constexpr std::int64_t attention_scratch(std::int64_t longest, std::int64_t width) {
  return width * (2 * longest + 16) + 4 * (2 * width + longest + 16);
}

struct Kernels {
  // mean [count, width] = the share-weighted sum of normed rows without the gain; partial
  // [tokens / kPieceTokens + count, width] is scratch for mean pooling.
  void (*pool)(const States&, const Sentences&, Pooling, float* mean, float* partial, int threads);
  // sums [4] = over spans with tokens on both sides: loss, cosine, |x| - |t|, how many.
  // partial: doubles [ceil(spans / kPieceSpans), 4]; scratch: floats [threads, kScratchRows, width].
  void (*span_sums)(const States& student, const SpanTerm&, std::int64_t width, float* sums, double* partial,
                    float* scratch, int threads);
  // grad_hidden [tokens, width] of the states' dtype, contiguous, every element written once, from grad_pooled
  // [count, width], the gradient of one token's y (null: none), and from spans (null: none). grad_weight [width] or
  // null, with by_piece [tokens / kPieceTokens + count + 1, width]. scratch as above.
  void (*backward)(const States&, const Sentences&, Pooling, const float* grad_pooled, const SpanTerm* spans,
                   void* grad_hidden, float* grad_weight, float* by_piece, float* scratch, int threads);
  // normed = weight * s * rstd, s = x (+ residual, rounded, written to summed); normed, summed and rstd [tokens, heads, ...]
  // are contiguous.
  void (*rms_norm)(const Heads& x, const Heads* residual, const float* weight, float eps, void* normed, void* summed,
                   float* rstd, int threads);
  // grad, contiguous, in the states' dtype, of the x that was normed; grad_summed may be null. grad_weight
  // [ceil(rows / kPieceTokens), width], to be summed over the pieces, or null.
  void (*rms_norm_backward)(const Heads& grad_normed, const Heads* grad_summed, const Heads& x, const float* weight,
                            const float* rstd, void* grad, float* grad_weight, int threads);
  // out, its heads adjacent, = x rotated by sign * the angles of the tables [tokens, >= width / 2].
  void (*rope)(const Heads& x, const float* cos, const float* sin, std::int64_t table_stride, float sign, void* out,
               std::int64_t out_token_stride, int threads);
  // out = silu(gate) * up; one head each, rows of out as far apart as said.
  void (*swiglu)(const Heads& gate, const Heads& up, void* out, std::int64_t out_stride, int threads);
  void (*swiglu_backward)(const Heads& grad, const Heads& gate, const Heads& up, void* grad_gate,
                          std::int64_t gate_stride, void* grad_up, std::int64_t up_stride, int threads);
  // out [tokens, q.heads, width], contiguous, = softmax(scale q k^T) v within each sentence of up to `longest` tokens; rows
  // of longer sentences and of the tail are not written. width is a multiple of 16. scratch: attention_scratch per thread.
  void (*attention)(const Heads& q, const Heads& k, const Heads& v, const Sentences&, std::int64_t longest, float scale,
                    void* out, float* scratch, int threads);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

// The level's kernels, or null if this build or this processor lacks it. Levels count up from 0, the baseline.
const Kernels* kernels_of(int level);

}  // namespace mtllm::cpu
