// Gradients of keys and values: pairs of key blocks stay, their query blocks stream past.
//
// Scores are computed transposed (keys as rows), so that P^T and dS^T come out of the tensor cores in
// the layout in which the next products want them, as operands in registers. The fast variant adds each
// entry's part of dQ to fp32 memory as well: five products instead of seven, in no fixed order of sums.
#pragma once
#include "backward.cuh"

namespace megagen::cuda {

struct KeyGradArgs {
  uint16_t *dk, *dv;        // [BH, num_k, 64, D]
  const uint8_t* stats;     // [BH, num_q, kStats] fp32
  const uint32_t* entries;  // [BH, width]: merged lists of query blocks
  const int* indptr;        // [BH, num_k + 1]: a pair's list starts where its first block's does
  const int* counts;        // [BH, pairs]
  const int* order;         // [BH, pairs]: longest first
  const int* k_sizes;       // [num_k]
  float* dq;                // [BH, num_q, 64 D]: the fast variant's sums, see sum_offset
  int64_t width;            // entries of a sequence
  int num_q, num_k, pairs;
  float scale;
};

template <int D, bool kFast>
struct KeyGradShape {
  static constexpr int kStages = D == 128 ? 4 : 8;
  static constexpr int kThreads = kConsumerThreads + kThreadsPerGroup;
  struct Memory {
    RingMemory<D, kStages, kStatsBytes> ring;  // Q and dO
    alignas(kAlignment) uint8_t k[2][tile_bytes(D)];
    uint8_t v[2][tile_bytes(D)];
    uint8_t ds[kFast ? 2 : 1][kFast ? kPanelBytes : kAlignment];  // dS^T: keys x queries
    hw::Barrier ready[2];
  };
  static constexpr int kShared = sizeof(Memory) + kAlignment;
  static_assert(kShared <= kMaxShared);
};

template <class T, int D, bool kFast>
struct KeyGradRows {
  typename KeyGradShape<D, kFast>::Memory& memory;
  const int thread, side;
  const float unit;
  float* dq = nullptr;  // the sequence's
  int tokens = 0;       // of this key block
  float dk[D / 2], dv[D / 2];

  HW_DEVICE KeyGradRows(typename KeyGradShape<D, kFast>::Memory& m, int t, int s, float u)
      : memory(m), thread(t), side(s), unit(u) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.f;
  }

  // Weights of N queries; the columns' references stand in the slot's statistics.
  template <int N>
  HW_DEVICE void weigh(float (&s)[N / 2], int slot, int size) {
    const float* base = reinterpret_cast<const float*>(memory.ring.extra[slot]);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] = hw::exp2(fmaf(s[i], unit, -base[fragment_column(thread, i)]));
    mask_columns<N>(s, size, thread);
  }
  template <int N>
  HW_DEVICE void differentiate(float (&s)[N / 2], const float (&dp)[N / 2], int slot, int size) {
    const float* delta = reinterpret_cast<const float*>(memory.ring.extra[slot]) + kBlock;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] *= dp[i] - delta[fragment_column(thread, i)];
    mask_columns<N>(s, size, thread);
  }
  template <int N>
  HW_DEVICE void gradients(int slot, int size) {
    const uint32_t q = hw::address(memory.ring.first[slot]), grad = hw::address(memory.ring.second[slot]);
    float s[N / 2], dp[N / 2];
    uint32_t p[N / 16][4];
    hw::mma_fence();
    times_rows<T, N, D>(s, hw::address(memory.k[side]), q);
    hw::mma_commit();
    times_rows<T, N, D>(dp, hw::address(memory.v[side]), grad);
    hw::mma_commit();
    hw::mma_wait<1>();
    hw::settle(s);
    weigh<N>(s, slot, size);
    pack<T, N>(p, s);
    hw::mma_fence();
    plus_weighted<T, N, D>(dv, p, grad);
    hw::mma_commit();
    hw::mma_wait<1>();
    hw::settle(dp);
    differentiate<N>(s, dp, slot, size);
    uint32_t ds[N / 16][4];
    pack<T, N>(ds, s);
    hw::mma_fence();
    plus_weighted<T, N, D>(dk, ds, q);
    hw::mma_commit();
    if constexpr (kFast) publish<N>(ds);
    hw::mma_wait<0>();
    hw::settle(dk);
    hw::settle(dv);
    if constexpr (kFast) add_queries(entry_index(memory.ring.entries[slot]));
  }

  // dS^T to shared memory, as dQ = dS K needs it from there. Its rows that are no tokens would count.
  template <int N>
  HW_DEVICE void publish(const uint32_t (&ds)[N / 16][4]) {
    hw::sync_group<kThreadsPerGroup>(1 + side);  // all warps are done with the entry before
    const int t = hw::forgotten(thread);
#pragma unroll
    for (int k = 0; k < N / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t to = tile_offset(operand_row(t, r), 16 * k + operand_column(t, r));
        *reinterpret_cast<uint32_t*>(memory.ds[side] + to) = operand_row(t, r) < tokens ? ds[k][r] : 0;
      }
    hw::publish_shared();
    hw::sync_group<kThreadsPerGroup>(1 + side);
  }
  // One panel of dQ at a time: dK and dV leave no more registers. Rows of empty slots hold anything; the
  // conversion to bf16 clears them.
  HW_DEVICE void add_queries(int block) {
    float* to = dq + static_cast<int64_t>(block) * kBlock * D;
    const int t = hw::forgotten(thread);
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      float part[32];
      hw::mma_fence();
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) {
        const uint64_t ds = along_rows(hw::address(memory.ds[side]), k);
        hw::mma<T, 64, true, true>(part, ds, along_rows(hw::address(memory.k[side]) + panel * kPanelBytes, k), k != 0);
      }
      hw::mma_commit();
      hw::mma_wait<0>();
      hw::settle(part);
