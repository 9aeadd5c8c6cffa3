// norm_pool: pooled[b] = sum_t r_t * weight * h_t * rstd_t over the tokens t of sentence b, with r_t = 1/L_b (mean), or 1 for
// the one token taken (cls, eos). One block works on one chunk of a sentence; a thread keeps the same columns throughout.
#include "mtllm/norm_pool.h"

#include <algorithm>

#include "mtllm/rows.cuh"

namespace mtllm {
namespace {

constexpr int kCombineThreads = 256;

struct Args : Rows {
  Pooling pooling;
};

__device__ Chunk find_token(const Args& args, int sentence) {
  Chunk c{sentence, 0, args.cu_seqlens[sentence], args.cu_seqlens[sentence + 1], 0, 0};
  c.begin = args.pooling == Pooling::kCls ? c.start : c.stop - 1;
  c.end = c.start < c.stop ? c.begin + 1 : c.begin;
  return c;
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::MAX_THREADS, S::MIN_BLOCKS)
    norm_pool_forward_kernel(const Args args, T* pooled, float* normed_mean, float* partial) {
  __shared__ Vec<float, S::ROWS> scratch[kMaxWarps];
  const bool mean = args.pooling == Pooling::kMean;
  const Chunk c = mean ? find_chunk(args, blockIdx.x) : find_token(args, blockIdx.x);
  if (c.sentence == args.num_sentences || (c.index > 0 && c.begin >= c.stop)) return;

  // States that are normed already come with eps = 1: their rstd is 1, without a branch that would cost registers.
  const float normed = args.weight ? 1.0f : 0.0f;
  Vec<float, S::VEC> sum[S::LOADS] = {};
  for (int t = c.begin; t < c.end; t += S::ROWS) {
    Vec<T, S::VEC> rows[S::ROWS][S::LOADS];
    load_rows<T, S>(rows, args, t, [&](int token) { return token < c.end; });
    float squares[S::ROWS] = {};
#pragma unroll
    for (int r = 0; r < S::ROWS; ++r)
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i)
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) {
          const float x = to_float(rows[r][i].values[v]);
          squares[r] += x * x;
        }
    block_sum(squares, scratch);
#pragma unroll
    for (int r = 0; r < S::ROWS; ++r) {
      const float rstd = t + r < c.end ? rsqrtf(normed * squares[r] / args.width + args.eps) : 0.0f;
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i)
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) sum[i].values[v] += to_float(rows[r][i].values[v]) * rstd;
    }
  }

  const bool whole = !mean || c.stop - c.start <= args.chunk;
  const float scale = mean && c.stop > c.start ? 1.0f / static_cast<float>(c.stop - c.start) : 1.0f;
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i) {
    const int column = column_of<S>(i);
    if (column >= args.width) continue;
    if (!whole) {
      store_floats(partial + static_cast<int64_t>(blockIdx.x) * args.width + column, sum[i]);
      continue;
    }
    const int64_t out = static_cast<int64_t>(c.sentence) * args.width + column;
#pragma unroll
    for (int v = 0; v < S::VEC; ++v) sum[i].values[v] *= scale;
    if (normed_mean) store_floats(normed_mean + out, sum[i]);
    if (!pooled) continue;
    const Vec<float, S::VEC> weight = load_weight<T, S::VEC>(args, column);
#pragma unroll
    for (int v = 0; v < S::VEC; ++v) sum[i].values[v] *= weight.values[v];
    store_floats(pooled + out, sum[i]);
  }
}

// Adds up the chunks of each sentence of several. A block of (columns, lanes) threads: lane l takes chunks l, l + lanes, ...
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    norm_pool_combine_kernel(const Args args, const float* partial, T* pooled, float* normed_mean) {
  __shared__ float scratch[kCombineThreads];
  const int b = blockIdx.x;
  const int start = args.cu_seqlens[b], length = args.cu_seqlens[b + 1] - start;
  if (length <= args.chunk) return;
  const int64_t slot = start / args.chunk + b;
  const int chunks = (length + args.chunk - 1) / args.chunk;
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  float sum = 0.0f;
  if (column < args.width) {
#pragma unroll 8
    for (int i = threadIdx.y; i < chunks; i += blockDim.y) sum += partial[(slot + i) * args.width + column];
  }
  scratch[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= args.width) return;
  for (int lane = 1; lane < blockDim.y; ++lane) sum += scratch[lane * blockDim.x + threadIdx.x];
  sum *= 1.0f / static_cast<float>(length);
  const int64_t out = static_cast<int64_t>(b) * args.width + column;
  if (pooled) pooled[out] = from_float<T>(sum * load_weight<T, 1>(args, column).values[0]);
  if (normed_mean) normed_mean[out] = sum;
}

