// Gradient of the queries: the forward's pairs, lists and ring, three products an entry.
#pragma once
#include "backward.cuh"

namespace megagen::cuda {

struct QueryGradArgs {
  const uint16_t* q;        // [BH, num_q, 64, D]
  uint16_t* dq;             // the same
  const float* stats;       // [BH, num_q, kStats]
  const uint32_t* entries;  // [BH, pairs, width]
  const int* counts;        // [BH, pairs]
  const int* q_sizes;       // [num_q]
  int64_t items;            // BH * pairs
  int num_q, pairs, width;
  float scale;
};

template <int D>
struct QueryGradShape {
  static constexpr int kStages = D == 128 ? 5 : 8;
  static constexpr int kReach = kStages - 1;
  static constexpr int kThreads = kConsumerThreads + kThreadsPerGroup;
  struct Memory {
    RingMemory<D, kStages, 0> ring;  // K and V
    alignas(kAlignment) uint8_t grad[2][tile_bytes(D)];
    hw::Barrier ready[2];
  };
  static constexpr int kShared = sizeof(Memory) + kAlignment;
  static_assert(kShared <= kMaxShared);
};

template <class T, int D>
struct QueryGradRows {
  typename QueryGradShape<D>::Memory& memory;
  const int thread, side;
  const float unit;
  uint32_t q[D / 16][4];
  uint32_t w[4][4];  // the held entry's dS
  float dq[D / 2];
  float base[2], delta[2];

  HW_DEVICE QueryGradRows(typename QueryGradShape<D>::Memory& m, int t, int s, float u)
      : memory(m), thread(t), side(s), unit(u) {}

  HW_DEVICE void reset(const uint16_t* rows, const float* stats) {
    load_operand<D>(q, rows, thread);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dq[i] = 0.f;
    clear(w);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base[r] = stats ? stats[fragment_row(thread, 2 * r)] : kNever;
      delta[r] = stats ? stats[kBlock + fragment_row(thread, 2 * r)] : 0.f;
    }
  }
  template <int N>
  HW_DEVICE void scores(float (&s)[N / 2], int slot) {
    times_rows<T, N, D>(s, q, hw::address(memory.ring.first[slot]));
    hw::mma_commit();
  }
  template <int N>
  HW_DEVICE void products(float (&dp)[N / 2], int slot) {
    times_rows<T, N, D>(dp, hw::address(memory.grad[side]), hw::address(memory.ring.second[slot]));
    hw::mma_commit();
  }
  template <int N>
  HW_DEVICE void accumulate(const uint32_t (&ds)[N / 16][4], int slot) {
    plus_weighted<T, N, D>(dq, ds, hw::address(memory.ring.first[slot]));
    hw::mma_commit();
  }
  // Masked here too: where the branch is, the wait for dP stays after the weights (see ForwardRows::moved).
  template <int N>
  HW_DEVICE void weigh(float (&s)[N / 2], int size) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] = hw::exp2(fmaf(s[i], unit, -base[i / 2 % 2]));
    mask_columns<N>(s, size, thread);
  }
  // Weights to dS.
  template <int N>
  HW_DEVICE void differentiate(float (&s)[N / 2], const float (&dp)[N / 2], int size) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
    mask_columns<N>(s, size, thread);
  }

  // --- what walk() calls
  template <int N>
  HW_DEVICE void gradients(float (&s)[N / 2], int slot, int size) {
    float dp[N / 2];
    hw::mma_fence();
    scores<N>(s, slot);
    products<N>(dp, slot);
    hw::mma_wait<1>();
    hw::settle(s);
    weigh<N>(s, size);
    hw::mma_wait<0>();
    hw::settle(dp);
    differentiate<N>(s, dp, size);
  }
  HW_DEVICE void begin(int slot, int size) {
    float s[32];
    gradients<64>(s, slot, size);
    pack<T, 64>(w, s);
  }
  template <class Release>
  HW_DEVICE void next(int held, int slot, int size, const Release& release) {
    float s[32], dp[32];
    hw::mma_fence();
    scores<64>(s, slot);
    products<64>(dp, slot);
    accumulate<64>(w, held);
    hw::mma_wait<2>();
    hw::settle(s);
    weigh<64>(s, size);
    hw::mma_wait<1>();
    hw::settle(dp);
    differentiate<64>(s, dp, size);
    hw::mma_wait<0>();
    hw::settle(dq);
    release();
    pack<T, 64>(w, s);
  }
  HW_DEVICE void finish(int held) {
    hw::mma_fence();
    accumulate<64>(w, held);
    hw::mma_wait<0>();
    hw::settle(dq);
  }
  template <int N>
  HW_DEVICE void short_block(int slot, int size) {
    float s[N / 2];
    uint32_t ds[N / 16][4];
    gradients<N>(s, slot, size);
    pack<T, N>(ds, s);
    hw::mma_fence();
    accumulate<N>(ds, slot);
    hw::mma_wait<0>();
    hw::settle(dq);
  }
  HW_DEVICE void whole(int slot, int size) {
    if (size <= 16) {
      short_block<16>(slot, size);
    } else if (size <= 32) {
      short_block<32>(slot, size);
    } else {
      short_block<48>(slot, size);
    }
  }
};

template <class T, int D>
HW_KERNEL(QueryGradShape<D>::kThreads)
query_grad_kernel(HW_MAP k, HW_MAP v, HW_MAP grad, const QueryGradArgs a) {
  using Shape = QueryGradShape<D>;
  auto& memory = hw::shared<typename Shape::Memory>();
  RingUse<D, Shape::kStages, 0> ring{memory.ring};
  if (hw::thread() == 0) {
    ring.init();
    for (auto& ready : memory.ready) hw::init(ready, 1);
    hw::publish_barriers();
  }
  hw::sync_threads();
  Cursor<Shape::kStages> at;
  const int warp = hw::warp();
  if (warp >= kConsumerWarps) {
    hw::fewer_registers<kProducerRegisters>();
    if (warp > kConsumerWarps) return;
    if (hw::lane() == 0) hw::prefetch(k), hw::prefetch(v);
    for (int64_t item = hw::block(); item < a.items; item += hw::blocks()) {
      ring.produce(at, a.entries + item * a.width, a.counts[item], k, v, nullptr, item / a.pairs);
    }
    return;
  }
  hw::more_registers<kConsumerRegisters>();
  const int side = warp / 4, thread = hw::thread() % kThreadsPerGroup;
  QueryGradRows<T, D> rows(memory, thread, side, a.scale * kToBase2);
  uint32_t phase = 0;
  for (int64_t item = hw::block(); item < a.items; item += hw::blocks()) {
    const int64_t bh = item / a.pairs;
    const int block = item % a.pairs * 2 + side;
    const bool there = block < a.num_q;
    const int64_t from = bh * a.num_q + block;
    if (there) {
      hw::sync_group<kThreadsPerGroup>(1 + side);  // nobody reads the last item's tile any more
      if (thread == 0) {
        hw::arrive_expecting(memory.ready[side], tile_bytes(D));
        hw::load_tile(memory.grad[side], grad, memory.ready[side], block * kBlock, bh);
      }
    }
    rows.reset(there ? a.q + from * kBlock * D : nullptr, there ? a.stats + from * kStats : nullptr);
    if (there) {
      hw::wait(memory.ready[side], phase);
      phase ^= 1;
    }
    walk<Shape::kReach>(ring, at, a.counts[item], side, rows);
    if (there) store_rows<T, D>(a.dq + from * kBlock * D, rows.dq, a.scale, a.scale, a.q_sizes[block], thread);
  }
}
}  // namespace megagen::cuda
