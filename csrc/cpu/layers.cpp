// Between the matrix products of a layer: RMSNorm with the residual addition before it, RoPE, and SwiGLU. Row by row, each
// row read from memory once and written once; what is read again lies in the first cache.
#include "levels.h"
#include "parallel.h"
#include "vec.h"

namespace mtllm::cpu::MTLLM_LEVEL {
namespace {

constexpr std::int64_t kBlockBytes = 1 << 15;  // of work per piece, so that taking a piece costs next to nothing

std::int64_t rows_per_block(std::int64_t row_elements) {
  const std::int64_t rows = kBlockBytes / (4 * (row_elements > 0 ? row_elements : 1));
  return rows > 0 ? rows : 1;
}

// The value that a tensor of the type holds after a store.
inline Vec rounded(const float*, Vec value) { return value; }
template <typename T>
inline Vec rounded(const T* type, Vec value) {
  return widen(type, narrow(type, value));
}

template <typename T>
const T* row_of(const Heads& heads, std::int64_t token, std::int64_t head) {
  return static_cast<const T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

template <typename T>
float add_rows(const T* x, const T* residual, T* summed, std::int64_t width) {
  Sum squares;
  columns(width, [&](std::int64_t j, auto part, int i) {
    const Vec sum = rounded(x, load(x + j, part) + load(residual + j, part));
    store(summed + j, sum, part);
    squares.parts[i] += sum * sum;
  });
  return squares.total();
}

template <typename T>
void rotate(const T* x, const float* cos, const float* sin, float sign, std::int64_t half, T* out) {
  columns(half, [&](std::int64_t j, auto part, int) {
    const Vec low = load(x + j, part), high = load(x + half + j, part);
    const Vec c = load(cos + j, part), s = load(sin + j, part) * sign;
    store(out + j, low * c - high * s, part);
    store(out + half + j, high * c + low * s, part);
  });
}

// 1 / (1 + e^-x) and 1 minus it, neither of which cancels.
struct Sigmoid {
  Vec value, rest;
};

inline Sigmoid sigmoid(Vec x) {
  const Vec below = x < 0.0f ? x : -x;
  const Vec e = below < -87.0f ? Vec{} : exponential(below);  // 0: silu(-inf) is NaN, as elsewhere
  const Vec large = 1.0f / (1.0f + e), small = e * large;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

}  // namespace

void rms_norm(const Heads& x, const Heads* residual, const float* weight, float eps, void* normed, void* summed,
              float* rstd, int threads) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::int64_t width = x.width, rows = x.tokens * x.heads;
    parallel_rows(rows, rows_per_block(width), threads, [&](std::int64_t start, std::int64_t stop, int) {
      for (std::int64_t r = start; r < stop; r++) {
        const T* row = row_of<T>(x, r / x.heads, r % x.heads);
        T* sum = static_cast<T*>(summed) + (residual ? r * width : 0);
        const float squares = residual ? add_rows(row, row_of<T>(*residual, r / x.heads, r % x.heads), sum, width)
                                       : sum_of_squares(row, width);
        const T* source = residual ? sum : row;
        const float scale = rstd_of(squares, width, eps);
        rstd[r] = scale;
        T* out = static_cast<T*>(normed) + r * width;
        columns(width, [&](std::int64_t j, auto part, int) {
          store(out + j, load(source + j, part) * scale * load(weight + j, part), part);
        });
      }
    });
  });
}

void rms_norm_backward(const Heads& grad_normed, const Heads* grad_summed, const Heads& x, const float* weight,
                       const float* rstd, void* grad, float* grad_weight, int threads) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::int64_t width = x.width, rows = x.tokens * x.heads;
    parallel_rows(rows, kPieceTokens, threads, [&](std::int64_t start, std::int64_t stop, int) {
      float* of_weight = grad_weight ? grad_weight + start / kPieceTokens * width : nullptr;
      if (of_weight) fill_zero(of_weight, width);
      for (std::int64_t r = start; r < stop; r++) {
        const std::int64_t token = r / x.heads, head = r % x.heads;
        const T* dy = row_of<T>(grad_normed, token, head);
        const T* row = row_of<T>(x, token, head);
        const T* residual = grad_summed ? row_of<T>(*grad_summed, token, head) : nullptr;
        T* out = static_cast<T*>(grad) + r * width;
        const float scale = rstd[r];
        Sum along;
        columns(width, [&](std::int64_t j, auto part, int i) {
          along.parts[i] += load(dy + j, part) * load(weight + j, part) * load(row + j, part);
        });
        const float back = -along.total() * scale * scale * scale / static_cast<float>(width);
        columns(width, [&](std::int64_t j, auto part, int) {
          const Vec g = load(dy + j, part), h = load(row + j, part);
          Vec value = g * load(weight + j, part) * scale + h * back;
          if (residual) value += load(residual + j, part);
          store(out + j, value, part);
          if (of_weight) store(of_weight + j, load(of_weight + j, part) + g * h * scale, part);
        });
      }
    });
  });
}

void rope(const Heads& x, const float* cos, const float* sin, std::int64_t table_stride, float sign, void* out,
          std::int64_t out_token_stride, int threads) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::int64_t block = rows_per_block(x.heads * x.width);
    parallel_rows(x.tokens, block, threads, [&](std::int64_t start, std::int64_t stop, int) {
      for (std::int64_t t = start; t < stop; t++) {
        T* to = static_cast<T*>(out) + t * out_token_stride;
        for (std::int64_t h = 0; h < x.heads; h++)
          rotate(row_of<T>(x, t, h), cos + t * table_stride, sin + t * table_stride, sign, x.width / 2, to + h * x.width);
      }
    });
  });
}

void swiglu(const Heads& gate, const Heads& up, void* out, std::int64_t out_stride, int threads) {
  with_type(gate.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_rows(gate.tokens, rows_per_block(gate.width), threads, [&](std::int64_t start, std::int64_t stop, int) {
      for (std::int64_t t = start; t < stop; t++) {
        const T *g = row_of<T>(gate, t, 0), *u = row_of<T>(up, t, 0);
        T* to = static_cast<T*>(out) + t * out_stride;
        columns(gate.width, [&](std::int64_t j, auto part, int) {
          const Vec x = load(g + j, part);
          store(to + j, x * sigmoid(x).value * load(u + j, part), part);
        });
      }
    });
  });
}

void swiglu_backward(const Heads& grad, const Heads& gate, const Heads& up, void* grad_gate, std::int64_t gate_stride,
                     void* grad_up, std::int64_t up_stride, int threads) {
  with_type(gate.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_rows(gate.tokens, rows_per_block(gate.width), threads, [&](std::int64_t start, std::int64_t stop, int) {
      for (std::int64_t t = start; t < stop; t++) {
        const T *d = row_of<T>(grad, t, 0), *g = row_of<T>(gate, t, 0), *u = row_of<T>(up, t, 0);
        T *to_gate = static_cast<T*>(grad_gate) + t * gate_stride, *to_up = static_cast<T*>(grad_up) + t * up_stride;
        columns(gate.width, [&](std::int64_t j, auto part, int) {
          const Vec x = load(g + j, part), dy = load(d + j, part);
          const Sigmoid s = sigmoid(x);
          store(to_gate + j, dy * load(u + j, part) * s.value * (1.0f + x * s.rest), part);
          store(to_up + j, dy * x * s.value, part);
        });
      }
    });
  });
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
