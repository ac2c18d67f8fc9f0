// What the kernels share: the ring's shared memory, its producer, and products of tiles and fragments.
#pragma once
#include "hw.cuh"
#include "ring.h"

namespace megagen::cuda {

// Two consumer warpgroups and a third one of which a single warp produces. A block of 384 threads is
// launched with 168 registers a thread; these are dealt out anew among its warpgroups. More than there
// are would never be granted.
constexpr int kConsumerWarps = 8, kConsumerThreads = 2 * kThreadsPerGroup;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24, kLaunchRegisters = 168;
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * kLaunchRegisters);

// Slots of two tiles each and, when kExtra, that many bytes of row statistics.
template <int D, int kStages, int kExtra>
struct alignas(kAlignment) RingMemory {
  uint8_t first[kStages][tile_bytes(D)];
  uint8_t second[kStages][tile_bytes(D)];
  alignas(16) uint8_t extra[kStages][kExtra > 0 ? kExtra : 16];
  hw::Barrier full[kStages], empty[kStages];
  uint32_t entries[kStages];
};

template <int D, int kStages, int kExtra>
struct RingUse {
  RingMemory<D, kStages, kExtra>& memory;

  // By one thread, before publish_barriers.
  HW_DEVICE void init() {
    for (int s = 0; s < kStages; ++s) {
      hw::init(memory.full[s], 1);
      hw::init(memory.empty[s], kConsumerWarps);
    }
  }
  HW_DEVICE uint32_t wait(const Cursor<kStages>& at) {
    hw::wait(memory.full[at.slot], at.phase);
    return hw::broadcast(memory.entries[at.slot], 0);
  }
  // By all lanes of each consumer warp, after its last read of the slot.
  HW_DEVICE void release(int slot) {
    hw::sync_warp();
    if (hw::lane() == 0) hw::arrive(memory.empty[slot]);
  }
  // The producer warp: loads the blocks of a list, `extra` (kExtra bytes a block) with them.
  HW_DEVICE void produce(Cursor<kStages>& at, const uint32_t* list, int count, const hw::TensorMap& first,
                         const hw::TensorMap& second, const uint8_t* extra, int sequence) {
    for (int done = 0; done < count; done += 32) {
      const int mine = done + hw::lane();
      const uint32_t ahead = mine < count ? list[mine] : 0;
#pragma unroll 1
      for (int i = 0; i < 32 && done + i < count; ++i) {
        const uint32_t e = hw::broadcast(ahead, i);
        if (hw::lane() == 0) load(at, e, first, second, extra, sequence);
        hw::sync_warp();
        at.advance();
      }
    }
  }
  HW_DEVICE void load(const Cursor<kStages>& at, uint32_t e, const hw::TensorMap& first, const hw::TensorMap& second,
                      const uint8_t* extra, int sequence) {
    const int s = at.slot, block = entry_index(e);
    hw::wait(memory.empty[s], at.phase ^ 1);
    memory.entries[s] = e;  // ordered before the arrival that a consumer's wait sees
    hw::arrive_expecting(memory.full[s], 2 * tile_bytes(D) + kExtra);
    hw::load_tile(memory.first[s], first, memory.full[s], block * kBlock, sequence);
    hw::load_tile(memory.second[s], second, memory.full[s], block * kBlock, sequence);
    if constexpr (kExtra > 0) {
      hw::load_bytes(memory.extra[s], extra + static_cast<int64_t>(block) * kExtra, kExtra, memory.full[s]);
    }
  }
};

// d (64 x N) = a b^T over D columns: a from registers, b the first N rows of a tile.
template <class T, int N, int D>
HW_DEVICE void times_rows(float (&d)[N / 2], const uint32_t (&a)[D / 16][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) hw::mma<T, N, false>(d, a[k], along_columns(b, k), k != 0);
}
// The same with a tile in shared memory as a.
template <class T, int N, int D>
HW_DEVICE void times_rows(float (&d)[N / 2], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) hw::mma<T, N, false, false>(d, along_columns(a, k), along_columns(b, k), k != 0);
}
// d (64 x D) += p b: p a 64 x N fragment, b the first N rows of a tile.
template <class T, int N, int D>
HW_DEVICE void plus_weighted(float (&d)[D / 2], const uint32_t (&p)[N / 16][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) hw::mma<T, D, true>(d, p[k], along_rows(b, k), 1);
}

// Accumulators of 64 x N as the A operand of the next product.
template <class T, int N>
HW_DEVICE void pack(uint32_t (&p)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) p[k][r] = hw::pack<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
}

// Nothing is held at first, which the compiler cannot know: an operand that some path leaves undefined
// makes CUDA 12's assembler run products one after the other.
template <int kSteps>
HW_DEVICE void clear(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) a[k][r] = 0;
}

// A block's rows from memory (D numbers each) as an A operand; zeros where there is no block.
template <int D>
HW_DEVICE void load_operand(uint32_t (&a)[D / 16][4], const uint16_t* rows, int thread) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t at = operand_row(thread, r) * D + 16 * k + operand_column(thread, r);
      a[k][r] = rows ? *reinterpret_cast<const uint32_t*>(rows + at) : 0;
    }
}
// A block's rows to memory, times `factor`; rows from `size` on are zero.
template <class T, int D>
HW_DEVICE void store_rows(uint16_t* rows, const float (&d)[D / 2], float low, float high, int size, int thread) {
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int row = fragment_row(thread, i);
    const float factor = i & 2 ? high : low;
    const uint32_t both = row < size ? hw::pack<T>(d[i] * factor, d[i + 1] * factor) : 0;
    *reinterpret_cast<uint32_t*>(rows + row * D + fragment_column(thread, i)) = both;
  }
}
}  // namespace megagen::cuda
