// Launch of the gate's gradient.
#include "combine.cuh"

#include "launch.h"

namespace megagen::cuda {
namespace {
template <class T, int D>
MegagenError combine(const MegagenCombine& m) {
  CombineArgs a{};
  a.grad = at<const uint16_t>(m.grad), a.gate = at<const uint16_t>(m.gate);
  a.coarse = at<const uint16_t>(m.coarse), a.tiled = at<uint16_t>(m.tiled);
  a.dgate = at<uint16_t>(m.dgate), a.dcoarse = at<uint16_t>(m.dcoarse), a.token = at<const int>(m.token);
  a.tokens = m.tokens, a.heads = m.heads, a.num_q = m.num_q;
  return launch(combine_grad_kernel<T, D>, m.sequences * m.num_q, kThreadsPerGroup, CombineShape<D>::kShared,
                stream_of(m.stream), a);
}
}  // namespace
}  // namespace megagen::cuda

extern "C" MegagenError megagen_combine_backward(const MegagenCombine* a) {
  using namespace megagen::cuda;
  if (a->dim == 64) return a->fp16 ? combine<Fp16, 64>(*a) : combine<Bf16, 64>(*a);
  if (a->dim == 128) return a->fp16 ? combine<Fp16, 128>(*a) : combine<Bf16, 128>(*a);
  return failed("combine_backward", "the head size is neither 64 nor 128");
}
