// Few tokens are bound by reading the weights (21 MB at d=1024, D=4096, N=6144). A block of 4 warps owns 32 rows of a weight
// and splits the columns among its warps; a lane loads 16 bytes = 8 columns of a row at once, straight into the registers
// that the tensor core reads. A product does not care in which order its terms are added, so the 8 columns of a lane serve
// as the k of two steps: neither shared memory nor a shuffle stands between memory and mma. Three blocks fit a
// multiprocessor, so at these widths all blocks are resident at once, with up to 80 KB of loads in flight on each.
#include "mtllm/stack_projection.h"

#include <algorithm>

#include "mtllm/mma.cuh"
#include "mtllm/reduce.cuh"
#include "mtllm/vec.cuh"

namespace mtllm {
namespace {

constexpr int kThreads = 256;  // of the kernels that work row by row
constexpr int kWarps = 4;      // of the products
constexpr int kRows = 32;     // of a weight, per block
constexpr int kTokens = 32;   // per pass over the block's weights
constexpr int kChunk = 4;     // eights of columns that a warp reads at once, one for each lane of a row
constexpr int kInFlight = 4;  // chunks per warp
constexpr int kStride = 36;   // floats between tokens of the partial sums: no two lanes of a warp meet in a bank

struct Products {
  const void* states;
  int64_t d;
  const void* up_weight;
  const void* up_bias;
  bool up_bias_is_float32;
  const void* weight;
  const void* residual;
  void* x;
  float* raw;
  float* squares;
  StackShape shape;
  int up_blocks;
};

// 8 columns of a row; row and column count in eights, so that 32 bits hold them beside one 64-bit base address.
template <typename T>
__device__ uint4 load_eight(const T* matrix, uint32_t row, uint32_t column, uint32_t eights) {
  const uint4 nothing{0, 0, 0, 0};
  return column < eights ? reinterpret_cast<const uint4*>(matrix)[static_cast<uint64_t>(row + column)] : nothing;
}

// acc[m][n] += weight rows (16 m ..) times tokens (8 n ..) over this warp's columns. Rows and tokens behind the last one
// repeat it: what they give is never stored.
template <typename T>
__device__ void multiply(float (&acc)[2][4][4], const T* weight, int64_t first_row, int64_t rows, const T* states,
                         int64_t first_token, int64_t tokens, int64_t d) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const uint32_t eights = static_cast<uint32_t>(d / 8);
  uint32_t row[2][2], token[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    row[i / 2][i % 2] = static_cast<uint32_t>(min(first_row + 8 * i + g, rows - 1)) * eights;
    token[i] = static_cast<uint32_t>(min(first_token + 8 * i + g, tokens - 1)) * eights;
  }
  for (uint32_t base = warp * kChunk; base < eights; base += kInFlight * kWarps * kChunk) {  // the same for all lanes
    uint4 a[kInFlight][2][2];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[j][i / 2][i % 2] = load_eight(weight, row[i / 2][i % 2], base + j * kWarps * kChunk + c, eights);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint4 b = load_eight(states, token[n], base + j * kWarps * kChunk + c, eights);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint4 low = a[j][m][0], high = a[j][m][1];
          mma_16x8x16<T>(acc[m][n], {low.x, high.x, low.y, high.y}, {b.x, b.y});
          mma_16x8x16<T>(acc[m][n], {low.z, high.z, low.w, high.w}, {b.z, b.w});
        }
      }
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarps * kWarp, 3) stack_products_kernel(const Products p) {
  __shared__ float partial[kWarps][kTokens][kStride];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, c = lane % 4;
  const bool up = blockIdx.x < p.up_blocks;
  const int64_t rows = up ? p.shape.width : p.shape.columns;
  const int64_t first_row = static_cast<int64_t>(up ? blockIdx.x : blockIdx.x - p.up_blocks) * kRows;
  const T* weight = static_cast<const T*>(up ? p.up_weight : p.weight);
  const T* residual = static_cast<const T*>(up ? nullptr : p.residual);
  const T* states = static_cast<const T*>(p.states);
  const int64_t row = first_row + lane;
  const bool inside = row < rows;
  float bias = 0.0f;
  if (up && p.up_bias && inside)
    bias = p.up_bias_is_float32 ? static_cast<const float*>(p.up_bias)[row] : to_float(static_cast<const T*>(p.up_bias)[row]);

  for (int64_t first_token = 0; first_token < p.shape.num_tokens; first_token += kTokens) {
    float acc[2][4][4] = {};
    multiply(acc, weight, first_row, rows, states, first_token, p.shape.num_tokens, p.d);
    if (residual) multiply(acc, residual, first_row, rows, states, first_token, p.shape.num_tokens, p.d);
    __syncthreads();  // the partial sums of the tokens before have been read
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[warp][8 * n + 2 * c + i % 2][16 * m + 8 * (i / 2) + g] = acc[m][n][i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokens / kWarps; ++i) {
      const int local = i * kWarps + warp;
      const int64_t token = first_token + local;
      if (token >= p.shape.num_tokens) break;
      float sum = bias;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][local][lane];
      if (!up) {
        if (inside) p.raw[token * rows + row] = sum;
        continue;
      }
      if (inside) static_cast<T*>(p.x)[token * rows + row] = from_float<T>(sum);
      const float square = warp_sum(inside ? sum * sum : 0.0f);
      if (lane == 0) p.squares[blockIdx.x * p.shape.num_tokens + token] = square;
    }
  }
}

