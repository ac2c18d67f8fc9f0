// Vectors of floats, nearly without intrinsics: GCC and Clang turn them into the instruction set the file is
// compiled for. Every name sits in the namespace of that instruction set, and no standard template is
// used, so that the linker can never merge AVX2 code into the generic build.
#pragma once
#if MEGAGEN_X86
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

namespace megagen::MEGAGEN_ISA {
using Index = int64_t;
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IVec __attribute__((vector_size(kWidth * 4)));

#define MEGAGEN_INLINE static inline __attribute__((always_inline))
#define MEGAGEN_METHOD inline __attribute__((always_inline))

template <class T>
MEGAGEN_INLINE T load(const float* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
MEGAGEN_INLINE void store(float* p, T v) {
  std::memcpy(p, &v, sizeof v);
}
MEGAGEN_INLINE float total(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The pairs (2h, 2h + 1) turned round.
#if defined(__AVX512F__)
#define MEGAGEN_PAIRS 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#elif defined(__AVX2__)
#define MEGAGEN_PAIRS 1, 0, 3, 2, 5, 4, 7, 6
#else
#define MEGAGEN_PAIRS 1, 0, 3, 2
#endif
MEGAGEN_INLINE Vec swap_pairs(Vec v) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, MEGAGEN_PAIRS);
#else
  return __builtin_shuffle(v, IVec{MEGAGEN_PAIRS});
#endif
}
// f(tag, i) of the other one of each pair.
template <class F>
MEGAGEN_INLINE Vec partner(Vec, Index i, F f) {
  return swap_pairs(f(Vec{}, i));
}
template <class F>
MEGAGEN_INLINE float partner(float, Index i, F f) {
  return f(0.0f, i ^ 1);
}

// f(tag, i) for i = 0, W, 2W... with tag a Vec, then one by one with tag a float.
template <class F>
MEGAGEN_INLINE void for_each(Index n, F f) {
  Index i = 0;
  for (; i + kWidth <= n; i += kWidth) f(Vec{}, i);
  for (; i < n; ++i) f(0.0f, i);
}

// Two sums over i of what f(tag, i, a, b) adds to a and b, over one or several stretches; four chains
// hide the latency of addition.
struct Sums {
  Vec a[4] = {}, b[4] = {};
  float tail_a = 0, tail_b = 0;

  template <class F>
  MEGAGEN_METHOD void add(Index n, F f) {
    Index i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
      for (int c = 0; c < 4; ++c) f(Vec{}, i + c * kWidth, a[c], b[c]);
    for (int c = 0; i + kWidth <= n; i += kWidth, ++c) f(Vec{}, i, a[c], b[c]);
    for (; i < n; ++i) f(0.0f, i, tail_a, tail_b);
  }
  MEGAGEN_METHOD float total_a() const { return total((a[0] + a[1]) + (a[2] + a[3])) + tail_a; }
  MEGAGEN_METHOD float total_b() const { return total((b[0] + b[1]) + (b[2] + b[3])) + tail_b; }
};
template <class F>
MEGAGEN_INLINE Sums sum_each(Index n, F f) {
  Sums sums;
  sums.add(n, f);
  return sums;
}

// e^x with a relative error of about 1e-7; x is clamped to [-87, 88].
MEGAGEN_INLINE Vec exp(Vec x) {
  const Vec lo = Vec{} - 87.0f, hi = Vec{} + 88.0f;
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = x * 1.44269504089f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693145751953125f) - n * 1.428606765330187e-06f;  // ln 2 in two parts
  Vec p = Vec{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
MEGAGEN_INLINE float exp(float x) { return exp(Vec{} + x)[0]; }

// For numbers that are not read soon: their lines are not fetched to be overwritten. `to` is aligned to a
// vector.
MEGAGEN_INLINE void store_past_cache(float* to, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)x);
#else
  store(to, x);
#endif
}
// Before other threads read them.
MEGAGEN_INLINE void fence_past_cache() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
}  // namespace megagen::MEGAGEN_ISA
