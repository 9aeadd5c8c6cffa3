#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const bool finite = (x.bits & 0x7c00) != 0x7c00;
  uint32_t wide = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  value = finite ? value * 0x1p112f : (x.bits & 0x3ff ? NAN : INFINITY);
  return x.bits & 0x8000 ? -value : value;
}

// To nearest, ties to even.
inline __half __float2half_rn(float x) {
  const float size = std::fabs(x);
  uint32_t wide;
  std::memcpy(&wide, &size, sizeof wide);
  uint32_t bits = ((wide + 0xfff + ((wide >> 13) & 1)) >> 13) - (112 << 10);
  if (size < 0x1p-14f) bits = static_cast<uint32_t>(std::nearbyint(size * 0x1p24f));
  if (size >= 65520.0f) bits = 0x7c00;
  if (x != x) bits = 0x7e00;
  return {static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0))};
}
