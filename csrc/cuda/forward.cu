// Launches of the forward, bf16 and fp16, head sizes 64 and 128.
#include "forward.cuh"

#include <algorithm>

#include "launch.h"

namespace megagen::cuda {
namespace {
template <class T, int D>
MegagenError forward(const MegagenForward& m) {
  const int pairs = static_cast<int>(ceil_div(m.num_q, 2));
  CUtensorMap k, v;
  const bool fp16 = m.fp16 != 0;
  if (MegagenError e = describe(&k, m.k, m.sequences, int64_t{m.num_k} * kBlock, D, fp16)) return e;
  if (MegagenError e = describe(&v, m.v, m.sequences, int64_t{m.num_k} * kBlock, D, fp16)) return e;
  ForwardArgs a{};
  a.q = at<const uint16_t>(m.q), a.o = at<uint16_t>(m.o), a.lse = at<float>(m.lse);
  a.entries = at<const uint32_t>(m.entries), a.counts = at<const int>(m.counts);
  a.q_sizes = at<const int>(m.q_sizes);
  a.items = m.sequences * pairs, a.num_q = m.num_q, a.pairs = pairs, a.width = m.width, a.scale = m.scale;
  a.gate = at<const uint16_t>(m.gate), a.coarse = at<const uint16_t>(m.coarse), a.out = at<uint16_t>(m.out);
  a.token = at<const int>(m.token), a.tokens = m.tokens, a.heads = m.heads;
  int count = 0;
  if (MegagenError e = processors(&count)) return e;
  using Shape = ForwardShape<D>;
  return launch(forward_kernel<T, D>, std::min<int64_t>(a.items, count), Shape::kThreads, Shape::kShared,
                stream_of(m.stream), k, v, a);
}
}  // namespace
}  // namespace megagen::cuda

extern "C" MegagenError megagen_vsa_forward(const MegagenForward* a) {
  using namespace megagen::cuda;
  if (a->sequences == 0 || a->num_q == 0) return nullptr;
  if (a->dim == 64) return a->fp16 ? forward<Fp16, 64>(*a) : forward<Bf16, 64>(*a);
  if (a->dim == 128) return a->fp16 ? forward<Fp16, 128>(*a) : forward<Bf16, 128>(*a);
  return failed("vsa_forward", "the head size is neither 64 nor 128");
}
