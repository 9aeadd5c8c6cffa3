// The forward of norm_pool: reads every row once from memory and writes one row per sentence.
#include "levels.h"
#include "parallel.h"
#include "vec.h"

namespace mtllm::cpu::MTLLM_LEVEL {
namespace {

constexpr int kTogether = 4;  // rows per pass over the sum: it is loaded and stored a quarter as often

template <typename T>
void add_rows(const T* rows, const States& states, std::int64_t width, int count, float* sum) {
  float share[kTogether] = {};
  const T* row[kTogether];
  for (int r = 0; r < kTogether; r++) {
    row[r] = rows + (r < count ? r : 0) * states.row_stride;
    if (r < count) share[r] = states.weight ? rstd_of(sum_of_squares(row[r], width), width, states.eps) : 1.0f;
  }
  if (count < kTogether) {  // not a product with 0, which would be NaN for an infinite row
    for (int r = 0; r < count; r++)
      columns(width, [&](std::int64_t j, auto part, int) {
        store(sum + j, load(sum + j, part) + share[r] * load(row[r] + j, part), part);
      });
    return;
  }
  columns(width, [&](std::int64_t j, auto part, int) {
    const Vec pair = share[0] * load(row[0] + j, part) + share[1] * load(row[1] + j, part);
    const Vec other = share[2] * load(row[2] + j, part) + share[3] * load(row[3] + j, part);
    store(sum + j, load(sum + j, part) + (pair + other), part);
  });
}

template <typename T>
void sum_rows(const T* data, const States& states, std::int64_t start, std::int64_t stop, std::int64_t width, float* sum) {
  fill_zero(sum, width);
  for (std::int64_t t = start; t < stop; t += kTogether) {
    const std::int64_t left = stop - t;
    add_rows(data + t * states.row_stride, states, width, static_cast<int>(left < kTogether ? left : kTogether), sum);
  }
}

void scale_row(float* row, std::int64_t width, float factor) {
  columns(width, [&](std::int64_t j, auto part, int) { store(row + j, load(row + j, part) * factor, part); });
}

void combine(const Sentences& sentences, std::int64_t b, const float* partial, float* mean) {
  const std::int64_t length = sentences.ends[b + 1] - sentences.ends[b];
  if (length > kPieceTokens) {
    fill_zero(mean, sentences.width);
    const float* piece = partial + first_piece(sentences, b) * sentences.width;
    for (std::int64_t start = 0; start < length; start += kPieceTokens, piece += sentences.width)
      columns(sentences.width, [&](std::int64_t j, auto part, int) {
        store(mean + j, load(mean + j, part) + load(piece + j, part), part);
      });
  }
  if (length > 1) scale_row(mean, sentences.width, 1.0f / static_cast<float>(length));
  if (length <= 0) fill_zero(mean, sentences.width);
}

}  // namespace

void pool(const States& states, const Sentences& sentences, Pooling pooling, float* mean, float* partial, int threads) {
  with_type(states.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(states.data);
    const std::int64_t width = sentences.width;
    if (pooling != Pooling::kMean) {
      parallel_pieces(sentences.count, threads, [&](std::int64_t b, int) {
        const std::int64_t first = sentences.ends[b], last = sentences.ends[b + 1];
        const std::int64_t token = pooling == Pooling::kCls ? first : last - 1;
        sum_rows(data, states, token, first < last ? token + 1 : token, width, mean + b * width);
      });
      return;
    }
    parallel_pieces(pieces_of(sentences), threads, [&](std::int64_t number, int) {
      const Piece piece = piece_at(sentences, number);
      if (piece.start >= piece.stop || piece.sentence == sentences.count) return;
      float* sum = piece.whole ? mean + piece.sentence * width : partial + number * width;
      sum_rows(data, states, piece.start, piece.stop, width, sum);
    });
    parallel_pieces(sentences.count, threads,
                    [&](std::int64_t b, int) { combine(sentences, b, partial, mean + b * width); });
  });
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
