// What the bindings share: which build of an operation runs, on how many threads, and addresses.
#pragma once
#include <cstdint>

namespace megagen {
using Address = std::uintptr_t;

enum class Isa { kGeneric, kAvx2, kAvx512 };
Isa chosen_isa();         // the best of this processor, unless use_isa asked for another
int usable(int threads);  // 1 in a forked child of a process that had started threads

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace megagen

#if MEGAGEN_X86
#define MEGAGEN_CALL(function, ...)                                                              \
  (megagen::chosen_isa() == megagen::Isa::kAvx512 ? megagen::avx512::function(__VA_ARGS__)       \
   : megagen::chosen_isa() == megagen::Isa::kAvx2 ? megagen::avx2::function(__VA_ARGS__)         \
                                                  : megagen::generic::function(__VA_ARGS__))
#else
#define MEGAGEN_CALL(function, ...) megagen::generic::function(__VA_ARGS__)
#endif
