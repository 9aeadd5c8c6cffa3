// As much of CUDA as csrc's simpler kernels use, on one CPU thread: what a kernel computes can be tested without a GPU.
// The threads of a block are fibers that switch at every __syncthreads and shuffle; blocks run one after the other.
// Not emulated: streams, the alignment that vector loads need, and every order in which threads may race.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define CUDART_VERSION 0

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error: emulated"; }

template <typename T>
T __ldcs(const T* address) { return *address; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = false;
  int exchanges = 0, votes = 0;  // pick one of several slots, so that a shuffle or a count needs one barrier
  uint32_t slots[2];
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int current = 0, alive = 0, counts[3] = {0, 0, 0};
  Barrier all;
  std::vector<Barrier> warps;
};
inline Block* block;

inline void yield() {
  Fiber& fiber = block->fibers[block->current];
  if (!_setjmp(fiber.here)) _longjmp(block->scheduler, 1);
}

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  block->kernel();
  block->fibers[block->current].done = true;
  --block->alive;
  _longjmp(block->scheduler, 1);
}

inline void resume(int thread) {
  Fiber& fiber = block->fibers[thread];
  block->current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x);
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline void launch(dim3 grid, dim3 threads, int, cudaStream_t, std::function<void()> kernel) {
  Block state;
  block = &state;
  state.kernel = kernel;
  gridDim = grid;
  blockDim = threads;
  const int size = threads.x * threads.y;
  uint32_t random = 0;  // lets warps run ahead of one another, so that a missing barrier shows
  state.fibers.resize(size);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      state.alive = size;
      state.all = {};
      state.warps.assign((size + 31) / 32, {});
      for (Fiber& fiber : state.fibers) fiber.started = fiber.done = false, fiber.exchanges = fiber.votes = 0;
      std::fill_n(state.counts, 3, 0);
      while (state.alive > 0) {
        for (int first = 0; first < size; first += 32) {
          random = random * 1664525u + 1013904223u;
          if (size > 32 && random >> 31) continue;
          for (int thread = first; thread < std::min(first + 32, size); ++thread)
            if (!state.fibers[thread].done) resume(thread);
        }
      }
    }
}

inline int size() { return static_cast<int>(block->fibers.size()); }

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block->all, emulated::size()); }

inline int __syncthreads_count(bool predicate) {
  emulated::Block& block = *emulated::block;
  const int vote = block.fibers[block.current].votes++;
  block.counts[vote % 3] += predicate;
  __syncthreads();
  block.counts[(vote + 2) % 3] = 0;  // of the vote before, which everyone has read
  return block.counts[vote % 3];
}

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  emulated::Block& block = *emulated::block;
  emulated::Fiber& fiber = block.fibers[block.current];
  const int thread = block.current, slot = fiber.exchanges++ % 2, warp = thread / 32;
  static_assert(sizeof(float) == sizeof(uint32_t));
  std::copy_n(reinterpret_cast<const char*>(&value), 4, reinterpret_cast<char*>(&fiber.slots[slot]));
  emulated::wait(block.warps[warp], std::min(32, emulated::size() - warp * 32));
  float other;
  std::copy_n(reinterpret_cast<const char*>(&block.fibers[thread ^ offset].slots[slot]), 4, reinterpret_cast<char*>(&other));
  return other;
}
