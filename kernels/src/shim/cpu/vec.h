// Sixteen floats at a time in GCC's vector extensions: the same lanes on every instruction set, so the order of every
// sum is fixed by the data's position alone. Included once per instruction set, inside its own namespace; nothing here
// may call into headers with out-of-line inline functions, which the linker would share between instruction sets.
#pragma once
#include <cstddef>
#include <cstdint>

namespace {

struct bf16 {
  uint16_t bits;
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int64_t LANES = 16;

ALWAYS_INLINE f32x16 splat(float value) { return value - f32x16{}; }

ALWAYS_INLINE f32x16 widen(u16x16 bits) {
  u32x16 wide = __builtin_convertvector(bits, u32x16) << 16;
  return (f32x16)wide;
}

// Round to nearest even; every NaN becomes the quiet one.
ALWAYS_INLINE u16x16 narrow(f32x16 value) {
  u32x16 bits = (u32x16)value;
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32x16 quiet = rounded * 0 + 0x7fc0;
  rounded = (value == value) ? rounded : quiet;
  return __builtin_convertvector(rounded, u16x16);
}

ALWAYS_INLINE f32x16 load(const float* from) {
  f32x16 value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

ALWAYS_INLINE f32x16 load(const bf16* from) {
  u16x16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return widen(bits);
}

ALWAYS_INLINE void store(float* to, f32x16 value) { __builtin_memcpy(to, &value, sizeof(value)); }

ALWAYS_INLINE void store(bf16* to, f32x16 value) {
  u16x16 bits = narrow(value);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// The first `count` lanes from memory, `fill` in the rest.
template <class T>
ALWAYS_INLINE f32x16 load_part(const T* from, int64_t count, float fill = 0.0f) {
  f32x16 value = splat(fill);
  T lanes[LANES] = {};
  __builtin_memcpy(lanes, from, count * sizeof(T));
  f32x16 read = load(lanes);
  for (int64_t i = 0; i < count; i++) value[i] = read[i];
  return value;
}

template <class T>
ALWAYS_INLINE void store_part(T* to, f32x16 value, int64_t count) {
  T lanes[LANES];
  store(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(T));
}

// Calls `full(i)` for each whole vector and `part(i, count)` for the rest.
template <class Full, class Part>
ALWAYS_INLINE void for_vectors(int64_t length, Full full, Part part) {
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) full(i);
  if (i < length) part(i, length - i);
}

// The lanes' sum by halving: lane i with lane i + 8, then + 4, + 2, + 1.
ALWAYS_INLINE float sum_lanes(f32x16 value) {
  float lanes[LANES];
  __builtin_memcpy(lanes, &value, sizeof(lanes));
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

ALWAYS_INLINE float max_lanes(f32x16 value) {
  float lanes[LANES];
  __builtin_memcpy(lanes, &value, sizeof(lanes));
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

ALWAYS_INLINE f32x16 vec_max(f32x16 a, f32x16 b) { return a > b ? a : b; }

ALWAYS_INLINE f32x16 vec_abs(f32x16 value) { return (f32x16)((u32x16)value & 0x7fffffffu); }

ALWAYS_INLINE f32x16 vec_sqrt(f32x16 value) {
  f32x16 root;
  for (int i = 0; i < LANES; i++) root[i] = __builtin_sqrtf(value[i]);
  return root;
}

// e^x to about one unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial (the coefficients
// are Cephes' expf). 0 below -87, where the result would be subnormal; infinity above 88.7; NaN stays NaN.
ALWAYS_INLINE f32x16 vec_exp(f32x16 x) {
  const float round_magic = 12582912.0f;
  f32x16 shifted = x * 1.44269504088896341f + round_magic;
  f32x16 n = shifted - round_magic;
  f32x16 r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, because n may be 128.
  i32x16 whole = (i32x16)shifted - 0x4b400000;
  i32x16 half = whole >> 1;
  f32x16 scale_low = (f32x16)((half + 127) << 23);
  f32x16 scale_high = (f32x16)((whole - half + 127) << 23);
  f32x16 result = p * scale_low * scale_high;
  result = x < -87.0f ? splat(0.0f) : result;
  result = x > 88.73f ? splat(__builtin_inff()) : result;
  return result;
}

}  // namespace
