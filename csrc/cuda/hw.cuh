// The machine as the kernels see it: every instruction that is not plain C++ goes through this file.
//
// The tests compile the kernels with g++ against another set of the same functions (an emulator of
// warps, barriers, bulk copies and wgmma), so nothing else may name a CUDA builtin.
#pragma once
#ifdef MEGAGEN_EMULATOR
#include MEGAGEN_EMULATOR
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"
#include "wgmma.cuh"

#define HW_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define HW_SMALL_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define HW_DEVICE __device__ __forceinline__
#define HW_MAP const __grid_constant__ CUtensorMap

namespace megagen::cuda::hw {

using TensorMap = CUtensorMap;

HW_DEVICE int thread() { return threadIdx.x; }
HW_DEVICE int64_t block() { return blockIdx.x; }
HW_DEVICE int64_t blocks() { return gridDim.x; }
HW_DEVICE int lane() { return threadIdx.x % 32; }
// The warp's number, the same register for all lanes: branches on it are uniform to the compiler.
HW_DEVICE int warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

extern __shared__ __align__(1024) uint8_t dynamic_shared[];
HW_DEVICE uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// The launch asks for kAlignment bytes more than Shared has: swizzled tiles need 1024-byte addresses.
template <class Shared>
HW_DEVICE Shared& shared() {
  return *reinterpret_cast<Shared*>(dynamic_shared + (-address(dynamic_shared) & (kAlignment - 1)));
}

HW_DEVICE void sync_threads() { __syncthreads(); }
HW_DEVICE void sync_warp() { __syncwarp(); }
template <int kThreads>
HW_DEVICE void sync_group(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <class V>
HW_DEVICE V broadcast(V value, int from) {
  return __shfl_sync(~0u, value, from);
}
template <class V>
HW_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
HW_DEVICE int shuffle_up(int value, int by) { return __shfl_up_sync(~0u, value, by); }
HW_DEVICE bool any(bool value) { return __any_sync(~0u, value); }
HW_DEVICE uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }
HW_DEVICE int count_bits(uint32_t value) { return __popc(value); }
HW_DEVICE int first_bit(uint32_t value) { return __ffs(value) - 1; }
HW_DEVICE void atomic_or(uint32_t* where, uint32_t value) { atomicOr(where, value); }

// Adds four fp32 numbers to 16 aligned bytes of global memory, in no fixed order among threads.
HW_DEVICE void add_four(float* to, const float* values) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values[0]), "f"(values[1]),
               "f"(values[2]), "f"(values[3])
               : "memory");
}

// Registers per thread of the calling warpgroup.
template <int kCount>
HW_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
HW_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- barriers in shared memory
using Barrier = uint64_t;
HW_DEVICE void init(Barrier& b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine; a sync_threads must follow.
HW_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
HW_DEVICE void arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&b)) : "memory");
}
HW_DEVICE void arrive_expecting(Barrier& b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&b)), "r"(bytes) : "memory");
}
// Until the phase with this parity has completed.
HW_DEVICE void wait(Barrier& b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nTRY_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE_%=;\nbra TRY_%=;\nDONE_%=:\n}\n" ::"r"(
          address(&b)),
      "r"(parity)
      : "memory");
}

// --- bulk copies; one thread issues them
HW_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// One block (64 tokens from `token` of sequence `sequence`) as panels: see tensor_map.h.
HW_DEVICE void load_tile(void* to, const TensorMap& map, Barrier& b, int token, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(address(&b)), "r"(0), "r"(token), "r"(0), "r"(sequence)
      : "memory");
}
// bytes: a multiple of 16, both addresses too.
HW_DEVICE void load_bytes(void* to, const void* from, int bytes, Barrier& b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address(to)),
               "l"(from), "r"(bytes), "r"(address(&b))
               : "memory");
}
// Between plain writes to shared memory and wgmma or bulk copies that read them.
HW_DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same number, of which the compiler knows nothing: what follows from it is computed where it is
// used, not kept in registers around a loop.
HW_DEVICE int forgotten(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// --- numbers
HW_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HW_DEVICE float log2(float x) { return __log2f(x); }
template <class T>
HW_DEVICE uint32_t pack(float low, float high);
template <>
HW_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
HW_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <class T>
HW_DEVICE float unpack(uint16_t bits);
template <>
HW_DEVICE float unpack<Bf16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <>
HW_DEVICE float unpack<Fp16>(uint16_t bits) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
}
}  // namespace megagen::cuda::hw
#endif
