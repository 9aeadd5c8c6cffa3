// The backward of norm_pool and distillation_loss: reads every row once from memory and writes its gradient once.
//
// With dy the gradient of a token's y, from its sentence and its spans, and g = weight * dy:
// dh = rstd (g - x mean(g x)), x = h rstd, and the weight's gradient is the sum of dy x over tokens.
#include "levels.h"
#include "parallel.h"
#include "spans.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mtllm::cpu::MTLLM_LEVEL {
namespace {

constexpr int kCached = 4;

// Gradients of the spans that a thread met last: the tokens of a span mostly follow one another.
struct SpanCache {
  std::int64_t spans[kCached] = {-1, -1, -1, -1};
  int next = 0;
  float* rows;  // [kCached + 1, width]; the last is for a teacher's vector

  const float* gradient(const States& student, const SpanTerm& term, std::int64_t s, std::int64_t width) {
    for (int i = 0; i < kCached; i++)
      if (spans[i] == s) return rows + i * width;
    float *x = rows + next * width, *t = rows + kCached * width;
    spans[next] = s;
    next = (next + 1) % kCached;
    if (vectors_of(student, term, s, width, x, t))
      loss_gradient(x, t, width, term.loss, term.scale / static_cast<float>(tokens_in(term.student_bags, s)), x);
    else
      fill_zero(x, width);
    return x;
  }
};

inline void add_row(float* sum, const float* row, std::int64_t width) {
  columns(width,
          [&](std::int64_t j, auto part, int) { store(sum + j, load(sum + j, part) + load(row + j, part), part); });
}

// out = the gradient of one row h, from dy; adds dy x to grad_weight unless that is null.
template <typename T>
void row_backward(const T* h, const float* dy, const States& states, std::int64_t width, T* out, float* grad_weight) {
  if (!states.weight) {
    columns(width, [&](std::int64_t j, auto part, int) { store(out + j, load(dy + j, part), part); });
    return;
  }
  Sum squares, along;
  columns(width, [&](std::int64_t j, auto part, int i) {
    const Vec row = load(h + j, part);
    squares.parts[i] += row * row;
    along.parts[i] += load(dy + j, part) * load(states.weight + j, part) * row;
  });
  const float rstd = rstd_of(squares.total(), width, states.eps);
  const float back = -along.total() / static_cast<float>(width) * rstd * rstd * rstd;
  columns(width, [&](std::int64_t j, auto part, int) {
    const Vec row = load(h + j, part), gradient = load(dy + j, part);
    store(out + j, gradient * load(states.weight + j, part) * rstd + row * back, part);
    if (grad_weight) store(grad_weight + j, load(grad_weight + j, part) + gradient * row * rstd, part);
  });
}

// A fresh gradient's pages are first touched here, and half of the time would go into faults of 4 KB each.
void advise_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // an advice: it may be refused
#endif
}

template <typename T>
struct Backward {
  const States& states;
  const Sentences& sentences;
  Pooling pooling;
  const float* grad_pooled;
  const SpanTerm* spans;
  T* grad_hidden;
  float* by_piece;
  float* scratch;

  void piece(std::int64_t number, int thread) const {
    const Piece piece = piece_at(sentences, number);
    const std::int64_t width = sentences.width;
    float* grad_weight = by_piece ? by_piece + number * width : nullptr;
    if (grad_weight) fill_zero(grad_weight, width);
    float* rows = scratch + thread * kScratchRows * width;
    SpanCache cache{{-1, -1, -1, -1}, 0, rows};
    float *sum = rows + (kCached + 1) * width, *zero = sum + width;
    fill_zero(zero, width);
    const float* of_sentence = zero;
    if (grad_pooled && piece.sentence < sentences.count) of_sentence = grad_pooled + piece.sentence * width;
    for (std::int64_t t = piece.start; t < piece.stop; t++) {
      T* out = grad_hidden + t * width;
      if (!pooled(piece.sentence, t)) {
        __builtin_memset(static_cast<void*>(out), 0, static_cast<std::size_t>(width) * sizeof(T));
        continue;
      }
      const T* h = static_cast<const T*>(states.data) + t * states.row_stride;
      row_backward(h, gradient_of_token(t, of_sentence, cache, sum), states, width, out, grad_weight);
    }
  }

  bool pooled(std::int64_t sentence, std::int64_t t) const {
    if (sentence == sentences.count) return false;
    if (pooling == Pooling::kCls) return t == sentences.ends[sentence];
    return pooling == Pooling::kMean || t == sentences.ends[sentence + 1] - 1;
  }

  const float* gradient_of_token(std::int64_t t, const float* of_sentence, SpanCache& cache, float* sum) const {
    if (!spans || spans->token_offsets[t] == spans->token_offsets[t + 1]) return of_sentence;
    const std::int64_t first = spans->token_offsets[t], last = spans->token_offsets[t + 1];
    if (!grad_pooled && last == first + 1)
      return cache.gradient(states, *spans, spans->token_spans[first], sentences.width);
    __builtin_memcpy(sum, of_sentence, static_cast<std::size_t>(sentences.width) * sizeof(float));
    for (std::int64_t i = first; i < last; i++)
      add_row(sum, cache.gradient(states, *spans, spans->token_spans[i], sentences.width), sentences.width);
    return sum;
  }
};

}  // namespace

void backward(const States& states, const Sentences& sentences, Pooling pooling, const float* grad_pooled,
              const SpanTerm* spans, void* grad_hidden, float* grad_weight, float* by_piece, float* scratch, int threads) {
  const std::int64_t pieces = pieces_of(sentences), width = sentences.width;
  with_type(states.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    advise_huge_pages(grad_hidden, sentences.tokens * width * static_cast<std::int64_t>(sizeof(T)));
    const Backward<T> work{states, sentences, pooling, grad_pooled, spans, static_cast<T*>(grad_hidden), by_piece, scratch};
    parallel_pieces(pieces, threads, [&](std::int64_t number, int thread) { work.piece(number, thread); });
  });
  if (!grad_weight) return;
  fill_zero(grad_weight, width);
  for (std::int64_t number = 0; number < pieces; number++) add_row(grad_weight, by_piece + number * width, width);
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