// grad_h_t = rstd_t * (g - h_t * rstd_t^2 * <g, h_t> / D) with g = r_t * weight * grad_pooled[b]; each row is written once.
template <typename T, typename S>
__global__ void __launch_bounds__(S::MAX_THREADS, S::MIN_BLOCKS)
    norm_pool_backward_kernel(const Args args, const T* grad_pooled, T* grad_hidden) {
  __shared__ Vec<float, 2 * S::ROWS> scratch[kMaxWarps];
  const Chunk c = find_chunk(args, blockIdx.x);
  if (c.begin >= c.end) return;
  const bool alive = c.sentence < args.num_sentences;
  const bool mean = args.pooling == Pooling::kMean;
  const int taken = args.pooling == Pooling::kCls ? c.start : c.stop - 1;
  const float r_t = mean ? 1.0f / static_cast<float>(c.stop - c.start) : 1.0f;

  Vec<float, S::VEC> g[S::LOADS] = {};
#pragma unroll
  for (int i = 0; i < S::LOADS; ++i) {
    const int column = column_of<S>(i);
    if (!alive || column >= args.width) continue;
    g[i] = load_floats<T, S::VEC>(grad_pooled + static_cast<int64_t>(c.sentence) * args.width + column);
    const Vec<float, S::VEC> weight = load_weight<T, S::VEC>(args, column);
#pragma unroll
    for (int v = 0; v < S::VEC; ++v) g[i].values[v] *= weight.values[v] * r_t;
  }

  const auto contributes = [&](int token) { return alive && token < c.end && (mean || token == taken); };
  for (int t = c.begin; t < c.end; t += S::ROWS) {
    Vec<T, S::VEC> rows[S::ROWS][S::LOADS];
    load_rows<T, S>(rows, args, t, contributes);
    float sums[2 * S::ROWS] = {};  // of h * h and of g * h, row by row
#pragma unroll
    for (int r = 0; r < S::ROWS; ++r)
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i)
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) {
          const float x = to_float(rows[r][i].values[v]);
          sums[2 * r] += x * x;
          sums[2 * r + 1] += g[i].values[v] * x;
        }
    block_sum(sums, scratch);
#pragma unroll
    for (int r = 0; r < S::ROWS; ++r) {
      if (t + r >= c.end) break;
      const bool kept = contributes(t + r);
      const float rstd = rsqrtf(sums[2 * r] / args.width + args.eps);
      const float along = rstd * rstd * sums[2 * r + 1] / args.width;
#pragma unroll
      for (int i = 0; i < S::LOADS; ++i) {
        const int column = column_of<S>(i);
        if (column >= args.width) continue;
        Vec<float, S::VEC> out;
#pragma unroll
        for (int v = 0; v < S::VEC; ++v) {
          const float grad = rstd * (g[i].values[v] - to_float(rows[r][i].values[v]) * along);
          out.values[v] = kept ? grad : 0.0f;
        }
        store_floats(grad_hidden + static_cast<int64_t>(t + r) * args.width + column, out);
      }
    }
  }
}

template <typename T>
void combine(const Args& args, const float* partial, T* pooled, float* normed_mean, cudaStream_t stream) {
  // Many lanes per column when the sentences are long, few when there are many sentences.
  int lanes = 1;
  while (lanes < 16 && lanes * args.num_sentences < slots(args)) lanes *= 2;
  const dim3 block(kCombineThreads / lanes, lanes);
  const dim3 grid(args.num_sentences, divide_up(args.width, block.x));
  norm_pool_combine_kernel<T><<<grid, block, 0, stream>>>(args, partial, pooled, normed_mean);
}

}  // namespace

Status norm_pool_forward(DType dtype, const void* hidden_states, int64_t row_stride, const void* weight,
                         bool weight_is_float32, const int32_t* cu_seqlens, void* pooled, float* normed_mean,
                         float* partial, int64_t num_tokens, int64_t num_sentences, int64_t width, int64_t chunk,
                         float eps, Pooling pooling, cudaStream_t stream) {
  if (num_sentences == 0) return cudaSuccess;
  const Args args{{hidden_states, row_stride, weight, weight_is_float32, cu_seqlens, static_cast<int>(num_sentences),
                   static_cast<int>(num_tokens), static_cast<int>(width), static_cast<int>(chunk), weight ? eps : 1.0f},
                  pooling};
  return dispatch(dtype, args, aligned(pooled), [&](auto t, auto shape) -> Status {
    using T = decltype(t);
    using S = decltype(shape);
    const bool mean = pooling == Pooling::kMean;
    T* out = static_cast<T*>(pooled);
    const int64_t blocks = mean ? slots(args) : num_sentences;
    norm_pool_forward_kernel<T, S><<<blocks, threads<S>(args), 0, stream>>>(args, out, normed_mean, partial);
    if (mean && num_tokens > chunk) combine<T>(args, partial, out, normed_mean, stream);
    return cudaGetLastError();
  });
}

Status norm_pool_backward(DType dtype, const void* grad_pooled, const void* hidden_states, int64_t row_stride,
                          const void* weight, bool weight_is_float32, const int32_t* cu_seqlens, void* grad_hidden,
                          int64_t num_tokens, int64_t num_sentences, int64_t width, int64_t chunk, float eps,
                          Pooling pooling, cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  const Args args{{hidden_states, row_stride, weight, weight_is_float32, cu_seqlens, static_cast<int>(num_sentences),
                   static_cast<int>(num_tokens), static_cast<int>(width), static_cast<int>(chunk), eps},
                  pooling};
  return dispatch(dtype, args, aligned(grad_pooled), [&](auto t, auto shape) -> Status {
    using T = decltype(t);
    using S = decltype(shape);
    norm_pool_backward_kernel<T, S><<<slots(args), threads<S>(args), 0, stream>>>(
        args, static_cast<const T*>(grad_pooled), static_cast<T*>(grad_hidden));
    return cudaGetLastError();
  });
}

}  // namespace mtllm
