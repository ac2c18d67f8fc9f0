// Gradient of out = o + gate * coarse, and the way from token order back to blocks, in one pass.
//
// coarse has one row per block: its gradient is a sum over the block's tokens, made in a fixed order.
#pragma once
#include "hw.cuh"

namespace megagen::cuda {

struct CombineArgs {
  const uint16_t *grad, *gate;  // [B, tokens, H, D]
  const uint16_t* coarse;       // [BH, num_q, D]
  uint16_t* tiled;              // [BH, num_q, 64, D]: the gradient of o, zeros in empty slots
  uint16_t* dgate;              // [B, tokens, H, D]
  uint16_t* dcoarse;            // [BH, num_q, D]
  const int* token;             // [num_q * 64]: token of a slot, -1 for a pad
  int64_t tokens;
  int heads, num_q;
};

template <int D>
struct CombineShape {
  static constexpr int kLanes = D / 8, kRows = kThreadsPerGroup / kLanes;  // 8 numbers a thread
  struct Memory {
    float part[kRows][D];
  };
  static constexpr int kShared = sizeof(Memory) + kAlignment;
};

struct alignas(16) Numbers {
  uint16_t bits[8];
};

// A block of 128 threads per block of queries.
template <class T, int D>
HW_SMALL_KERNEL(kThreadsPerGroup)
combine_grad_kernel(const CombineArgs a) {
  using Shape = CombineShape<D>;
  auto& memory = hw::shared<typename Shape::Memory>();
  const int64_t bh = hw::block() / a.num_q, b = bh / a.heads, h = bh % a.heads;
  const int block = hw::block() % a.num_q, column = hw::thread() % Shape::kLanes * 8;
  const Numbers coarse = *reinterpret_cast<const Numbers*>(a.coarse + hw::block() * D + column);
  float sum[8] = {};
  for (int row = hw::thread() / Shape::kLanes; row < kBlock; row += Shape::kRows) {
    const int64_t token = a.token[block * kBlock + row];
    Numbers grad{}, dgate;
    if (token >= 0) {
      const int64_t at = ((b * a.tokens + token) * a.heads + h) * D + column;
      grad = *reinterpret_cast<const Numbers*>(a.grad + at);
      const Numbers gate = *reinterpret_cast<const Numbers*>(a.gate + at);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float g = hw::unpack<T>(grad.bits[i]);
        sum[i] = fmaf(g, hw::unpack<T>(gate.bits[i]), sum[i]);
        dgate.bits[i] = hw::pack<T>(g * hw::unpack<T>(coarse.bits[i]), 0.f) & 0xFFFF;
      }
      *reinterpret_cast<Numbers*>(a.dgate + at) = dgate;
    }
    *reinterpret_cast<Numbers*>(a.tiled + (hw::block() * kBlock + row) * D + column) = grad;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) memory.part[hw::thread() / Shape::kLanes][column + i] = sum[i];
  hw::sync_threads();
  if (hw::thread() >= D) return;
  float total = 0.f;
  for (int row = 0; row < Shape::kRows; ++row) total += memory.part[row][hw::thread()];
  a.dcoarse[hw::block() * D + hw::thread()] = hw::pack<T>(total, 0.f) & 0xFFFF;
}
}  // namespace megagen::cuda
