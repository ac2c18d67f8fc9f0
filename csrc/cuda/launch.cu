// Errors, tensor maps and device facts. The driver is reached through the runtime: no link to libcuda,
// so that the module imports on machines without one.
#include "launch.h"

#include <cstdio>

namespace megagen::cuda {
namespace {
thread_local char message[256];
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// An error of the runtime's own, such as a driver that is older than it, keeps its words.
MegagenError find(Encode* encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t e =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (MegagenError error = check("cuTensorMapEncodeTiled", e)) return error;
  if (result != cudaDriverEntryPointSuccess) return failed("cuTensorMapEncodeTiled", "the driver does not offer it");
  *encode = reinterpret_cast<Encode>(found);
  return nullptr;
}
}  // namespace

MegagenError failed(const char* what, const char* detail) {
  std::snprintf(message, sizeof message, "%s: %s", what, detail);
  cudaGetLastError();  // told once: the next launch that goes well must not report it again
  return message;
}

MegagenError describe(CUtensorMap* map, uint64_t address, int64_t sequences, int64_t tokens, int dim, bool fp16) {
  Encode encode = nullptr;
  if (MegagenError error = find(&encode)) return error;
  const cuuint64_t token_bytes = static_cast<cuuint64_t>(dim) * 2;
  const cuuint64_t sizes[4] = {64, static_cast<cuuint64_t>(tokens), static_cast<cuuint64_t>(dim / 64),
                               static_cast<cuuint64_t>(sequences)};
  const cuuint64_t strides[3] = {token_bytes, 128, token_bytes * static_cast<cuuint64_t>(tokens)};
  const cuuint32_t box[4] = {64, kBlock, static_cast<cuuint32_t>(dim / 64), 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             reinterpret_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  char code[32];
  std::snprintf(code, sizeof code, "error %d", static_cast<int>(result));
  return failed("cuTensorMapEncodeTiled", code);
}

MegagenError processors(int* count) {
  int device = 0;
  if (MegagenError error = check("device", cudaGetDevice(&device))) return error;
  return check("device", cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}
}  // namespace megagen::cuda

extern "C" int megagen_cuda_devices(MegagenError* reason) {
  int count = 0, usable = 0;
  *reason = megagen::cuda::check("devices", cudaGetDeviceCount(&count));
  if (*reason) return -1;
  for (int d = 0; d < count; ++d) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d);
    usable += major == 9 && minor == 0;
  }
  return usable;
}
