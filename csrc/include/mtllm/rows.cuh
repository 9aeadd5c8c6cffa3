// Packed rows of states, sentence by sentence: the partition into chunks (see mtllm_fast/ops/norm_pool/chunks.py), which
// columns a thread keeps throughout, and how rows are loaded.
#pragma once

#include <cstdint>

#include "mtllm/reduce.cuh"
#include "mtllm/status.h"
#include "mtllm/vec.cuh"

namespace mtllm {

constexpr int kMaxWidth = 16384;

template <typename T, int VEC_, int PER_THREAD_>
struct Shape {
  static constexpr int VEC = VEC_;                   // columns per load
  static constexpr int PER_THREAD = PER_THREAD_;     // columns per thread
  static constexpr int LOADS = PER_THREAD / VEC;     // loads per thread and row
  static constexpr int ROWS = 32 / PER_THREAD;       // rows in flight, reduced together
  static constexpr int MAX_THREADS = PER_THREAD < 32 ? 256 : 512;
  static constexpr int MIN_BLOCKS = PER_THREAD == 16 ? 3 : 1;  // per multiprocessor; 3 is as far as it goes without spills
};

struct Rows {
  const void* states;
  int64_t row_stride;
  const void* weight;  // null: the states are normed already
  bool weight_is_float32;
  const int32_t* cu_seqlens;
  int num_sentences;
  int num_tokens;
  int width;
  int chunk;
  float eps;
};

struct Chunk {
  int sentence;      // num_sentences: the dead tail after the last sentence
  int index;         // of the chunk within the sentence
  int start, stop;   // tokens of the sentence
  int begin, end;    // tokens of the chunk
};

// Slot s of the partition: sentence b owns the slots from cu_seqlens[b] / chunk + b on.
__device__ inline Chunk find_chunk(const Rows& args, int slot) {
  int owners = 0;
  for (int base = 0; base <= args.num_sentences; base += blockDim.x) {
    const int b = base + threadIdx.x;
    owners += __syncthreads_count(b <= args.num_sentences && args.cu_seqlens[b] / args.chunk + b <= slot);
  }
  Chunk c;
  c.sentence = owners - 1;
  c.start = args.cu_seqlens[c.sentence];
  c.stop = c.sentence < args.num_sentences ? args.cu_seqlens[c.sentence + 1] : args.num_tokens;
  c.index = slot - (c.start / args.chunk + c.sentence);
  c.begin = c.start + c.index * args.chunk;
  c.end = min(c.begin + args.chunk, c.stop);
  return c;
}

template <typename S>
__device__ int column_of(int load) {
  return (load * blockDim.x + threadIdx.x) * S::VEC;
}

template <typename T, int VEC>
__device__ Vec<float, VEC> load_weight(const Rows& args, int column) {
  return args.weight_is_float32 ? load_floats<float, VEC>(static_cast<const float*>(args.weight) + column)
                                : load_floats<T, VEC>(static_cast<const T*>(args.weight) + column);
}

// Rows first .. first + ROWS of the states; a row for which keep() is false is not read and counts as zero.
template <typename T, typename S, typename Keep>
__device__ void load_rows(Vec<T, S::VEC> (&rows)[S::ROWS][S::LOADS], const Rows& args, int first, Keep keep) {
#pragma unroll
  for (int r = 0; r < S::ROWS; ++r) {
    const T* row = static_cast<const T*>(args.states) + static_cast<int64_t>(first + r) * args.row_stride;
    const bool kept = keep(first + r);
#pragma unroll
    for (int i = 0; i < S::LOADS; ++i) {
      const int column = column_of<S>(i);
      rows[r][i] = kept && column < args.width ? load_streaming<T, S::VEC>(row + column) : Vec<T, S::VEC>{};
    }
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t slots(const Rows& args) { return args.num_tokens / args.chunk + args.num_sentences + 1; }

template <typename S>
int threads(const Rows& args) {
  return static_cast<int>(divide_up(divide_up(args.width, S::PER_THREAD), kWarp) * kWarp);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls run(T, Shape) for the dtype and the widest load that all addresses allow, those that run() knows of included.
template <typename T, typename Run>
Status with_shape(const Rows& args, bool others_aligned, Run run) {
  constexpr int VEC = 16 / sizeof(T);
  const bool vectors = args.width % VEC == 0 && args.row_stride % VEC == 0 && aligned(args.states) &&
                       aligned(args.weight) && others_aligned;
  if (!vectors) return run(T{}, Shape<T, 1, 32>{});
  if (args.width <= 2048) return run(T{}, Shape<T, VEC, 8>{});
  if (args.width <= 4096) return run(T{}, Shape<T, VEC, 16>{});
  return run(T{}, Shape<T, VEC, 32>{});
}

template <typename Run>
Status dispatch(DType dtype, const Rows& args, bool others_aligned, Run run) {
  if (args.width < 1 || args.width > kMaxWidth || args.chunk < 1) return kUnsupportedArgument;
  switch (dtype) {
    case DType::kFloat32: return with_shape<float>(args, others_aligned, run);
    case DType::kFloat16: return with_shape<__half>(args, others_aligned, run);
    case DType::kBFloat16: return with_shape<__nv_bfloat16>(args, others_aligned, run);
  }
  return kUnsupportedArgument;
}

}  // namespace mtllm
