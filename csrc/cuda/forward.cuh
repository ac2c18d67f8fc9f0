// Block-sparse attention, forward (FlashAttention's online softmax over listed key blocks).
//
// A CTA serves pairs of neighbouring query blocks: one producer warp streams the merged list of the
// pair's key blocks through a ring, two consumer warpgroups each own one query block, kept in
// registers. The scores of the next entry run on the tensor cores beside this one's softmax and P V.
#pragma once
#include "tiles.cuh"

namespace megagen::cuda {

struct ForwardArgs {
  const uint16_t* q;        // [BH, num_q, 64, D]
  uint16_t* o;              // the same; null: only `out` is wanted
  float* lse;               // [BH, num_q, 64], natural logarithm
  const uint32_t* entries;  // [BH, pairs, width], merged lists
  const int* counts;        // [BH, pairs]
  const int* q_sizes;       // [num_q]
  int64_t items;            // BH * pairs
  int num_q, pairs, width;
  float scale;
  // Epilogue o + gate * coarse, written in token order; all null without it.
  const uint16_t* gate;    // [B, tokens, H, D]
  const uint16_t* coarse;  // [BH, num_q, D]
  uint16_t* out;           // [B, tokens, H, D]
  const int* token;        // [num_q * 64]: token of a slot, -1 for a pad
  int64_t tokens;
  int heads;
};

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
// The maximum is moved only when it has grown by more than this many powers of two: exact in the end,
// and sums stay below 2^8 * 64 * blocks.
constexpr float kSlack = 8.f;

template <int D>
struct ForwardShape {
  static constexpr int kStages = D == 128 ? 6 : 8;
  static constexpr int kReach = kStages - 1;
  static constexpr int kThreads = kConsumerThreads + kThreadsPerGroup;
  using Memory = RingMemory<D, kStages, 0>;
  static constexpr int kShared = sizeof(Memory) + kAlignment;
  static_assert(kShared <= kMaxShared);
};

// One query block on its way along its list.
template <class T, int D>
struct ForwardRows {
  typename ForwardShape<D>::Memory& memory;
  const int thread;
  const float unit;  // scale * log2(e): exponents are powers of two
  uint32_t q[D / 16][4];
  uint32_t p[4][4];  // the held entry's weights
  float o[D / 2];
  float top[2], sum[2];  // rows 8 apart: the reference maximum (in raw scores) and this thread's sum

  HW_DEVICE ForwardRows(typename ForwardShape<D>::Memory& m, int t, float u) : memory(m), thread(t), unit(u) {}

  HW_DEVICE void reset(const uint16_t* rows) {
    load_operand<D>(q, rows, thread);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
    top[0] = top[1] = -kInfinity;
    sum[0] = sum[1] = 0.f;
    clear(p);
  }

