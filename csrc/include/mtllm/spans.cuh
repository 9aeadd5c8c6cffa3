// Vectors of spans: which of a vector's columns a thread keeps, where they lie, and the mean over a bag of packed rows.
#pragma once

#include <algorithm>
#include <cmath>

#include "mtllm/distillation_loss.h"
#include "mtllm/rows.cuh"

namespace mtllm {

// Wide rows fill the registers: theirs are read again instead of held, and one vector at a time is in registers, the others
// in memory (see Parked). In the backward, which has three vectors, rows of middle width are read again too.
template <typename S>
constexpr bool kHold = S::PER_THREAD < 32;
template <typename S>
constexpr bool kHoldToken = S::PER_THREAD < 16;
template <typename S>
constexpr int kMinBlocks = kHold<S> ? 2 : 1;

// Single columns take twice the registers for addresses and masks, so a block has half the threads, and half the width.
template <typename S>
constexpr int kBlock = S::VEC == 1 ? 256 : S::MAX_THREADS;
constexpr int64_t kMaxUnaligned = 8192;

// The first column of one of this thread's loads. A stride that the compiler knows costs no registers.
template <typename S>
__device__ int own_column(int load) {
  return (load * kBlock<S> + threadIdx.x) * S::VEC;
}

template <typename S>
int64_t block_threads(int64_t width) {
  return std::min<int64_t>(kBlock<S>, divide_up(divide_up(width, S::VEC), kWarp) * kWarp);
}

// This thread's columns of one vector.
template <typename S>
struct Columns {
  Vec<float, S::VEC> loads[S::LOADS];
};

// A vector that waits while another one is made: in registers, or for wide rows in memory that is this block's own.
template <typename S>
struct Parked {
  Columns<S> columns;
  float* memory;
  int width;

  __device__ Vec<float, S::VEC> get(int load) const {
    if constexpr (kHold<S>) return columns.loads[load];
    const int column = own_column<S>(load);
    return column < width ? load_floats<float, S::VEC>(memory + column) : Vec<float, S::VEC>{};
  }
  __device__ void set(int load, const Vec<float, S::VEC>& vector) {
    if constexpr (kHold<S>) {
      columns.loads[load] = vector;
    } else if (own_column<S>(load) < width) {
      store_floats(memory + own_column<S>(load), vector);
    }
  }
  __device__ void set(const Columns<S>& vectors) {
#pragma unroll
    for (int i = 0; i < S::LOADS; ++i) set(i, vectors.loads[i]);
  }
};

struct Angles {
  float x_norm, t_norm, cosine;  // the cosine is 0 with a zero vector
};

// The gain as it stands in memory; 1 where there is none.
template <typename U, int VEC>
__device__ Vec<float, VEC> load_gain(const SpanSide& side, int column) {
  if (side.weight_is_float32) return load_floats<float, VEC>(static_cast<const float*>(side.weight) + column);
  return load_floats<U, VEC>(static_cast<const U*>(side.weight) + column);
}

// mean *= scale * gain
template <typename U, typename S>
__device__ void apply_gain(Columns<S>& mean, const SpanSide& side, float scale, int width) {
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i) {
    const int column = own_column<S>(i);
    if (column >= width) continue;
    if (side.weight) {
      const Vec<float, S::VEC> gain = load_gain<U, S::VEC>(side, column);
#pragma unroll
      for (int v = 0; v < S::VEC; ++v) mean.loads[i].values[v] *= gain.values[v] * scale;
    } else {
#pragma unroll
      for (int v = 0; v < S::VEC; ++v) mean.loads[i].values[v] *= scale;
    }
  }
}

template <typename U, typename S>
__device__ const U* row_of(const SpanSide& side, int64_t row) {
  return static_cast<const U*>(side.states) + row * side.row_stride;
}

template <typename U, typename S>
__device__ Vec<U, S::VEC> load_columns(const U* row, int load, int width) {
  const int column = own_column<S>(load);
  return row && column < width ? *reinterpret_cast<const Vec<U, S::VEC>*>(row + column) : Vec<U, S::VEC>{};
}

// The mean of y over the rows begin to end of a side's indices; ROWS are in flight.
template <typename U, typename S, int ROWS>
__device__ Columns<S> bag_mean(const SpanSide& side, int64_t begin, int64_t end, int width) {
  __shared__ Vec<float, ROWS> scratch[kMaxWarps];
  Columns<S> sum = {};
  for (int64_t first = begin; first < end; first += ROWS) {
    const U* rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = first + r;
      rows[r] = at < end ? row_of<U, S>(side, side.offsets ? side.indices[at] : at) : nullptr;
    }
    Vec<U, S::VEC> held[ROWS][S::LOADS];
    if constexpr (kHold<S>) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < S::LOADS; ++i) held[r][i] = load_columns<U, S>(rows[r], i, width);
    }
    const auto columns = [&](int r, int i) {
      if constexpr (kHold<S>) return held[r][i];
      else return load_columns<U, S>(rows[r], i, width);
    };
    float squares[ROWS] = {};
    if (side.weight) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < S::LOADS; ++i) {
          const Vec<U, S::VEC> h = columns(r, i);
#pragma unroll
          for (int v = 0; v < S::VEC; ++v) squares[r] += to_float(h.values[v]) * to_float(h.values[v]);
        }
      block_sum(squares, scratch);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float rstd = side.weight ? rsqrtf(squares[r] / width + side.eps) : 1.0f;
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i) {
        const Vec<U, S::VEC> h = columns(r, i);
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) sum.loads[i].values[v] += to_float(h.values[v]) * rstd;
      }
    }
  }
  apply_gain<U, S>(sum, side, 1.0f / static_cast<float>(end - begin), width);
  return sum;
}

// The same for the teacher, whose dtype may be another.
template <typename S, int ROWS>
__device__ Columns<S> teacher_mean(const SpanSide& side, int64_t begin, int64_t end, int width) {
  if (side.dtype == DType::kFloat32) return bag_mean<float, S, ROWS>(side, begin, end, width);
  if (side.dtype == DType::kFloat16) return bag_mean<__half, S, ROWS>(side, begin, end, width);
  return bag_mean<__nv_bfloat16, S, ROWS>(side, begin, end, width);
}

__device__ inline int64_t bag_begin(const SpanSide& side, int64_t s) { return side.offsets ? side.offsets[s] : s; }

__device__ inline Angles angles_of(float xx, float tt, float xt) {
  Angles a{sqrtf(xx), sqrtf(tt), 0.0f};
  const float product = a.x_norm * a.t_norm;
  if (product != 0.0f) a.cosine = xt / product;
  return a;
}

}  // namespace mtllm