// Four neighbours of a rotary table for one token.
template <typename T>
__device__ Vec<float, 4> load_rope(const void* table, const RopeTables& rope, int64_t row, int column) {
  const int64_t offset = row * rope.row_stride + column;
  return rope.is_float32 ? load_floats<float, 4>(static_cast<const float*>(table) + offset)
                         : load_floats<T, 4>(static_cast<const T*>(table) + offset);
}

struct Rotation {
  Vec<float, 4> cos, sin;
};

template <typename T>
__device__ Rotation rotation(const RopeTables& rope, int64_t row, int column, bool rotated) {
  if (rotated) return {load_rope<T>(rope.cos, rope, row, column), load_rope<T>(rope.sin, rope, row, column)};
  return {{{1.0f, 1.0f, 1.0f, 1.0f}}, {}};
}

// A thread takes 8 interleaved columns: 4 rotary pairs of one head, which lie in two runs of 4 in the order of the heads.
struct Pairs {
  int first, column;  // of the first run of the row, and of the rotary tables
};
__device__ Pairs pairs_of(int interleaved, int head_dim) {
  const int pair = interleaved / 2, half = head_dim / 2;
  return {pair / half * head_dim + pair % half, pair % half};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    stack_epilogue_kernel(const T* x, const float* squares, const float* raw, const float* bias, const float* qkv_bias,
                          const RopeTables rope, T* qkv, float* rstd_out, const StackShape shape) {
  __shared__ Vec<float, 1> scratch[kMaxWarps];
  const int64_t t = blockIdx.x;
  const int width = shape.width, columns = shape.columns, head_dim = shape.head_dim;
  float sum[1] = {};
  if (squares) {
    const int tiles = (width + kRows - 1) / kRows;
    for (int i = threadIdx.x; i < tiles; i += kThreads) sum[0] += squares[i * shape.num_tokens + t];
  } else {
    for (int i = threadIdx.x * 8; i < width; i += kThreads * 8) {
      const Vec<float, 8> values = load_floats<T, 8>(x + t * width + i);
#pragma unroll
      for (int v = 0; v < 8; ++v) sum[0] += values.values[v] * values.values[v];
    }
  }
  block_sum(sum, scratch);
  const float rstd = rsqrtf(sum[0] / width + shape.eps);
  if (blockIdx.y == 0 && threadIdx.x == 0) rstd_out[t] = rstd;

  const int64_t row = rope.position_ids ? rope.position_ids[t] : t;
  const int step = gridDim.y * kThreads * 8;
  for (int i = (blockIdx.y * kThreads + threadIdx.x) * 8; i < columns; i += step) {
    Vec<float, 8> y = load_floats<float, 8>(raw + t * columns + i);
    const Vec<float, 8> before = load_floats<float, 8>(bias + i);
#pragma unroll
    for (int v = 0; v < 8; ++v) y.values[v] = (y.values[v] + before.values[v]) * rstd;
    if (qkv_bias) {
      const Vec<float, 8> after = load_floats<float, 8>(qkv_bias + i);
#pragma unroll
      for (int v = 0; v < 8; ++v) y.values[v] += after.values[v];
    }
    const Pairs pairs = pairs_of(i, head_dim);
    const Rotation r = rotation<T>(rope, row, pairs.column, rope.cos && i < shape.num_rotated);
    Vec<float, 4> first, second;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float a = y.values[2 * v], b = y.values[2 * v + 1];
      first.values[v] = a * r.cos.values[v] - b * r.sin.values[v];
      second.values[v] = b * r.cos.values[v] + a * r.sin.values[v];
    }
    T* out = qkv + t * columns + pairs.first;
    store_floats(out, first);
    store_floats(out + head_dim / 2, second);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    stack_backward_kernel(const T* grad_x, const T* grad_qkv, const T* x, const T* qkv, const float* rstds,
                          const float* qkv_bias, const RopeTables rope, T* grad_hidden, T* grad_raw, const StackShape shape) {
  __shared__ Vec<float, 1> scratch[kMaxWarps];
  const int64_t t = blockIdx.x;
  const int width = shape.width, columns = shape.columns, head_dim = shape.head_dim;
  const int64_t row = rope.position_ids ? rope.position_ids[t] : t;
  const float rstd = rstds[t];
  float along[1] = {};
  for (int i = threadIdx.x * 8; i < columns; i += kThreads * 8) {
    const Pairs pairs = pairs_of(i, head_dim);
    const int64_t first = t * columns + pairs.first, second = first + head_dim / 2;
    const Vec<float, 4> g1 = load_floats<T, 4>(grad_qkv + first), g2 = load_floats<T, 4>(grad_qkv + second);
    const Vec<float, 4> y1 = load_floats<T, 4>(qkv + first), y2 = load_floats<T, 4>(qkv + second);
    const Rotation r = rotation<T>(rope, row, pairs.column, rope.cos && i < shape.num_rotated);
    Vec<float, 8> dy;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      along[0] += g1.values[v] * y1.values[v] + g2.values[v] * y2.values[v];
      dy.values[2 * v] = g1.values[v] * r.cos.values[v] + g2.values[v] * r.sin.values[v];
      dy.values[2 * v + 1] = g2.values[v] * r.cos.values[v] - g1.values[v] * r.sin.values[v];
    }
    if (qkv_bias) {
      const Vec<float, 8> b = load_floats<float, 8>(qkv_bias + i);
#pragma unroll
      for (int v = 0; v < 8; ++v) along[0] -= dy.values[v] * b.values[v];
    }
#pragma unroll
    for (int v = 0; v < 8; ++v) dy.values[v] *= rstd;
    store_floats(grad_raw + t * columns + i, dy);
  }
  block_sum(along, scratch);
  const float scale = rstd * rstd * along[0] / width;
  for (int i = threadIdx.x * 8; i < width; i += kThreads * 8) {
    Vec<float, 8> g = load_floats<T, 8>(grad_x + t * width + i);
    const Vec<float, 8> h = load_floats<T, 8>(x + t * width + i);
#pragma unroll
    for (int v = 0; v < 8; ++v) g.values[v] -= scale * h.values[v];
    store_floats(grad_hidden + t * width + i, g);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename... Pointers>
bool all_aligned(Pointers... pointers) { return (aligned(pointers) && ...); }

bool fits(const StackShape& shape, const RopeTables& rope) {
  return shape.width % 8 == 0 && shape.head_dim % 8 == 0 && shape.columns % shape.head_dim == 0 &&
         shape.num_rotated % shape.head_dim == 0 && rope.row_stride % 4 == 0 && all_aligned(rope.cos, rope.sin);
}

template <typename Run>
Status on_halves(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat16: return run(__half{});
    case DType::kBFloat16: return run(__nv_bfloat16{});
    default: return kUnsupportedArgument;
  }
}

}  // namespace

Status stack_products(DType dtype, const void* states, int64_t d, const void* up_weight, const void* up_bias,
                      bool up_bias_is_float32, const void* weight, const void* residual, void* x, float* raw,
                      float* squares, const StackShape& shape, cudaStream_t stream) {
  if (shape.num_tokens == 0) return cudaSuccess;
  if (d % 8 || std::max(shape.width, shape.columns) * (d / 8) > UINT32_MAX) return kUnsupportedArgument;
  if (!all_aligned(states, up_weight, weight, residual)) return kUnsupportedArgument;
  const int up_blocks = static_cast<int>((shape.width + kRows - 1) / kRows);
  const int blocks = up_blocks + static_cast<int>((shape.columns + kRows - 1) / kRows);
  const Products products{states, d, up_weight, up_bias, up_bias_is_float32, weight, residual, x, raw, squares, shape, up_blocks};
  return on_halves(dtype, [&](auto t) -> Status {
    using T = decltype(t);
    stack_products_kernel<T><<<blocks, kWarps * kWarp, 0, stream>>>(products);
    return cudaGetLastError();
  });
}

Status stack_epilogue(DType dtype, const void* x, const float* squares, const float* raw, const float* bias,
                      const float* qkv_bias, const RopeTables& rope, void* qkv, float* rstd, const StackShape& shape, cudaStream_t stream) {
  if (shape.num_tokens == 0) return cudaSuccess;
  if (!fits(shape, rope) || !all_aligned(x, raw, bias, qkv_bias, qkv)) return kUnsupportedArgument;
  // Few tokens: a row is shared by several blocks, each of which sums the squares again.
  const int64_t steps = (shape.columns + kThreads * 8 - 1) / (kThreads * 8);
  const dim3 grid(shape.num_tokens, shape.num_tokens <= 64 ? steps : 1);
  return on_halves(dtype, [&](auto t) -> Status {
    using T = decltype(t);
    stack_epilogue_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(x), squares, raw, bias, qkv_bias, rope,
                                                            static_cast<T*>(qkv), rstd, shape);
    return cudaGetLastError();
  });
}

Status stack_backward(DType dtype, const void* grad_x, const void* grad_qkv, const void* x, const void* qkv,
                      const float* rstd, const float* qkv_bias, const RopeTables& rope, void* grad_hidden, void* grad_raw,
                      const StackShape& shape, cudaStream_t stream) {
  if (shape.num_tokens == 0) return cudaSuccess;
  if (!fits(shape, rope) || !all_aligned(grad_x, grad_qkv, x, qkv, qkv_bias, grad_hidden, grad_raw))
    return kUnsupportedArgument;
  return on_halves(dtype, [&](auto t) -> Status {
    using T = decltype(t);
    stack_backward_kernel<T><<<shape.num_tokens, kThreads, 0, stream>>>(
        static_cast<const T*>(grad_x), static_cast<const T*>(grad_qkv), static_cast<const T*>(x), static_cast<const T*>(qkv),
        rstd, qkv_bias, rope, static_cast<T*>(grad_hidden), static_cast<T*>(grad_raw), shape);
    return cudaGetLastError();
  });
}

}  // namespace mtllm
