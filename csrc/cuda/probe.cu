// Launch of the gather probe.
#include "probe.cuh"

#include <algorithm>

#include "launch.h"

namespace megagen::cuda {
namespace {
template <int D>
MegagenError probe(const MegagenProbe& m) {
  CUtensorMap k, v;
  if (MegagenError e = describe(&k, m.k, m.sequences, int64_t{m.num_k} * kBlock, D, false)) return e;
  if (MegagenError e = describe(&v, m.v, m.sequences, int64_t{m.num_k} * kBlock, D, false)) return e;
  ProbeArgs a{};
  a.entries = at<const uint32_t>(m.entries), a.counts = at<const int>(m.counts);
  a.items = m.sequences * m.pairs, a.pairs = m.pairs, a.width = m.width;
  int count = 0;
  if (MegagenError e = processors(&count)) return e;
  using Shape = ProbeShape<D>;
  return launch(probe_kernel<D>, std::min<int64_t>(a.items, count), Shape::kThreads, Shape::kShared,
                stream_of(m.stream), k, v, a);
}
}  // namespace
}  // namespace megagen::cuda

extern "C" MegagenError megagen_gather_probe(const MegagenProbe* a) {
  using namespace megagen::cuda;
  if (a->dim == 64) return probe<64>(*a);
  if (a->dim == 128) return probe<128>(*a);
  return failed("gather_probe", "the head size is neither 64 nor 128");
}
