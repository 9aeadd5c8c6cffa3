// distillation_loss: what the vectors of spans differ by, and the gradient of the loss in the student's states. A block works
// on one span, or in the backward on one token, at a time; a thread keeps the same columns throughout.
#include "mtllm/distillation_loss.h"

#include <cmath>

#include "mtllm/rows.cuh"
#include "mtllm/spans.cuh"

namespace mtllm {
namespace {

constexpr int kFigures = 4;  // sums of losses, of cosines, of differences of norms, how many

template <typename T, typename S>
__global__ void __launch_bounds__(kBlock<S>, kMinBlocks<S>)
    distillation_spans_kernel(const SpanSide student, const SpanSide teacher, const LossShape shape, int64_t num_spans,
                              float* sums, float* scratch_rows) {
  __shared__ Vec<float, 4> scratch[kMaxWarps];
  constexpr int ROWS = kHold<S> ? 2 : 1;
  float total[kFigures] = {};
  for (int64_t s = blockIdx.x; s < num_spans; s += gridDim.x) {
    const int width = static_cast<int>(shape.width);
    const int64_t begin = bag_begin(student, s), end = bag_begin(student, s + 1);
    const int64_t teacher_begin = bag_begin(teacher, s), teacher_end = bag_begin(teacher, s + 1);
    if (begin >= end || teacher_begin >= teacher_end) continue;
    Parked<S> x{{}, scratch_rows + static_cast<int64_t>(blockIdx.x) * 2 * width, width};
    x.set(bag_mean<T, S, ROWS>(student, begin, end, width));
    const Columns<S> t = teacher_mean<S, ROWS>(teacher, teacher_begin, teacher_end, width);
    float parts[4] = {};  // l (but for cosine), x * x, t * t, x * t
#pragma unroll
    for (int i = 0; i < S::LOADS; ++i) {
      const Vec<float, S::VEC> own = x.get(i);
#pragma unroll
      for (int v = 0; v < S::VEC; ++v) {
        const float a = own.values[v], b = t.loads[i].values[v];
        const float error = fabsf(a - b);
        if (shape.kind == LossKind::kSmoothL1) {
          parts[0] += error < shape.beta ? 0.5f * error * error / shape.beta : error - 0.5f * shape.beta;
        } else {
          parts[0] += error * error;
        }
        parts[1] += a * a;
        parts[2] += b * b;
        parts[3] += a * b;
      }
    }
    block_sum(parts, scratch);
    const Angles angles = angles_of(parts[1], parts[2], parts[3]);
    total[0] += shape.kind == LossKind::kCosine ? 1.0f - angles.cosine : parts[0] / width;
    total[1] += angles.cosine;
    total[2] += angles.x_norm - angles.t_norm;
    total[3] += 1.0f;
  }
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int n = 0; n < kFigures; ++n) sums[blockIdx.x * kFigures + n] = total[n];
}

// dy += coefficient * (the gradient of l(x, t) in x)
template <typename S>
__device__ void add_gradient(Parked<S>& dy, const Parked<S>& x, const Columns<S>& t, float coefficient,
                             const LossShape& shape, int width) {
  __shared__ Vec<float, 4> scratch[kMaxWarps];
  if (shape.kind != LossKind::kCosine) {
    const bool mse = shape.kind == LossKind::kMse;
    const float limit = mse ? INFINITY : shape.beta;
    coefficient *= mse ? 2.0f / width : 1.0f / (shape.beta * width);
#pragma unroll
    for (int i = 0; i < S::LOADS; ++i) {
      const Vec<float, S::VEC> own = x.get(i);
      Vec<float, S::VEC> sum = dy.get(i);
#pragma unroll
      for (int v = 0; v < S::VEC; ++v) {
        const float error = own.values[v] - t.loads[i].values[v];
        sum.values[v] += coefficient * (error < -limit ? -limit : error > limit ? limit : error);  // NaN stays NaN
      }
      dy.set(i, sum);
    }
    return;
  }
  float parts[4] = {};  // x * x, t * t, x * t, nothing
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i) {
    const Vec<float, S::VEC> own = x.get(i);
#pragma unroll
    for (int v = 0; v < S::VEC; ++v) {
      const float a = own.values[v], b = t.loads[i].values[v];
      parts[0] += a * a;
      parts[1] += b * b;
      parts[2] += a * b;
    }
  }
  block_sum(parts, scratch);
  const Angles angles = angles_of(parts[0], parts[1], parts[2]);
  if (angles.x_norm * angles.t_norm == 0.0f) return;  // a zero vector has no direction
  const float along = angles.cosine / angles.x_norm, across = 1.0f / angles.t_norm;
  coefficient /= angles.x_norm;
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i) {
    const Vec<float, S::VEC> own = x.get(i);
    Vec<float, S::VEC> sum = dy.get(i);
#pragma unroll
    for (int v = 0; v < S::VEC; ++v) sum.values[v] += coefficient * (own.values[v] * along - t.loads[i].values[v] * across);
    dy.set(i, sum);
  }
}

