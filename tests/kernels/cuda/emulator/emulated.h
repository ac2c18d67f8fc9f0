// csrc/cuda/hw.cuh and the CUDA names that the launches use, on the emulated machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "layout.h"
#include "machine.h"

#define HW_KERNEL(threads) void
#define HW_SMALL_KERNEL(threads) inline void
#define HW_DEVICE inline
#define HW_MAP const ::CUtensorMap

struct CUtensorMap {
  const uint16_t* data;
  int64_t sequences, tokens;
  int dim;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace megagen::cuda {
struct Bf16 {};
struct Fp16 {};

namespace hw {
using emulator::machine;
using TensorMap = CUtensorMap;
template <class T>
constexpr bool kIsFp16 = false;
template <>
constexpr bool kIsFp16<Fp16> = true;

inline int thread() { return machine().current->id; }
inline int64_t block() { return machine().block; }
inline int64_t blocks() { return machine().blocks; }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }
template <class Shared>
Shared& shared() {
  return *reinterpret_cast<Shared*>(machine().shared);
}
inline uint32_t address(const void* p) {
  const auto offset = static_cast<const uint8_t*>(p) - machine().shared;
  if (offset < 0 || offset >= emulator::kSharedBytes) machine().fail("an address out of shared memory");
  return static_cast<uint32_t>(offset) + emulator::kSharedStart;
}

inline void sync_threads() { machine().meet(machine().meetings[0], machine().threads, "sync_threads"); }
inline void sync_warp() { machine().exchange(0, 0, "sync_warp"); }
template <int kThreads>
void sync_group(int id) {
  if (id < 1 || id > 15) machine().fail("a named barrier that is not 1 to 15");
  machine().meet(machine().meetings[id], kThreads, "sync_group");
}
template <class V>
V broadcast(V value, int from) {
  return static_cast<V>(machine().exchange(static_cast<uint64_t>(value), from, "a broadcast"));
}
template <class V>
V shuffle_xor(V value, int mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = machine().exchange(bits, lane() ^ mask, "a shuffle");
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int shuffle_up(int value, int by) {
  const int from = lane() >= by ? lane() - by : lane();
  return static_cast<int>(machine().exchange(static_cast<uint32_t>(value), from, "a shuffle"));
}
inline bool any(bool value) { return machine().vote(value) != 0; }
inline uint32_t ballot(bool value) { return machine().vote(value); }
inline int count_bits(uint32_t value) { return __builtin_popcount(value); }
inline int first_bit(uint32_t value) { return __builtin_ffs(static_cast<int>(value)) - 1; }
inline void atomic_or(uint32_t* where, uint32_t value) { *where |= value; }
inline void add_four(float* to, const float* values) {
  if (reinterpret_cast<uintptr_t>(to) % 16) machine().fail("an addition that is not aligned");
  for (int i = 0; i < 4; ++i) to[i] += values[i];
}
template <int kCount>
void more_registers() {}
template <int kCount>
void fewer_registers() {}

using Barrier = emulator::Barrier;
inline void init(Barrier& b, int arrivals) { b = Barrier{0, arrivals, arrivals, 0}; }
inline void publish_barriers() {}
inline void arrive(Barrier& b) { machine().arrive(b); }
inline void arrive_expecting(Barrier& b, uint32_t bytes) {
  b.bytes += bytes;
  machine().arrive(b);
}
inline void wait(Barrier& b, uint32_t parity) {
  if (b.pending <= 0 && b.bytes == 0) machine().fail("a wait at what is no barrier");
  while ((b.phase & 1) == parity) machine().wait_while(&b.phase, b.phase, "a barrier in shared memory");
}

inline void prefetch(const TensorMap&) {}
// The tensor map of launch.cu: a box of 64 columns, 64 tokens, every panel; swizzled by address.
inline void load_tile(void* to, const TensorMap& map, Barrier& b, int token, int sequence) {
  if (address(to) % 1024) machine().fail("a tile that is not aligned");
  const int panels = map.dim / 64;
  const auto move = [=] {
    for (int p = 0; p < panels; ++p) {
      for (int row = 0; row < 64; ++row) {
        for (int chunk = 0; chunk < 8; ++chunk) {
          uint32_t at = address(to) + p * 8192 + row * 128 + chunk * 16;
          at ^= (at >> 7 & 7) << 4;
          const int64_t from = (sequence * map.tokens + token + row) * map.dim + p * 64 + chunk * 8;
          uint8_t* target = machine().shared + at - emulator::kSharedStart;
          if (token + row < map.tokens) {
            std::memcpy(target, map.data + from, 16);
          } else {
            std::memset(target, 0, 16);
          }
        }
      }
    }
  };
  machine().start_copy({&b, 64 * map.dim * 2, move}, to);
}
inline void load_bytes(void* to, const void* from, int bytes, Barrier& b) {
  if (address(to) % 16 || bytes % 16) machine().fail("a bulk copy that is not aligned");
  machine().start_copy({&b, bytes, [=] { std::memcpy(to, from, bytes); }}, to);
}
inline void publish_shared() {}

inline void mma_fence() {}
inline void mma_commit() { machine().commit(); }
template <int kPending>
void mma_wait() {
  machine().wait_products(kPending);
}
template <int kCount>
void settle(float (&)[kCount]) {}
template <class T, int N, bool kRowsB>
void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  machine().current->open.push_back({N, kIsFp16<T>, false, kRowsB, accumulate != 0, a, 0, b, d});
}
template <class T, int N, bool kRowsA, bool kRowsB>
void mma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  machine().current->open.push_back({N, kIsFp16<T>, kRowsA, kRowsB, accumulate != 0, nullptr, a, b, d});
}

inline int forgotten(int value) { return value; }
inline float exp2(float x) { return ::exp2f(x); }
inline float log2(float x) { return ::log2f(x); }
template <class T>
uint32_t pack(float low, float high) {
  return emulator::bits_of(low, kIsFp16<T>) | static_cast<uint32_t>(emulator::bits_of(high, kIsFp16<T>)) << 16;
}
template <class T>
float unpack(uint16_t bits) {
  return emulator::number(bits, kIsFp16<T>);
}

// A launch: blocks one after the other, as no block may wait for another.
template <class Kernel>
const char* run(int64_t blocks, int threads, const Kernel& kernel) {
  auto& m = machine();
  m.error.clear();
  for (int64_t b = 0; b < blocks && m.error.empty(); ++b) m.run_block(threads, b, blocks, kernel);
  return m.error.empty() ? nullptr : m.error.c_str();
}
}  // namespace hw
}  // namespace megagen::cuda
