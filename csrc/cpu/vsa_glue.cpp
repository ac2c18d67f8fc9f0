// What surrounds the two stages, each in one pass over the tokens: raster order to blocks with their
// means, the gated sum back to raster order, and the gradients of both.
#include "parallel.h"
#include "vsa_tokens.h"

#define MEGAGEN_LAMBDA __attribute__((always_inline))  // so that whole parts have a fixed length

namespace megagen::MEGAGEN_ISA {
namespace {
constexpr Index kPart = 128;  // numbers of a token at a time
}

// f(b, h, block, d, n): numbers [d, d + n) of a block's tokens, n at most kPart.
template <class F>
static inline void for_each_part(const Glue& op, int threads, F f) {
  parallel_workers(op.batch * op.heads * op.num_blocks, threads, [&](Index unit, int) {
    const Index head = unit / op.num_blocks, block = unit % op.num_blocks;
    Index d = 0;
    for (; d + kPart <= op.dim; d += kPart) f(head / op.heads, head % op.heads, block, d, kPart);
    if (d < op.dim) f(head / op.heads, head % op.heads, block, d, op.dim - d);
  });
}

void block_mean(const Glue& op, int threads) {
  for_each_part(op, threads, [&](Index b, Index h, Index block, Index d, Index n) MEGAGEN_LAMBDA {
    const Index size = op.sizes[block];
    float sum[kPart] = {}, x[kPart];
    for (Index i = 0; i < kBlock; ++i) {
      const Index slot = block * kBlock + i;
      for (Index e = 0; e < n; ++e) x[e] = 0;
      if (i < size) read(op.x, element_of(op.x, b, h, slot) + d, n, x);
      for (Index e = 0; e < n; ++e) sum[e] += x[e];
      if (op.slots.data) write(op.slots, element_of(op.slots, b, h, slot) + d, n, x);
    }
    for (Index e = 0; e < n; ++e) sum[e] = size > 0 ? sum[e] / static_cast<float>(size) : 0.0f;
    write(op.mean, element_of(op.mean, b, h, block) + d, n, sum);
  });
}

// dx = the slot's gradient + its share of the mean's.
void block_mean_backward(const Glue& op, int threads) {
  for_each_part(op, threads, [&](Index b, Index h, Index block, Index d, Index n) MEGAGEN_LAMBDA {
    const Index size = op.sizes[block];
    float share[kPart], dx[kPart];
    read(op.mean, element_of(op.mean, b, h, block) + d, n, share);
    for (Index e = 0; e < n; ++e) share[e] = size > 0 ? share[e] / static_cast<float>(size) : 0.0f;
    for (Index i = 0; i < size; ++i) {
      const Index slot = block * kBlock + i;
      read(op.slots, element_of(op.slots, b, h, slot) + d, n, dx);
      for (Index e = 0; e < n; ++e) dx[e] += share[e];
      write(op.x, element_of(op.x, b, h, slot) + d, n, dx);
    }
  });
}

// x = slots + gate * mean of the token's block.
void combine(const Glue& op, int threads) {
  for_each_part(op, threads, [&](Index b, Index h, Index block, Index d, Index n) MEGAGEN_LAMBDA {
    float coarse[kPart], gate[kPart], out[kPart];
    for (Index e = 0; e < n; ++e) gate[e] = 1;
    read(op.mean, element_of(op.mean, b, h, block) + d, n, coarse);
    for (Index i = 0; i < op.sizes[block]; ++i) {
      const Index slot = block * kBlock + i;
      read(op.slots, element_of(op.slots, b, h, slot) + d, n, out);
      if (op.gate.data) read(op.gate, element_of(op.gate, b, h, slot) + d, n, gate);
      for (Index e = 0; e < n; ++e) out[e] += gate[e] * coarse[e];
      write(op.x, element_of(op.x, b, h, slot) + d, n, out);
    }
  });
}

// From x = the gradient of the result: slots, dmean = sum of gate x over the block, dgate = mean x.
void combine_backward(const Glue& op, int threads) {
  for_each_part(op, threads, [&](Index b, Index h, Index block, Index d, Index n) MEGAGEN_LAMBDA {
    float coarse[kPart], gate[kPart], sum[kPart] = {}, x[kPart];
    for (Index e = 0; e < n; ++e) gate[e] = 1;
    read(op.mean, element_of(op.mean, b, h, block) + d, n, coarse);
    for (Index i = 0; i < kBlock; ++i) {
      const Index slot = block * kBlock + i;
      for (Index e = 0; e < n; ++e) x[e] = 0;
      if (i < op.sizes[block]) {
        const Index token = element_of(op.x, b, h, slot) + d;
        read(op.x, token, n, x);
        if (op.gate.data) {
          float dgate[kPart];
          read(op.gate, element_of(op.gate, b, h, slot) + d, n, gate);
          for (Index e = 0; e < n; ++e) dgate[e] = x[e] * coarse[e];
          write(op.dgate, element_of(op.dgate, b, h, slot) + d, n, dgate);
        }
        for (Index e = 0; e < n; ++e) sum[e] += gate[e] * x[e];
      }
      write(op.slots, element_of(op.slots, b, h, slot) + d, n, x);
    }
    write(op.dmean, element_of(op.dmean, b, h, block) + d, n, sum);
  });
}
}  // namespace megagen::MEGAGEN_ISA
