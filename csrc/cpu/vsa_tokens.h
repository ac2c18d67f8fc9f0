// Blocks of tokens between memory (fp32 or bf16, any strides) and panels (fp32, see vsa_gemm.h).
#pragma once
#include "vsa_gemm.h"

namespace megagen::MEGAGEN_ISA {
constexpr Index kAheadRows = 8;

// Element of the first number of a slot, -1 where the slot has no token.
MEGAGEN_INLINE Index element_of(const Tokens& x, Index b, Index h, Index slot) {
  const Index token = x.token_of_slot ? x.token_of_slot[slot] : slot;
  return token < 0 ? -1 : b * x.batch_stride + h * x.head_stride + token * x.token_stride;
}

MEGAGEN_INLINE void read(const Tokens& x, Index element, Index n, float* out) {
  if (!x.bf16) {
    std::memcpy(out, static_cast<const float*>(x.data) + element, n * sizeof(float));
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(x.data) + element;
  for (Index i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// Into the cache.
MEGAGEN_INLINE void fetch(const Tokens& x, Index element, Index n) {
  const Index size = x.bf16 ? sizeof(uint16_t) : sizeof(float);
  const char* at = static_cast<const char*>(x.data) + element * size;
  for (Index byte = 0; byte < n * size; byte += 64) __builtin_prefetch(at + byte, 0, 2);
}

// Nearest bf16, ties to even; a NaN stays one.
MEGAGEN_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}
MEGAGEN_INLINE float rounded_to_bf16(float x) {
  const uint32_t bits = static_cast<uint32_t>(to_bf16(x)) << 16;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
MEGAGEN_INLINE void write(const Tokens& x, Index element, Index n, const float* in) {
  if (!x.bf16) {
    std::memcpy(static_cast<float*>(x.data) + element, in, n * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(x.data) + element;
  for (Index i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
}

// The same for at most kPanel numbers, most often that many.
MEGAGEN_INLINE void read_part(const Tokens& x, Index element, Index n, float* out) {
  if (n == kPanel)
    read(x, element, kPanel, out);
  else
    read(x, element, n, out);
}
MEGAGEN_INLINE void write_part(const Tokens& x, Index element, Index n, const float* in) {
  if (n == kPanel)
    write(x, element, kPanel, in);
  else
    write(x, element, n, in);
}

// The first `rows` slots from `slot` on (each has a token), fetched a few ahead; what the last panel has
// beyond dim is 0.
static inline void read_panels(const Tokens& x, Index b, Index h, Index slot, Index rows, Index dim, float* panels) {
  for (Index i = 0; i < rows; ++i) {
    const Index element = element_of(x, b, h, slot + i);
    if (i + kAheadRows < rows) fetch(x, element_of(x, b, h, slot + i + kAheadRows), dim);
    float* line = panels + i * kPanel;
    for (Index d = 0; d < dim; d += kPanel, line += kPanelSize) {
      const Index n = smaller(kPanel, dim - d);
      read_part(x, element + d, n, line);
      for (Index e = n; e < kPanel; ++e) line[e] = 0;
    }
  }
}

// The same slots as columns: panels of dim lines, kPanel slots a line; lanes past `rows` are 0. `panels`
// is what read_panels made of them.
static inline void turn_panels(const float* panels, Index rows, Index dim, float* turned) {
  for (Index first = 0; first < rows; first += kPanel, turned += dim * kPanel)
    for (Index d = 0; d < dim; ++d) {
      const float* from = panels + d / kPanel * kPanelSize + first * kPanel + d % kPanel;
      float* to = turned + d * kPanel;
      const Index n = smaller(kPanel, rows - first);
      for (Index i = 0; i < n; ++i) to[i] = from[i * kPanel];
      for (Index i = n; i < kPanel; ++i) to[i] = 0;
    }
}
// Floats of turned panels.
MEGAGEN_INLINE Index turned_size(Index dim) { return ceil_div(kBlock, kPanel) * kPanel * dim; }

// A row `x` of a block, divided by its size: what each token gets. Null where x has no data.
static inline const float* read_share(const Tokens& x, Index b, Index h, Index block, Index size, Index dim,
                                      float* share) {
  if (!x.data || size == 0) return nullptr;
  read(x, element_of(x, b, h, block), dim, share);
  for (Index d = 0; d < dim; ++d) share[d] /= static_cast<float>(size);
  return share;
}

// Rows of panels times scale[row] (null: 1) plus share (null: 0) to the first `rows` of `slots` slots; the
// others become 0.
static inline void write_panels(const Tokens& x, Index b, Index h, Index slot, Index rows, Index slots, Index dim,
                                const float* panels, const float* scale = nullptr, const float* share = nullptr) {
  for (Index i = 0; i < slots; ++i) {
    const Index element = element_of(x, b, h, slot + i);
    if (element < 0) continue;
    const float* line = panels + i * kPanel;
    for (Index d = 0; d < dim; d += kPanel, line += kPanelSize) {
      const Index n = smaller(kPanel, dim - d);
      float numbers[kPanel] = {};
      if (i < rows)
        for (Index e = 0; e < kPanel; ++e) numbers[e] = scale ? line[e] * scale[i] : line[e];
      if (i < rows && share)
        for (Index e = 0; e < n; ++e) numbers[e] += share[d + e];
      write_part(x, element + d, n, numbers);
    }
  }
}
}  // namespace megagen::MEGAGEN_ISA
