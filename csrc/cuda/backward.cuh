// What both passes of the backward need: per-row numbers, and weights recomputed from raw scores.
//
// With P = exp(scale Q K^T - lse): dV = P^T dO, dP = dO V^T, dS = P (dP - delta), dQ = scale dS K,
// dK = scale dS^T Q (FlashAttention-2, section 2.3.2); delta = rowsum(o dO) - dlse, as d lse / d S = P.
// P and dS are rounded to bf16 before their products; scale is applied in fp32, after each product.
#pragma once
#include "tiles.cuh"

namespace megagen::cuda {

// Row statistics of a block: 64 exponents' references (lse * log2 e), then 64 deltas.
constexpr int kStats = 2 * kBlock;
constexpr int kStatsBytes = kStats * sizeof(float);
constexpr float kToBase2 = 1.4426950408889634f, kNever = __builtin_huge_valf();

// Columns that are no tokens count for nothing, whatever stands in them.
template <int N>
HW_DEVICE void mask_columns(float (&s)[N / 2], int size, int thread) {
  if (size < N) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] = fragment_column(thread, i) < size ? s[i] : 0.f;
  }
}

struct StatsArgs {
  const uint16_t *o, *grad;  // [BH, num_q, 64, D]
  const float *lse, *dlse;   // [BH, num_q, 64]; dlse or null
  const int* sizes;          // [num_q]
  float* stats;              // [BH, num_q, kStats]
  int64_t rows;              // BH * num_q * 64
  int num_q;
};

constexpr int kStatsThreads = 256, kLanesPerRow = 8;
struct alignas(16) Eight {
  uint16_t bits[8];
};

// Eight lanes a row. Rows that no key reaches get a reference of +infinity: all their weights are 0.
template <class T, int D>
HW_SMALL_KERNEL(kStatsThreads)
stats_kernel(const StatsArgs a) {
  const int64_t row = hw::block() * (kStatsThreads / kLanesPerRow) + hw::thread() / kLanesPerRow;
  if (row >= a.rows) return;  // rows come in whole blocks of 64: a warp leaves or stays as one
  float delta = 0.f;
#pragma unroll
  for (int c = 0; c < D / 64; ++c) {
    const int64_t at = row * D + c * 64 + hw::thread() % kLanesPerRow * 8;
    const Eight o = *reinterpret_cast<const Eight*>(a.o + at), g = *reinterpret_cast<const Eight*>(a.grad + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta = fmaf(hw::unpack<T>(o.bits[i]), hw::unpack<T>(g.bits[i]), delta);
  }
#pragma unroll
  for (int mask = 1; mask < kLanesPerRow; mask *= 2) delta += hw::shuffle_xor(delta, mask);
  if (hw::thread() % kLanesPerRow) return;
  const int64_t block = row / kBlock;
  const int slot = row % kBlock;
  const float lse = a.lse[row];
  const bool reached = slot < a.sizes[block % a.num_q] && lse > -kNever;
  if (a.dlse && reached) delta -= a.dlse[row];
  a.stats[block * kStats + slot] = reached ? lse * kToBase2 : kNever;
  a.stats[block * kStats + kBlock + slot] = reached ? delta : 0.f;
}

// The fast variant's sums of dQ: a block's 64 D numbers ordered as threads hold them, so that a warp adds
// 512 neighbouring bytes. Numbers i to i + 3 of a thread, i a multiple of 4.
constexpr MG_BOTH int sum_offset(int thread, int i) { return (i / 4 * kThreadsPerGroup + thread) * 4; }

struct ConvertArgs {
  const float* sums;  // [BH, num_q, 64 D]
  uint16_t* dq;       // [BH, num_q, 64, D]
  const int* sizes;   // [num_q]
  int64_t blocks;     // BH * num_q
  int num_q;
  float scale;
};

// A block of 128 threads per block of queries.
template <class T, int D>
HW_SMALL_KERNEL(kThreadsPerGroup)
convert_kernel(const ConvertArgs a) {
  const int64_t block = hw::block();
  const int thread = hw::thread(), size = a.sizes[block % a.num_q];
  float d[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) d[i] = a.sums[block * kBlock * D + sum_offset(thread, i / 4 * 4) + i % 4];
  store_rows<T, D>(a.dq + block * kBlock * D, d, a.scale, a.scale, size, thread);
}
}  // namespace megagen::cuda