#pragma unroll
      for (int i = 0; i < 32; i += 4) hw::add_four(to + sum_offset(t, panel * 32 + i), part + i);
    }
  }

  // What walk_whole() calls. Nothing is left under way from one entry to the next: the registers of an
  // operand in flight are the ones that dK, dV, scores and products leave none of.
  HW_DEVICE void whole(int slot, int size) {
    if (size <= 16) {
      gradients<16>(slot, size);
    } else if (size <= 32) {
      gradients<32>(slot, size);
    } else if (size <= kSmall) {
      gradients<48>(slot, size);
    } else {
      gradients<64>(slot, size);
    }
  }
};

// One CTA per pair, longest lists of a sequence first.
template <class T, int D, bool kFast>
HW_KERNEL((KeyGradShape<D, kFast>::kThreads))
key_grad_kernel(HW_MAP q, HW_MAP grad, HW_MAP k, HW_MAP v, const KeyGradArgs a) {
  using Shape = KeyGradShape<D, kFast>;
  auto& memory = hw::shared<typename Shape::Memory>();
  RingUse<D, Shape::kStages, kStatsBytes> ring{memory.ring};
  if (hw::thread() == 0) {
    ring.init();
    for (auto& ready : memory.ready) hw::init(ready, 1);
    hw::publish_barriers();
  }
  hw::sync_threads();
  const int64_t bh = hw::block() / a.pairs;
  const int pair = a.order[hw::block()], count = a.counts[bh * a.pairs + pair];
  Cursor<Shape::kStages> at;
  const int warp = hw::warp();
  if (warp >= kConsumerWarps) {
    hw::fewer_registers<kProducerRegisters>();
    if (warp > kConsumerWarps) return;
    if (hw::lane() == 0) hw::prefetch(q), hw::prefetch(grad);
    const int start = a.indptr[bh * (a.num_k + 1) + 2 * pair];
    const uint8_t* stats = a.stats + bh * a.num_q * kStatsBytes;
    ring.produce(at, a.entries + bh * a.width + start, count, q, grad, stats, bh);
    return;
  }
  hw::more_registers<kConsumerRegisters>();
  const int side = warp / 4, thread = hw::thread() % kThreadsPerGroup;
  const int block = 2 * pair + side;
  const bool there = block < a.num_k;
  if (there && thread == 0) {
    hw::arrive_expecting(memory.ready[side], 2 * tile_bytes(D));
    hw::load_tile(memory.k[side], k, memory.ready[side], block * kBlock, bh);
    hw::load_tile(memory.v[side], v, memory.ready[side], block * kBlock, bh);
  }
  if (there) hw::wait(memory.ready[side], 0);
  KeyGradRows<T, D, kFast> rows(memory, thread, side, a.scale * kToBase2);
  if constexpr (kFast) {
    rows.dq = a.dq + bh * a.num_q * kBlock * D;
    rows.tokens = there ? a.k_sizes[block] : 0;
  }
  walk_whole(ring, at, count, side, rows);
  if (there) {
    const int64_t to = (bh * a.num_k + block) * kBlock * D;
    store_rows<T, D>(a.dk + to, rows.dk, a.scale, a.scale, a.k_sizes[block], thread);
    store_rows<T, D>(a.dv + to, rows.dv, 1.f, 1.f, a.k_sizes[block], thread);
  }
}
}  // namespace megagen::cuda
