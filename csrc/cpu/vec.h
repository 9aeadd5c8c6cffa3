// Vectors of float32 for the instruction set that this file is compiled for, and loads and stores of every dtype.
//
// The compiler's own vector types do the arithmetic (a * b + c becomes one fused instruction where there is one);
// intrinsics appear only where a type cannot say it: half precision and streaming stores. Everything lies in a namespace
// named after the level, since the same sources are compiled once per level and linked together. For the same reason
// no inline function of the standard library may be used here: the linker would keep one copy for all levels.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mtllm::cpu::MTLLM_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec widen(const Float16*, Halves halves) {
#if defined(__AVX512F__)
  return bits_of<Vec>(_mm512_cvtph_ps(bits_of<__m256i>(halves)));
#elif defined(__F16C__)
  return bits_of<Vec>(_mm256_cvtph_ps(bits_of<__m128i>(halves)));
#else
  const Bits half = __builtin_convertvector(halves, Bits);
  // The exponent's bias differs by 112; a product moves it, and makes subnormal halves normal on the way.
  const Bits finite = bits_of<Bits>(bits_of<Vec>((half & 0x7fff) << 13) * 0x1p112f);
  const Bits magnitude = (half & 0x7c00) == 0x7c00 ? ((half & 0x3ff) << 13 | 0x7f800000) : finite;
  return bits_of<Vec>(magnitude | (half & 0x8000) << 16);
#endif
}

inline Halves narrow(const Float16*, Vec value) {
#if defined(__AVX512F__)
  return bits_of<Halves>(_mm512_cvtps_ph(bits_of<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits_of<Halves>(_mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits all = bits_of<Bits>(value), magnitude = all & 0x7fffffff;
  const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal half's digits, rounded to nearest even, at the end of the mantissa.
  const Bits subnormal = bits_of<Bits>(bits_of<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const Bits special = magnitude > 0x7f800000 ? (Bits{} + 0x7e00) : (Bits{} + 0x7c00);
  const Bits finite = magnitude < 0x38800000 ? subnormal : normal;
  const Bits half = magnitude >= 0x47800000 ? special : finite;
  return __builtin_convertvector(half | (all & 0x80000000) >> 16, Halves);
#endif
}

inline Vec widen(const BFloat16*, Halves halves) {
  return bits_of<Vec>(__builtin_convertvector(halves, Bits) << 16);
}

inline Halves narrow(const BFloat16*, Vec value) {
  const Bits all = bits_of<Bits>(value);
  const Bits nearest_even = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  // Rounding could carry a NaN's digits into its sign.
  const Bits rounded = (all & 0x7fffffff) > 0x7f800000 ? (all >> 16 | 0x40) : nearest_even;
  return __builtin_convertvector(rounded, Halves);
}

// The columns that one step of a loop handles: all lanes, or the first `count` at a row's end.
struct Full {};
struct Tail {
  int count;
};

inline Vec load(const float* p, Full) {
  Vec value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <typename T>
inline Vec load(const T* p, Full) {
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return widen(p, halves);
}

inline void store(float* p, Vec value, Full) { __builtin_memcpy(p, &value, sizeof value); }

template <typename T>
inline void store(T* p, Vec value, Full) {
  const Halves halves = narrow(p, value);
  __builtin_memcpy(p, &halves, sizeof halves);
}

// The lanes beyond the row's end read as zero and are not written.
template <typename T>
inline Vec load(const T* p, Tail tail) {
  T lanes[kLanes] = {};
  for (int i = 0; i < tail.count; i++) lanes[i] = p[i];
  return load(lanes, Full{});
}

template <typename T>
inline void store(T* p, Vec value, Tail tail) {
  T lanes[kLanes];
  store(lanes, value, Full{});
  for (int i = 0; i < tail.count; i++) p[i] = lanes[i];
}

// A sum over a row in four independent parts: one accumulator would wait for the addition before it.
struct Sum {
  Vec parts[4] = {};

  float total() const {
    const Vec sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    float lanes[kLanes];
    store(lanes, sum, Full{});
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

// body(first column, Full or Tail, which part of a Sum) over a row.
template <typename Body>
__attribute__((always_inline)) inline void columns(std::int64_t width, Body body) {
  std::int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) {
    body(j, Full{}, 0);
    body(j + kLanes, Full{}, 1);
    body(j + 2 * kLanes, Full{}, 2);
    body(j + 3 * kLanes, Full{}, 3);
  }
  for (; j + kLanes <= width; j += kLanes) body(j, Full{}, 0);
  if (j < width) body(j, Tail{static_cast<int>(width - j)}, 1);
}

template <typename T>
inline float sum_of_squares(const T* row, std::int64_t width) {
  Sum sum;
  columns(width, [&](std::int64_t j, auto part, int i) {
    const Vec h = load(row + j, part);
    sum.parts[i] += h * h;
  });
  return sum.total();
}

inline float rstd_of(float squares, std::int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);
}

inline void fill_zero(float* row, std::int64_t width) {
  __builtin_memset(row, 0, static_cast<std::size_t>(width) * sizeof(float));
}

// e^x for x <= 0, to 2 units in the last place; NaN stays NaN.
inline Vec exponential(Vec x) {
  const Vec bounded = x < -87.0f ? Vec{} - 87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer
  const Vec whole = (bounded * 1.44269504f + kRound) - kRound;
  const Vec rest = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts
  Vec sum = rest * (1.0f / 5040) + (1.0f / 720);
  sum = sum * rest + (1.0f / 120);
  sum = sum * rest + (1.0f / 24);
  sum = sum * rest + (1.0f / 6);
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  typedef std::int32_t Integers __attribute__((vector_size(kLanes * 4)));
  return sum * bits_of<Vec>((__builtin_convertvector(whole, Integers) + 127) << 23);
}

// function(pointer of the dtype's type); half of a dispatch that is written once.
template <typename Function>
inline void with_type(DType dtype, Function function) {
  if (dtype == DType::kFloat32) return function(static_cast<float*>(nullptr));
  if (dtype == DType::kFloat16) return function(static_cast<Float16*>(nullptr));
  return function(static_cast<BFloat16*>(nullptr));
}

}  // namespace mtllm::cpu::MTLLM_LEVEL
