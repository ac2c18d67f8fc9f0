// What every launch needs: errors as text, descriptions of tensors for bulk loads, the device's size.
#pragma once
#include "api.h"
#include "hw.cuh"

namespace megagen::cuda {

// Keeps the text for the calling thread.
MegagenError failed(const char* what, const char* detail);
inline MegagenError check(const char* what, cudaError_t e) {
  return e == cudaSuccess ? nullptr : failed(what, cudaGetErrorString(e));
}

// A tensor [sequences, tokens, D] of 2-byte numbers, to be loaded block by block: the box of one load is
// 64 columns x 64 tokens x D / 64 panels x 1 sequence, which lies in shared memory as layout.h says.
MegagenError describe(CUtensorMap* map, uint64_t address, int64_t sequences, int64_t tokens, int dim, bool fp16);

// Processors of the current device; 0 and an error where there is none.
MegagenError processors(int* count);

inline cudaStream_t stream_of(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }
template <class V>
inline V* at(uint64_t address) {
  return reinterpret_cast<V*>(address);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches with `shared` bytes of dynamic shared memory; a grid of no blocks is no launch.
template <class... Formal, class... Actual>
MegagenError launch(void (*kernel)(Formal...), int64_t blocks, int threads, int shared, cudaStream_t stream,
                    const Actual&... args) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7FFFFFFF) return failed("launch", "more than 2^31 - 1 blocks");
#ifdef MEGAGEN_EMULATOR
  return hw::run(blocks, threads, [&] { kernel(args...); });
#else
  if (shared > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (MegagenError error = check("shared memory", e)) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
  return check("launch", cudaGetLastError());
#endif
}
}  // namespace megagen::cuda
