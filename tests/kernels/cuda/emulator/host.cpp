// What launch.cu is on the emulated machine, and the machine's switches.
#include "launch.h"

namespace megagen::cuda {
namespace {
int processor_count = 2;
}
MegagenError failed(const char* what, const char*) { return what; }
MegagenError describe(CUtensorMap* map, uint64_t address, int64_t sequences, int64_t tokens, int dim, bool) {
  *map = CUtensorMap{reinterpret_cast<const uint16_t*>(address), sequences, tokens, dim};
  return nullptr;
}
MegagenError processors(int* count) {
  *count = processor_count;
  return nullptr;
}
}  // namespace megagen::cuda

extern "C" {
int megagen_cuda_devices(MegagenError* reason) {
  *reason = nullptr;
  return 0;
}
__attribute__((visibility("default"))) void emulator_configure(int seed, int eager, int processors) {
  emulator::machine().random.seed(seed);
  emulator::machine().eager = eager != 0;
  megagen::cuda::processor_count = processors;
}
// Products of 64 x N x 16 made since the last call.
__attribute__((visibility("default"))) int64_t emulator_products() {
  const int64_t count = emulator::machine().products;
  emulator::machine().products = 0;
  return count;
}
}
