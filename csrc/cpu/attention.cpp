// softmax(scale q k^T) v of short sentences, for inference. One piece of work is a sentence and a key head, with the
// queries of all heads that read it: its keys (transposed) and values stay in the cache, scores are never stored whole.
#include "levels.h"
#include "parallel.h"
#include "vec.h"

namespace mtllm::cpu::MTLLM_LEVEL {
namespace {

constexpr int kRows = 4;  // queries at a time

// c [kRows, kVectors vectors] = a [kRows, depth] b [depth, ...].
template <int kVectors>
inline void tile(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, std::int64_t depth, float* c,
                 std::int64_t ldc) {
  Vec sums[kRows][kVectors] = {};
  for (std::int64_t d = 0; d < depth; d++)
    for (int v = 0; v < kVectors; v++) {
      const Vec column = load(b + d * ldb + v * kLanes, Full{});
      for (int r = 0; r < kRows; r++) sums[r][v] += a[r * lda + d] * column;
    }
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++) store(c + r * ldc + v * kLanes, sums[r][v], Full{});
}

// c [kRows, columns] = a [kRows, depth] b [depth, columns]; columns is a multiple of kLanes. Two vectors of four rows are
// eight sums: as many as the processor has additions under way.
void multiply(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, std::int64_t depth, float* c,
              std::int64_t ldc, std::int64_t columns) {
  std::int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) tile<2>(a, lda, b + j, ldb, depth, c + j, ldc);
  if (j < columns) tile<1>(a, lda, b + j, ldb, depth, c + j, ldc);
}

// A NaN may be passed over: it shows in the sum.
float largest_of(const float* row, std::int64_t length) {
  float lanes[kLanes], largest = row[0];
  std::int64_t j = 0;
  if (length >= kLanes) {
    Vec best = load(row, Full{});
    for (j = kLanes; j + kLanes <= length; j += kLanes) {
      const Vec next = load(row + j, Full{});
      best = next > best ? next : best;
    }
    store(lanes, best, Full{});
    for (int i = 0; i < kLanes; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  }
  for (; j < length; j++) largest = row[j] > largest ? row[j] : largest;
  return largest;
}

// The row's scores become e^(score - largest), 0 beyond its length; returns their sum.
float exponentials(float* row, std::int64_t length, std::int64_t padded) {
  const float largest = largest_of(row, length);
  Sum sum;
  columns(length, [&](std::int64_t j, auto part, int i) {
    const Vec value = exponential(load(row + j, part) - largest);
    store(row + j, value, part);
    sum.parts[i] += load(row + j, part);  // as stored: the lanes beyond the end count nothing
  });
  for (std::int64_t j = length; j < padded; j++) row[j] = 0.0f;
  return sum.total();
}

struct Scratch {
  float *keys, *values, *queries, *scores, *outputs;
};

template <typename T>
void attend(const Heads& q, const Heads& k, const Heads& v, std::int64_t start, std::int64_t length, std::int64_t head,
            float scale, T* out, const Scratch& scratch) {
  const std::int64_t width = q.width, group = q.heads / k.heads, padded = (length + kLanes - 1) / kLanes * kLanes;
  auto row_of = [](const Heads& heads, std::int64_t token, std::int64_t number) {
    return static_cast<const T*>(heads.data) + token * heads.token_stride + number * heads.head_stride;
  };
  for (std::int64_t t = 0; t < length; t++) {
    const T *key = row_of(k, start + t, head), *value = row_of(v, start + t, head);
    columns(width, [&](std::int64_t j, auto part, int) {
      float lanes[kLanes];
      store(lanes, load(key + j, part), Full{});
      for (int i = 0; i < kLanes && j + i < width; i++) scratch.keys[(j + i) * padded + t] = lanes[i];
      store(scratch.values + t * width + j, load(value + j, part), part);
    });
  }
  for (std::int64_t j = 0; j < width; j++)
    for (std::int64_t t = length; t < padded; t++) scratch.keys[j * padded + t] = 0.0f;
  for (std::int64_t first = 0; first < group * length; first += kRows) {
    const int count = group * length - first < kRows ? static_cast<int>(group * length - first) : kRows;
    float inverse[kRows];
    for (int r = 0; r < kRows; r++) {
      const std::int64_t row = first + (r < count ? r : 0);
      const T* query = row_of(q, start + row % length, head * group + row / length);
      columns(width, [&](std::int64_t j, auto part, int) {
        store(scratch.queries + r * width + j, load(query + j, part) * scale, part);
      });
    }
    multiply(scratch.queries, width, scratch.keys, padded, width, scratch.scores, padded, padded);
    for (int r = 0; r < kRows; r++) inverse[r] = 1.0f / exponentials(scratch.scores + r * padded, length, padded);
    multiply(scratch.scores, padded, scratch.values, width, length, scratch.outputs, width, width);
    for (int r = 0; r < count; r++) {
      const std::int64_t row = first + r;
      T* to = out + ((start + row % length) * q.heads + head * group + row / length) * width;
      columns(width, [&](std::int64_t j, auto part, int) {
        store(to + j, load(scratch.outputs + r * width + j, part) * inverse[r], part);
      });
    }
  }
}

}  // namespace

void attention(const Heads& q, const Heads& k, const Heads& v, const Sentences& sentences, std::int64_t longest,
               float scale, void* out, float* scratch, int threads) {
  with_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::int64_t width = q.width, padded = longest + kLanes;
    parallel_pieces(sentences.count * k.heads, threads, [&](std::int64_t piece, int thread) {
      const std::int64_t b = piece / k.heads, start = sentences.ends[b], length = sentences.ends[b + 1] - start;
      if (length <= 0 || length > longest) return;
      float* keys = scratch + thread * attention_scratch(longest, width);
      float *values = keys + width * padded, *queries = values + width * longest, *scores = queries + kRows * width;
      attend(q, k, v, start, length, piece % k.heads, scale, static_cast<T*>(out),
             {keys, values, queries, scores, scores + kRows * padded});
    });
  });
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
