// Exponentials of maps of scores, in powers of two: scores are multiplied by scale * log2(e) on the way.
#pragma once
#include "vsa_gemm.h"

namespace megagen::MEGAGEN_ISA {
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^x with a relative error of about 2e-7, exactly 0 below 2^-126 (no subnormal number is ever made); x
// at most 127. A NaN stays one.
MEGAGEN_INLINE Vec exp2(Vec x) {
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = f * 1.5403530394e-4f + 1.3333558146e-3f;
  p = p * f + 9.6181291076e-3f;
  p = p * f + 5.5504108664e-2f;
  p = p * f + 2.4022650696e-1f;
  p = p * f + 6.9314718056e-1f;
  p = p * f + 1.0f;
  IVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -126.0f ? Vec{} : p * power;
}

// The largest of the lanes.
MEGAGEN_INLINE float largest(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}
}  // namespace megagen::MEGAGEN_ISA
