// Loops over independent units, and the sums over tokens that follow a backward.
#pragma once
#include <omp.h>

#include "kernels.h"
#include "vec.h"

namespace megagen::MEGAGEN_ISA {
// f(unit) for each unit; with one thread OpenMP's pool is never touched (a forked child may have none).
template <class F>
static inline void parallel_for(Index units, int threads, F f) {
  if (threads <= 1) {
    for (Index unit = 0; unit < units; ++unit) f(unit);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Index unit = 0; unit < units; ++unit) f(unit);
}

// f(unit, worker) where units differ in size: whoever is free takes the next; worker is below threads.
template <class F>
static inline void parallel_workers(Index units, int threads, F f) {
  if (threads <= 1) {
    for (Index unit = 0; unit < units; ++unit) f(unit, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (Index unit = 0; unit < units; ++unit) f(unit, omp_get_thread_num());
}

MEGAGEN_INLINE Index first_token(const Segments& segments, Index segment) {
  if (segments.bounds) return segments.bounds[segment];
  const Index per_run = (segments.run + kSegment - 1) / kSegment;
  return segment / per_run * segments.run + segment % per_run * kSegment;
}
MEGAGEN_INLINE Index end_token(const Segments& segments, Index segment) {
  if (segments.bounds) return segments.bounds[segment + 1];
  const Index first = first_token(segments, segment), end = (first / segments.run + 1) * segments.run;
  return first + kSegment < end ? first + kSegment : end;
}
MEGAGEN_INLINE Index row_of(const Segments& segments, Index token) {
  return segments.rows ? segments.rows[token] : token / segments.run;
}
MEGAGEN_INLINE Segments plain_segments(Index num_tokens) {
  return {num_tokens, (num_tokens + kSegment - 1) / kSegment, nullptr, nullptr, num_tokens};
}
MEGAGEN_INLINE const float* line_of(const Modulation& m, Index row, Index b) {
  return m.data + row * m.row_stride + b * m.batch_stride;
}

// out[row, b or 0, d] = sum of partial[segment, b, part, d] over the segments of that row, in order.
struct Gather {
  const Segments& segments;
  Index batch, dim, num_rows, mod_batch, parts;
};
static inline void sum_segments(const Gather& g, const float* partial, Index part, float* out, int threads) {
  constexpr Index kColumns = 256;
  const Index blocks = (g.dim + kColumns - 1) / kColumns;
  parallel_for(blocks * g.mod_batch, threads, [&](Index unit) {
    const Index m = unit / blocks, begin = unit % blocks * kColumns;
    const Index width = g.dim - begin < kColumns ? g.dim - begin : kColumns;
    for (Index row = 0; row < g.num_rows; ++row)
      for (Index d = 0; d < width; ++d) out[(row * g.mod_batch + m) * g.dim + begin + d] = 0;
    for (Index segment = 0; segment < g.segments.count; ++segment) {
      const Index row = row_of(g.segments, first_token(g.segments, segment));
      float* sum = out + (row * g.mod_batch + m) * g.dim + begin;
      const Index last = g.mod_batch == 1 ? g.batch : m + 1;
      for (Index b = g.mod_batch == 1 ? 0 : m; b < last; ++b) {
        const float* line = partial + ((segment * g.batch + b) * g.parts + part) * g.dim + begin;
        for (Index d = 0; d < width; ++d) sum[d] += line[d];
      }
    }
  });
}
}  // namespace megagen::MEGAGEN_ISA
