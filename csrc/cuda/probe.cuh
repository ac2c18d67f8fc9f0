// Loads the tiles that merged lists name, as the forward does, and does nothing with them: the rate at
// which tiles reach the processors, which no kernel that walks such lists can exceed.
#pragma once
#include "tiles.cuh"

namespace megagen::cuda {

struct ProbeArgs {
  const uint32_t* entries;  // [BH, pairs, width]
  const int* counts;        // [BH, pairs]
  int64_t items;
  int pairs, width;
};

template <int D>
struct ProbeShape {
  static constexpr int kStages = D == 128 ? 6 : 12;
  static constexpr int kThreads = (kConsumerWarps + 1) * 32;
  using Memory = RingMemory<D, kStages, 0>;
  static constexpr int kShared = sizeof(Memory) + kAlignment;
  static_assert(kShared <= kMaxShared);
};

template <int D>
HW_KERNEL(ProbeShape<D>::kThreads)
probe_kernel(HW_MAP k, HW_MAP v, const ProbeArgs a) {
  using Shape = ProbeShape<D>;
  auto& memory = hw::shared<typename Shape::Memory>();
  RingUse<D, Shape::kStages, 0> ring{memory};
  if (hw::thread() == 0) {
    ring.init();
    hw::publish_barriers();
  }
  hw::sync_threads();
  Cursor<Shape::kStages> at;
  for (int64_t item = hw::block(); item < a.items; item += hw::blocks()) {
    const int count = a.counts[item];
    if (hw::warp() == kConsumerWarps) {
      ring.produce(at, a.entries + item * a.width, count, k, v, nullptr, item / a.pairs);
      continue;
    }
    for (int i = 0; i < count; ++i, at.advance()) {
      ring.wait(at);
      ring.release(at.slot);
    }
  }
}
}  // namespace megagen::cuda
