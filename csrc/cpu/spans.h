// The vectors of spans, how far those of student and teacher are apart, and the gradient of that.
#pragma once

#include "vec.h"

namespace mtllm::cpu::MTLLM_LEVEL {

inline std::int64_t tokens_in(const Bags& bags, std::int64_t s) {
  return bags.offsets ? bags.offsets[s + 1] - bags.offsets[s] : 1;
}

// vector [width] = the mean of y over the tokens of bag s, which has some.
template <typename T>
void bag_vector(const T* data, const States& states, const Bags& bags, std::int64_t s, std::int64_t width, float* vector) {
  const std::int64_t start = bags.offsets ? bags.offsets[s] : s, count = tokens_in(bags, s);
  for (std::int64_t i = start; i < start + count; i++) {
    const T* row = data + (bags.indices ? bags.indices[i] : i) * states.row_stride;
    const float rstd = states.weight ? rstd_of(sum_of_squares(row, width), width, states.eps) : 1.0f;
    const float share = rstd / static_cast<float>(count);
    const bool first = i == start, weigh = i == start + count - 1 && states.weight;
    columns(width, [&](std::int64_t j, auto part, int) {
      Vec y = load(row + j, part) * share;
      if (!first) y += load(vector + j, part);
      store(vector + j, weigh ? y * load(states.weight + j, part) : y, part);
    });
  }
}

inline void bag_vector(const States& states, const Bags& bags, std::int64_t s, std::int64_t width, float* vector) {
  with_type(states.dtype, [&](auto* type) {
    bag_vector(static_cast<decltype(type)>(const_cast<void*>(states.data)), states, bags, s, width, vector);
  });
}

inline bool vectors_of(const States& student, const SpanTerm& spans, std::int64_t s, std::int64_t width, float* x, float* t) {
  if (!tokens_in(spans.student_bags, s) || !tokens_in(spans.teacher_bags, s)) return false;
  bag_vector(student, spans.student_bags, s, width, x);
  bag_vector(spans.teacher, spans.teacher_bags, s, width, t);
  return true;
}

// x / t in [-beta, beta]; NaN stays NaN, as it would not in std::min.
inline Vec clamp(Vec value, float beta) {
  const Vec high = Vec{} + beta, low = -high;
  value = value > high ? high : value;
  return value < low ? low : value;
}

struct Angles {
  float cosine, x_norm, t_norm;  // cosine 0 with a zero vector
};

inline Angles angles_of(float dot, float xx, float tt) {
  const float x_norm = __builtin_sqrtf(xx), t_norm = __builtin_sqrtf(tt), product = x_norm * t_norm;
  return {product == 0 ? 0.0f : dot / product, x_norm, t_norm};
}

inline Angles angles_of(const float* x, const float* t, std::int64_t width) {
  Sum dot, xx, tt;
  columns(width, [&](std::int64_t j, auto part, int i) {
    const Vec a = load(x + j, part), b = load(t + j, part);
    dot.parts[i] += a * b;
    xx.parts[i] += a * a;
    tt.parts[i] += b * b;
  });
  return angles_of(dot.total(), xx.total(), tt.total());
}

// mean over the row of l(x, t), but for the cosine
inline float distance(const float* x, const float* t, std::int64_t width, const Loss& loss) {
  Sum sum;
  columns(width, [&](std::int64_t j, auto part, int i) {
    const Vec difference = load(x + j, part) - load(t + j, part);
    if (loss.kind == LossKind::kMse) {
      sum.parts[i] += difference * difference;
    } else {  // with c = clamp(d): c (d - c / 2) / beta is d^2 / (2 beta) inside and |d| - beta / 2 outside
      const Vec inside = clamp(difference, loss.beta);
      sum.parts[i] += inside * (difference - 0.5f * inside) / loss.beta;
    }
  });
  return sum.total() / static_cast<float>(width);
}

// gradient = scale * the gradient of l(x, t) in x; may be x itself
inline void loss_gradient(const float* x, const float* t, std::int64_t width, const Loss& loss, float scale, float* gradient) {
  if (loss.kind == LossKind::kCosine) {
    const Angles angles = angles_of(x, t, width);
    if (angles.x_norm * angles.t_norm == 0) return fill_zero(gradient, width);  // a zero vector has no direction
    const float along = scale * (angles.cosine / angles.x_norm) / angles.x_norm;
    const float across = scale / angles.x_norm / angles.t_norm;
    columns(width, [&](std::int64_t j, auto part, int) {
      store(gradient + j, load(x + j, part) * along - load(t + j, part) * across, part);
    });
    return;
  }
  const bool mse = loss.kind == LossKind::kMse;
  const float factor = mse ? scale * 2 / static_cast<float>(width) : scale / (loss.beta * static_cast<float>(width));
  columns(width, [&](std::int64_t j, auto part, int) {
    const Vec difference = load(x + j, part) - load(t + j, part);
    store(gradient + j, (mse ? difference : clamp(difference, loss.beta)) * factor, part);
  });
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