struct BackwardArgs {
  Rows rows;  // the student's
  SpanSide student, teacher;
  LossShape shape;
  const float* grad_loss;
  const float* span_scale;
  const float* grad_pooled;
  const int64_t* token_offsets;
  const int64_t* token_spans;
  float* grad_weight;
  float* scratch_rows;
};

// dh_t = rstd_t (g - xhat_t mean(g xhat_t)) with g = gain * dy_t, dy_t from the token's sentence and its spans.
template <typename T, typename S>
__global__ void __launch_bounds__(kBlock<S>, kMinBlocks<S>)
    distillation_backward_kernel(const BackwardArgs args, T* grad_hidden) {
  __shared__ Vec<float, 1> scratch[kMaxWarps];
  const bool normed = args.rows.weight == nullptr;
  const Chunk c = find_chunk(args.rows, blockIdx.x);
  if (c.begin >= c.end) return;
  const bool alive = c.sentence < args.rows.num_sentences;
  constexpr int ROWS = kHoldToken<S> ? 2 : 1;
  float* memory = args.scratch_rows + static_cast<int64_t>(blockIdx.x) * 2 * args.rows.width;
  for (int token = c.begin; token < c.end; ++token) {
    const int width = args.rows.width;
    const T* row = alive ? row_of<T, S>(args.student, token) : nullptr;  // the tail is not read
    Vec<T, S::VEC> held[S::LOADS];
    if constexpr (kHoldToken<S>) {
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i) held[i] = load_columns<T, S>(row, i, width);
    }
    const auto columns = [&](int i) {
      if constexpr (kHoldToken<S>) return held[i];
      else return load_columns<T, S>(row, i, width);
    };
    float rstd = 1.0f;
    if (alive && !normed) {
      float squares[1] = {};
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i) {
        const Vec<T, S::VEC> h = columns(i);
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) squares[0] += to_float(h.values[v]) * to_float(h.values[v]);
      }
      block_sum(squares, scratch);
      rstd = rsqrtf(squares[0] / width + args.rows.eps);
    }

    Parked<S> dy{{}, memory, width}, x{{}, memory + width, width};
    if constexpr (!kHold<S>) dy.set(Columns<S>{});
    if (alive) {
      const float share = *args.grad_loss / static_cast<float>(c.stop - c.start);
      const float* pooled = args.grad_pooled + static_cast<int64_t>(c.sentence) * width;
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i) {
        Vec<float, S::VEC> part = load_columns<float, S>(pooled, i, width);
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) part.values[v] *= share;
        dy.set(i, part);
      }
    }
    const int64_t stop = alive && args.token_offsets ? args.token_offsets[token + 1] : 0;
    for (int64_t k = stop > 0 ? args.token_offsets[token] : 0; k < stop; ++k) {
      const int64_t s = args.token_spans[k];
      const int64_t begin = bag_begin(args.student, s), end = bag_begin(args.student, s + 1);
      const int64_t teacher_begin = bag_begin(args.teacher, s), teacher_end = bag_begin(args.teacher, s + 1);
      if (teacher_begin >= teacher_end) continue;
      if (S::VEC > 1 && end - begin == 1) {  // single columns have no registers for it
        Columns<S> alone;
#pragma unroll
        for (int i = 0; i < S::LOADS; ++i) {
          const Vec<T, S::VEC> h = columns(i);
#pragma unroll
          for (int v = 0; v < S::VEC; ++v) alone.loads[i].values[v] = to_float(h.values[v]);
        }
        apply_gain<T, S>(alone, args.student, rstd, width);
        x.set(alone);
      } else {
        x.set(bag_mean<T, S, ROWS>(args.student, begin, end, width));
      }
      const Columns<S> t = teacher_mean<S, ROWS>(args.teacher, teacher_begin, teacher_end, width);
      const float coefficient = *args.grad_loss * *args.span_scale / static_cast<float>(end - begin);
      add_gradient<S>(dy, x, t, coefficient, args.shape, width);
    }
    float along[1] = {};
    if (alive && !normed) {
      // The sum over a block's tokens stays in its own row: registers are for the vectors.
      float* grad_weight = args.grad_weight ? args.grad_weight + static_cast<int64_t>(blockIdx.x) * width : nullptr;
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i) {
        const int column = own_column<S>(i);
        if (column >= width) continue;
        const Vec<T, S::VEC> h = columns(i);
        Vec<float, S::VEC> part = dy.get(i);
        if (grad_weight) {
          Vec<float, S::VEC> sum = load_floats<float, S::VEC>(grad_weight + column);
#pragma unroll
          for (int v = 0; v < S::VEC; ++v) sum.values[v] += part.values[v] * to_float(h.values[v]) * rstd;
          store_floats(grad_weight + column, sum);
        }
        const Vec<float, S::VEC> gain = load_gain<T, S::VEC>(args.student, column);
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) {
          part.values[v] *= gain.values[v];
          along[0] += part.values[v] * to_float(h.values[v]);
        }
        dy.set(i, part);
      }
      block_sum(along, scratch);
      along[0] *= rstd * rstd / width;
    }
