// What surrounds the two stages, each in one pass over the tokens: raster order to blocks with their
// means, the gated sum back to raster order, and the gradients of both.
#include "parallel.h"
#include "vsa_tokens.h"

#define MEGAGEN_LAMBDA __attribute__((always_inline))  // so that whole parts have a fixed length

namespace megagen::MEGAGEN_ISA {
namespace {
constexpr Index kPart = 128;  // numbers of a token at a time
constexpr Index kParts = 16;  // of a token that are taken together
constexpr Index kAhead = 8;   // parts between the one that is read and the one that is fetched

// Numbers [d, d + n) of a block's tokens in one head, n at most kPart, and what is kept for them; `ahead`
// tokens further on are fetched.
struct Column {
  Index b, h, block, d, n, ahead;
  float *kept, *sum;
};
}  // namespace

// For each block: begin(c, n) for its columns, row(c, n, i) for each of its slots, end(c, n). Whole tokens are
// read where their heads lie side by side (in raster order): several times as fast as head after head.
template <class Begin, class Row, class End>
static inline void for_each_block(const Glue& op, int threads, Begin begin, Row row, End end) {
  const bool together = op.x.head_stride < op.x.token_stride;
  const Index each = ceil_div(op.dim, kPart), width = together ? kParts : 1;
  const Index groups = ceil_div(op.heads * each, width);
  parallel_workers(op.batch * op.num_blocks * groups, threads, [&](Index unit, int) {
    const Index b = unit / (op.num_blocks * groups), rest = unit % (op.num_blocks * groups);
    const Index block = together ? rest / groups : rest % op.num_blocks;
    const Index first = (together ? rest % groups : rest / op.num_blocks) * width;
    const Index count = smaller(width, op.heads * each - first);
    float memory[2 * kParts * kPart];
    Column columns[kParts];
    const auto for_each_column = [&](auto f) MEGAGEN_LAMBDA {
      for (Index c = 0; c < count; ++c) {
        if (columns[c].n == kPart)
          f(columns[c], kPart);
        else
          f(columns[c], columns[c].n);
      }
    };
    for (Index c = 0; c < count; ++c) {
      const Index part = first + c, d = part % each * kPart;
      float* kept = memory + 2 * c * kPart;
      columns[c] = {b, part / each, block, d, smaller(kPart, op.dim - d),
                    ceil_div(kAhead, count), kept, kept + kPart};
    }
    for_each_column(begin);
    for (Index i = 0; i < kBlock; ++i)
      for_each_column([&](const Column& c, Index n) MEGAGEN_LAMBDA { row(c, n, i); });
    for_each_column(end);
  });
}

MEGAGEN_INLINE Index place(const Tokens& x, const Column& c, Index i) {
  return element_of(x, c.b, c.h, c.block * kBlock + i) + c.d;
}
MEGAGEN_INLINE Index place(const Tokens& x, const Column& c) { return element_of(x, c.b, c.h, c.block) + c.d; }

// A later token of the column into the cache: those of a few heads lie too far apart for the processor to
// foresee.
MEGAGEN_INLINE void fetch(const Glue& op, const Tokens& x, const Column& c, Index i, Index n) {
  const Index slot = c.block * kBlock + i + c.ahead;
  const Index element = slot < op.num_blocks * kBlock ? element_of(x, c.b, c.h, slot) : -1;
  if (element >= 0) fetch(x, element + c.d, n);
}

// A token's numbers, 0 after them, into the panels of its block.
MEGAGEN_INLINE void write_line(const Glue& op, const Column& c, Index i, Index n, const float* x) {
  const Index block = (c.b * op.heads + c.h) * op.num_blocks + c.block;
  float* line = op.panels + block * panels_size(op.dim) + c.d / kPanel * kPanelSize + i * kPanel;
  for (Index e = 0; e < n; e += kPanel, line += kPanelSize)
    for (Index v = 0; v < kPanel; v += kWidth) store_past_cache(line + v, load<Vec>(x + e + v));
}

// A token's numbers, past the cache where they begin and end with vectors.
MEGAGEN_INLINE void write_token(const Tokens& x, Index element, Index n, const float* in) {
  float* to = static_cast<float*>(x.data) + element;
  if (x.bf16 || n % kWidth || reinterpret_cast<uintptr_t>(to) % sizeof(Vec)) return write(x, element, n, in);
  for (Index v = 0; v < n; v += kWidth) store_past_cache(to + v, load<Vec>(in + v));
}

void block_mean(const Glue& op, int threads) {
  for_each_block(
      op, threads,
      [&](const Column& c, Index n) MEGAGEN_LAMBDA {
        for (Index e = 0; e < n; ++e) c.sum[e] = 0;
      },
      [&](const Column& c, Index n, Index i) MEGAGEN_LAMBDA {
        float x[kPart] = {};
        if (i < op.sizes[c.block]) {
          fetch(op, op.x, c, i, n);
          read(op.x, place(op.x, c, i), n, x);
          for (Index e = 0; e < n; ++e) c.sum[e] += x[e];
          if (op.panels) write_line(op, c, i, n, x);
        }
        if (op.slots.data) write(op.slots, place(op.slots, c, i), n, x);
      },
      [&](const Column& c, Index n) MEGAGEN_LAMBDA {
        const Index size = op.sizes[c.block];
        for (Index e = 0; e < n; ++e) c.sum[e] = size > 0 ? c.sum[e] / static_cast<float>(size) : 0.0f;
        write(op.mean, place(op.mean, c), n, c.sum);
        if (op.panels) fence_past_cache();
      });
}

// dx = the slot's gradient + its share of the mean's.
void block_mean_backward(const Glue& op, int threads) {
  for_each_block(
      op, threads,
      [&](const Column& c, Index n) MEGAGEN_LAMBDA {
        const Index size = op.sizes[c.block];
        read(op.mean, place(op.mean, c), n, c.kept);
        for (Index e = 0; e < n; ++e) c.kept[e] = size > 0 ? c.kept[e] / static_cast<float>(size) : 0.0f;
      },
      [&](const Column& c, Index n, Index i) MEGAGEN_LAMBDA {
        if (i >= op.sizes[c.block]) return;
        float dx[kPart];
        read(op.slots, place(op.slots, c, i), n, dx);
        for (Index e = 0; e < n; ++e) dx[e] += c.kept[e];
        write(op.x, place(op.x, c, i), n, dx);
      },
      [](const Column&, Index) {});
}

// x = slots + gate * mean of the token's block.
void combine(const Glue& op, int threads) {
  for_each_block(
      op, threads, [&](const Column& c, Index n) MEGAGEN_LAMBDA { read(op.mean, place(op.mean, c), n, c.kept); },
      [&](const Column& c, Index n, Index i) MEGAGEN_LAMBDA {
        if (i >= op.sizes[c.block]) return;
        float gate[kPart], out[kPart];
        for (Index e = 0; e < n; ++e) gate[e] = 1;
        if (op.gate.data) fetch(op, op.gate, c, i, n);
        read(op.slots, place(op.slots, c, i), n, out);
        if (op.gate.data) read(op.gate, place(op.gate, c, i), n, gate);
        for (Index e = 0; e < n; ++e) out[e] += gate[e] * c.kept[e];
        write_token(op.x, place(op.x, c, i), n, out);
      },
      [](const Column&, Index) MEGAGEN_LAMBDA { fence_past_cache(); });
}

// From x = the gradient of the result: slots, dmean = sum of gate x over the block, dgate = mean x.
void combine_backward(const Glue& op, int threads) {
  for_each_block(
      op, threads,
      [&](const Column& c, Index n) MEGAGEN_LAMBDA {
        read(op.mean, place(op.mean, c), n, c.kept);
        for (Index e = 0; e < n; ++e) c.sum[e] = 0;
      },
      [&](const Column& c, Index n, Index i) MEGAGEN_LAMBDA {
        float gate[kPart], dgate[kPart], x[kPart] = {};
        if (i < op.sizes[c.block]) {
          for (Index e = 0; e < n; ++e) gate[e] = 1;
          fetch(op, op.x, c, i, n);
          read(op.x, place(op.x, c, i), n, x);
          if (op.gate.data) {
            fetch(op, op.gate, c, i, n);
            read(op.gate, place(op.gate, c, i), n, gate);
            for (Index e = 0; e < n; ++e) dgate[e] = x[e] * c.kept[e];
            write(op.dgate, place(op.dgate, c, i), n, dgate);
          }
          for (Index e = 0; e < n; ++e) c.sum[e] += gate[e] * x[e];
        }
        if (op.slots.data) write(op.slots, place(op.slots, c, i), n, x);
      },
      [&](const Column& c, Index n) MEGAGEN_LAMBDA { write(op.dmean, place(op.dmean, c), n, c.sum); });
}
}  // namespace megagen::MEGAGEN_ISA
