// Where things lie: tiles in shared memory, operands of wgmma, fragments in registers, list entries.
//
// Every function here is constexpr and runs on both sides, so that the arithmetic the kernels use is
// the arithmetic the tests check. A tile is one block: 64 tokens x D numbers of 2 bytes, kept as D / 64
// panels of 64 x 64 whose rows are 128 bytes, 16-byte chunks permuted by the 128-byte swizzle.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MG_BOTH __host__ __device__ __forceinline__
#else
#define MG_BOTH inline
#endif

namespace megagen::cuda {

constexpr int kBlock = 64;                // token slots of a block
constexpr int kPanelBytes = 64 * 64 * 2;  // 64 tokens x 64 columns
constexpr int kThreadsPerGroup = 128;     // a warpgroup: what executes one wgmma
constexpr uint32_t kAlignment = 1024;     // of tiles in shared memory: the swizzle's period
constexpr int kMaxShared = 232448;        // bytes of shared memory a block may have on sm_90

constexpr MG_BOTH int tile_bytes(int dim) { return kBlock * dim * 2; }

// The 128-byte swizzle: chunk (bits 4-6 of the offset) xor row within 8 rows (bits 7-9).
constexpr MG_BOTH uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 3) & 0x70); }

// Byte offset in a tile of the number at (row, column).
constexpr MG_BOTH uint32_t tile_offset(int row, int column) {
  return (column / 64) * kPanelBytes + swizzle(row * 128 + (column % 64) * 2);
}

// Matrix descriptor of wgmma for swizzled tiles (PTX ISA, "matrix descriptor format"): bits 0-13 start
// address, 16-29 leading and 32-45 stride byte offset, all / 16; bits 62-63 = 1: 128-byte swizzle.
constexpr MG_BOTH uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// A tile whose contraction runs along its columns (K-major): 16 columns from 16 * step on. Groups of 8
// rows lie 1024 bytes apart; the leading offset is not used with a swizzle of one row's width.
constexpr MG_BOTH uint64_t along_columns(uint32_t tile, int step) {
  return descriptor(tile + (step / 4) * kPanelBytes + (step % 4) * 32, 16, 1024);
}

// A tile whose contraction runs along its rows (MN-major, transposed): 16 rows from 16 * step on. Groups
// of 8 rows lie 1024 bytes apart (stride), panels of 64 columns a panel apart (leading).
constexpr MG_BOTH uint64_t along_rows(uint32_t tile, int step) {
  return descriptor(tile + step * 2048, kPanelBytes, 1024);
}

// Accumulators of a 64 x N product: number i of a thread (thread of the warpgroup, 0 to 127).
constexpr MG_BOTH int fragment_row(int thread, int i) {
  return (thread / 32) * 16 + (thread % 32) / 4 + (i & 2 ? 8 : 0);
}
constexpr MG_BOTH int fragment_column(int thread, int i) { return (i / 4) * 8 + (thread % 4) * 2 + (i & 1); }

// The A operand, 64 x 16 from registers: register r holds columns fragment_column(thread, ...) and the
// next one. It is the accumulator layout of 16 columns, two neighbours packed: accumulators 8 s + 2 r and
// 8 s + 2 r + 1 make register r of step s.
constexpr MG_BOTH int operand_row(int thread, int r) { return fragment_row(thread, 2 * r); }
constexpr MG_BOTH int operand_column(int thread, int r) { return fragment_column(thread, 2 * r); }

// One entry of a merged list: a block, its real tokens, and which of the pair's two sides it belongs to.
constexpr int kIndexBits = 23;
constexpr MG_BOTH uint32_t entry(int index, int size, int owners) {
  return static_cast<uint32_t>(index) | static_cast<uint32_t>(size) << kIndexBits |
         static_cast<uint32_t>(owners) << 30;
}
constexpr MG_BOTH int entry_index(uint32_t e) { return e & ((1u << kIndexBits) - 1); }
constexpr MG_BOTH int entry_size(uint32_t e) { return e >> kIndexBits & 127; }
constexpr MG_BOTH bool entry_owned(uint32_t e, int side) { return e >> (30 + side) & 1; }

// Blocks above this many real tokens take the pipelined path; smaller ones shorter instructions.
constexpr int kSmall = 48;

static_assert(entry_index(entry(4711, 64, 2)) == 4711 && entry_size(entry(4711, 64, 2)) == 64);
static_assert(entry_owned(entry(1, 1, 2), 1) && !entry_owned(entry(1, 1, 2), 0));
static_assert(tile_offset(0, 64) == kPanelBytes && tile_offset(1, 0) == 128 + 16);
}  // namespace megagen::cuda