#pragma unroll
    for (int i = 0; i < S::LOADS; ++i) {
      const int column = own_column<S>(i);
      if (column >= width) continue;
      const Vec<T, S::VEC> h = columns(i);
      Vec<float, S::VEC> out = dy.get(i);
#pragma unroll
      for (int v = 0; v < S::VEC; ++v)
        if (!normed) out.values[v] = rstd * (out.values[v] - to_float(h.values[v]) * along[0]);
      store_floats(grad_hidden + static_cast<int64_t>(token) * width + column, out);
    }
  }
}

// Whether a side's rows can be read S::VEC columns at a time; vec: the most that the student's dtype asks for.
bool wide_rows(const SpanSide& side, int vec) {
  return side.row_stride % vec == 0 && aligned(side.states) && aligned(side.weight);
}

bool wide_rows(const SpanSide& student, const SpanSide& teacher) {
  return wide_rows(teacher, student.dtype == DType::kFloat32 ? 4 : 8);
}

Rows rows_of(const SpanSide& side, const int32_t* cu_seqlens, int64_t tokens, int64_t sentences, int64_t width, int64_t chunk) {
  return {side.states, side.row_stride, side.weight, side.weight_is_float32, cu_seqlens, static_cast<int>(sentences),
          static_cast<int>(tokens), static_cast<int>(width), static_cast<int>(chunk), side.eps};
}

}  // namespace

Status distillation_spans(const SpanSide& student, const SpanSide& teacher, const LossShape& shape, float* sums,
                          float* scratch, int64_t num_spans, int64_t blocks, cudaStream_t stream) {
  if (num_spans == 0) return cudaSuccess;
  const Rows rows = rows_of(student, nullptr, 0, 0, shape.width, 1);
  return dispatch(student.dtype, rows, wide_rows(student, teacher), [&](auto t, auto s) -> Status {
    using T = decltype(t);
    using S = decltype(s);
    if (S::VEC == 1 && shape.width > kMaxUnaligned) return kUnsupportedArgument;
    const int64_t size = block_threads<S>(shape.width);
    distillation_spans_kernel<T, S><<<blocks, size, 0, stream>>>(student, teacher, shape, num_spans, sums, scratch);
    return cudaGetLastError();
  });
}

Status distillation_backward(const SpanSide& student, const SpanSide& teacher, const LossShape& shape,
                             const float* grad_loss, const float* span_scale, const float* grad_pooled,
                             const int32_t* cu_seqlens, const int64_t* token_offsets, const int64_t* token_spans,
                             void* grad_hidden, float* grad_weight, float* scratch, int64_t num_tokens,
                             int64_t num_sentences, int64_t chunk, cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  const Rows rows = rows_of(student, cu_seqlens, num_tokens, num_sentences, shape.width, chunk);
  const BackwardArgs args{rows, student, teacher, shape, grad_loss, span_scale, grad_pooled, token_offsets, token_spans,
                          grad_weight, scratch};
  const bool wide = wide_rows(student, teacher) && aligned(grad_pooled) && aligned(grad_hidden) && aligned(grad_weight);
  return dispatch(student.dtype, rows, wide, [&](auto t, auto s) -> Status {
    using T = decltype(t);
    using S = decltype(s);
    if (S::VEC == 1 && shape.width > kMaxUnaligned) return kUnsupportedArgument;
    const int64_t size = block_threads<S>(shape.width);
    distillation_backward_kernel<T, S><<<slots(rows), size, 0, stream>>>(args, static_cast<T*>(grad_hidden));
    return cudaGetLastError();
  });
}

}  // namespace mtllm
