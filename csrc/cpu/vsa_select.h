// The k largest of a row of scores, ties by the lower index, as an ascending list.
#pragma once
#include "vsa.h"
#include "vec.h"

namespace megagen::MEGAGEN_ISA {
// Whole numbers in the order of the floats; 0 and -0 are one.
MEGAGEN_INLINE int32_t ordered(float x) {
  x += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// Writes topk numbers, the list and zeros after it, and returns the length of the list: at most topk, no
// entry of size 0. Bit by bit it finds the largest threshold that enough keys reach. keys: n numbers of
// memory.
static inline Index select_row(const float* scores, const int32_t* sizes, Index n, Index topk, int32_t* keys,
                               int32_t* list) {
  Index real = 0;
  for (Index i = 0; i < n; ++i) {
    keys[i] = sizes[i] > 0 ? ordered(scores[i]) : INT32_MIN;
    real += sizes[i] > 0;
  }
  const int32_t wanted = static_cast<int32_t>(real < topk ? real : topk);
  int32_t threshold = INT32_MIN;
  for (int bit = 31; bit >= 0 && wanted > 0; --bit) {
    const int32_t higher = static_cast<int32_t>(static_cast<uint32_t>(threshold) + (uint32_t{1} << bit));
    int32_t reach = 0;
    for (Index i = 0; i < n; ++i) reach += keys[i] >= higher;
    if (reach >= wanted) threshold = higher;
  }
  int32_t above = 0;
  for (Index i = 0; i < n; ++i) above += keys[i] > threshold;
  int32_t ties = wanted - above;
  Index count = 0;
  for (Index i = 0; i < n && count < wanted; ++i) {
    if (sizes[i] <= 0 || keys[i] < threshold || (keys[i] == threshold && ties-- <= 0)) continue;
    list[count++] = static_cast<int32_t>(i);
  }
  for (Index i = count; i < topk; ++i) list[i] = 0;
  return count;
}
}  // namespace megagen::MEGAGEN_ISA
