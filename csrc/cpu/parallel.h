// Pieces of work, and the threads that take them.
//
// torch brings its own copy of libgomp and loads it into the global scope (through libtorch_global_deps.so), so this
// module's calls of OpenMP go there, even where the copy has another file name and the module's own libgomp is loaded
// beside it: there is one pool of threads. A pool of our own would spin beside torch's. The pieces of a call are taken
// from a counter and each owns what it writes, so results do not depend on who takes which.
#pragma once

#include <omp.h>

#include <cstdint>

#include "kernels.h"

namespace mtllm::cpu::MTLLM_LEVEL {

// body(piece, thread) for all pieces.
template <typename Body>
inline void parallel_pieces(std::int64_t pieces, int threads, Body body) {
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    for (std::int64_t piece = 0; piece < pieces; piece++) body(piece, 0);
    return;
  }
  std::int64_t next = 0;
#pragma omp parallel num_threads(threads)
  for (std::int64_t piece; (piece = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < pieces;)
    body(piece, omp_get_thread_num());
}

// body(first row, last row + 1, thread) over blocks of rows, for kernels that go row by row.
template <typename Body>
inline void parallel_rows(std::int64_t rows, std::int64_t block, int threads, Body body) {
  parallel_pieces((rows + block - 1) / block, threads, [&](std::int64_t piece, int thread) {
    const std::int64_t start = piece * block, stop = start + block < rows ? start + block : rows;
    body(start, stop, thread);
  });
}

// Up to kPieceTokens rows of one sentence. Sentence b owns the pieces from ends[b] / kPieceTokens + b on, the tail after
// the last sentence counts as one more, and some pieces are empty; see mtllm_fast/ops/norm_pool/chunks.py.
struct Piece {
  std::int64_t sentence, start, stop;
  bool whole;  // the sentence has no other piece
};

inline std::int64_t pieces_of(const Sentences& sentences) {
  return sentences.tokens / kPieceTokens + sentences.count + 1;
}

inline std::int64_t first_piece(const Sentences& sentences, std::int64_t sentence) {
  return sentences.ends[sentence] / kPieceTokens + sentence;
}

inline Piece piece_at(const Sentences& sentences, std::int64_t number) {
  std::int64_t low = 0, high = sentences.count;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (first_piece(sentences, middle) <= number) low = middle;
    else high = middle - 1;
  }
  const std::int64_t begin = sentences.ends[low];
  const std::int64_t end = low < sentences.count ? sentences.ends[low + 1] : sentences.tokens;
  const std::int64_t start = begin + (number - first_piece(sentences, low)) * kPieceTokens;
  const std::int64_t stop = start + kPieceTokens < end ? start + kPieceTokens : end;
  return {low, start < stop ? start : stop, stop, end - begin <= kPieceTokens};
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