  // Scores to weights exp2(unit (s - top)); alpha is what the rows before must be multiplied by.
  template <int N>
  HW_DEVICE void weigh(float (&s)[N / 2], int size, float (&alpha)[2]) {
    if (size < N) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) s[i] = fragment_column(thread, i) < size ? s[i] : -kInfinity;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = s[2 * r];
#pragma unroll
      for (int i = 0; i < N / 2; i += 4) most = fmaxf(most, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
      most = fmaxf(most, hw::shuffle_xor(most, 1));
      most = fmaxf(most, hw::shuffle_xor(most, 2));
      const bool grown = (most - top[r]) * unit > kSlack;
      alpha[r] = grown ? hw::exp2((top[r] - most) * unit) : 1.f;
      top[r] = grown ? most : top[r];
      const float base = top[r] * unit;
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < N / 2; i += 4)
#pragma unroll
        for (int e = i + 2 * r; e < i + 2 * r + 2; ++e) {
          s[e] = hw::exp2(fmaf(s[e], unit, -base));
          total += s[e];
        }
      sum[r] = fmaf(sum[r], alpha[r], total);
    }
  }
  // Whether a maximum has moved. Sums are never below 0, but who asks must have made the weights: in
  // straight code the assembler moves a wait for the products up to before them, and nothing overlaps.
  HW_DEVICE bool moved(const float (&alpha)[2]) {
    return hw::any(alpha[0] != 1.f || alpha[1] != 1.f || sum[0] < 0.f || sum[1] < 0.f);
  }
  HW_DEVICE void rescale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= alpha[i / 2 % 2];
  }

  // --- what walk() calls
  HW_DEVICE void begin(int slot, int size) {
    float s[32], alpha[2];
    hw::mma_fence();
    times_rows<T, 64, D>(s, q, hw::address(memory.first[slot]));
    hw::mma_commit();
    hw::mma_wait<0>();
    hw::settle(s);
    weigh<64>(s, size, alpha);
    if (moved(alpha)) rescale(alpha);
    pack<T, 64>(p, s);
  }
  template <class Release>
  HW_DEVICE void next(int held, int slot, int size, const Release& release) {
    float s[32], alpha[2];
    hw::mma_fence();
    times_rows<T, 64, D>(s, q, hw::address(memory.first[slot]));
    hw::mma_commit();
    plus_weighted<T, 64, D>(o, p, hw::address(memory.second[held]));
    hw::mma_commit();
    hw::mma_wait<1>();
    hw::settle(s);
    weigh<64>(s, size, alpha);
    if (moved(alpha)) {
      hw::mma_wait<0>();
      hw::settle(o);
      rescale(alpha);
    }
    hw::mma_wait<0>();
    hw::settle(o);
    release();
    pack<T, 64>(p, s);
  }
  HW_DEVICE void finish(int held) {
    hw::mma_fence();
    plus_weighted<T, 64, D>(o, p, hw::address(memory.second[held]));
    hw::mma_commit();
    hw::mma_wait<0>();
    hw::settle(o);
  }
  template <int N>
  HW_DEVICE void short_block(int slot, int size) {
    float s[N / 2], alpha[2];
    uint32_t w[N / 16][4];
    hw::mma_fence();
    times_rows<T, N, D>(s, q, hw::address(memory.first[slot]));
    hw::mma_commit();
    hw::mma_wait<0>();
    hw::settle(s);
    weigh<N>(s, size, alpha);
    if (moved(alpha)) rescale(alpha);
    pack<T, N>(w, s);
    hw::mma_fence();
    plus_weighted<T, N, D>(o, w, hw::address(memory.second[slot]));
    hw::mma_commit();
    hw::mma_wait<0>();
    hw::settle(o);
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

  // The rows of query block `block` of sequence `bh`.
  HW_DEVICE void store(const ForwardArgs& a, int64_t bh, int block) {
    const int size = a.q_sizes[block];
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += hw::shuffle_xor(total, 1);
      total += hw::shuffle_xor(total, 2);
      inverse[r] = total > 0.f ? 1.f / total : 0.f;
      const int row = fragment_row(thread, 2 * r);
      const bool real = row < size && total > 0.f;
      const float lse = real ? (top[r] * unit + hw::log2(total)) * kLn2 : -kInfinity;
      if (thread % 4 == 0) a.lse[(bh * a.num_q + block) * kBlock + row] = lse;
    }
    if (a.o) store_rows<T, D>(a.o + (bh * a.num_q + block) * kBlock * D, o, inverse[0], inverse[1], size, thread);
    if (a.out) store_combined(a, bh, block, inverse);
  }
  HW_DEVICE void store_combined(const ForwardArgs& a, int64_t bh, int block, const float (&inverse)[2]) {
    const int64_t b = bh / a.heads, h = bh % a.heads;
    const uint16_t* coarse = a.coarse + (bh * a.num_q + block) * D;
#pragma unroll
    for (int i = 0; i < D / 2; i += 2) {
      const int token = a.token[block * kBlock + fragment_row(thread, i)];
      if (token < 0) continue;
      const int column = fragment_column(thread, i);
      const int64_t at = ((b * a.tokens + token) * a.heads + h) * D + column;
      const uint32_t g = *reinterpret_cast<const uint32_t*>(a.gate + at);
      const uint32_t c = *reinterpret_cast<const uint32_t*>(coarse + column);
      const float factor = inverse[i / 2 % 2];
      const float low = o[i] * factor + hw::unpack<T>(g & 0xFFFF) * hw::unpack<T>(c & 0xFFFF);
      const float high = o[i + 1] * factor + hw::unpack<T>(g >> 16) * hw::unpack<T>(c >> 16);
      *reinterpret_cast<uint32_t*>(a.out + at) = hw::pack<T>(low, high);
    }
  }
};

template <class T, int D>
HW_KERNEL(ForwardShape<D>::kThreads)
forward_kernel(HW_MAP k, HW_MAP v, const ForwardArgs a) {
  using Shape = ForwardShape<D>;
  auto& memory = hw::shared<typename Shape::Memory>();
  RingUse<D, Shape::kStages, 0> ring{memory};
  if (hw::thread() == 0) {
    ring.init();
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
  const int side = warp / 4;
  ForwardRows<T, D> rows(memory, hw::thread() % kThreadsPerGroup, a.scale * kLog2e);
  for (int64_t item = hw::block(); item < a.items; item += hw::blocks()) {
    const int64_t bh = item / a.pairs;
    const int block = item % a.pairs * 2 + side;
    const bool there = block < a.num_q;
    rows.reset(there ? a.q + (bh * a.num_q + block) * kBlock * D : nullptr);
    walk<Shape::kReach>(ring, at, a.counts[item], side, rows);
    if (there) rows.store(a, bh, block);
  }
}
}  // namespace megagen::cuda
