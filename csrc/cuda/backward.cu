// Launches of the backward: row statistics, then keys and values, then queries; or all at once.
#include <algorithm>

#include "backward_kv.cuh"
#include "backward_q.cuh"
#include "launch.h"

namespace megagen::cuda {
namespace {
struct Maps {
  CUtensorMap q, grad, k, v;
};

template <int D>
MegagenError describe_all(Maps* maps, const MegagenBackward& m) {
  const int64_t queries = int64_t{m.num_q} * kBlock, keys = int64_t{m.num_k} * kBlock;
  if (MegagenError e = describe(&maps->q, m.q, m.sequences, queries, D, false)) return e;
  if (MegagenError e = describe(&maps->grad, m.grad, m.sequences, queries, D, false)) return e;
  if (MegagenError e = describe(&maps->k, m.k, m.sequences, keys, D, false)) return e;
  return describe(&maps->v, m.v, m.sequences, keys, D, false);
}

template <int D>
MegagenError row_stats(const MegagenBackward& m) {
  StatsArgs a{};
  a.o = at<const uint16_t>(m.o), a.grad = at<const uint16_t>(m.grad);
  a.lse = at<const float>(m.lse), a.dlse = at<const float>(m.dlse);
  a.sizes = at<const int>(m.q_sizes), a.stats = at<float>(m.stats);
  a.rows = m.sequences * m.num_q * kBlock, a.num_q = m.num_q;
  return launch(stats_kernel<Bf16, D>, ceil_div(a.rows, kStatsThreads / kLanesPerRow), kStatsThreads, 0,
                stream_of(m.stream), a);
}

template <int D, bool kFast>
MegagenError key_grads(const MegagenBackward& m, const Maps& maps) {
  KeyGradArgs a{};
  a.dk = at<uint16_t>(m.dk), a.dv = at<uint16_t>(m.dv), a.stats = at<const uint8_t>(m.stats);
  a.entries = at<const uint32_t>(m.key_entries), a.indptr = at<const int>(m.key_indptr);
  a.counts = at<const int>(m.key_counts), a.order = at<const int>(m.key_order);
  a.k_sizes = at<const int>(m.k_sizes), a.width = m.key_width;
  a.num_q = m.num_q, a.num_k = m.num_k, a.pairs = static_cast<int>(ceil_div(m.num_k, 2)), a.scale = m.scale;
  a.dq = at<float>(m.dq32);
  using Shape = KeyGradShape<D, kFast>;
  return launch(key_grad_kernel<Bf16, D, kFast>, m.sequences * a.pairs, Shape::kThreads, Shape::kShared,
                stream_of(m.stream), maps.q, maps.grad, maps.k, maps.v, a);
}

template <int D>
MegagenError query_grads(const MegagenBackward& m, const Maps& maps) {
  QueryGradArgs a{};
  a.q = at<const uint16_t>(m.q), a.dq = at<uint16_t>(m.dq), a.stats = at<const float>(m.stats);
  a.entries = at<const uint32_t>(m.entries), a.counts = at<const int>(m.counts);
  a.q_sizes = at<const int>(m.q_sizes), a.num_q = m.num_q, a.pairs = static_cast<int>(ceil_div(m.num_q, 2));
  a.items = m.sequences * a.pairs, a.width = m.width, a.scale = m.scale;
  int count = 0;
  if (MegagenError e = processors(&count)) return e;
  using Shape = QueryGradShape<D>;
  return launch(query_grad_kernel<Bf16, D>, std::min<int64_t>(a.items, count), Shape::kThreads, Shape::kShared,
                stream_of(m.stream), maps.k, maps.v, maps.grad, a);
}

// dQ is summed into fp32 zeros beside dK and dV.
template <int D>
MegagenError fast_grads(const MegagenBackward& m, const Maps& maps) {
  ConvertArgs a{};
  a.sums = at<const float>(m.dq32), a.dq = at<uint16_t>(m.dq), a.sizes = at<const int>(m.q_sizes);
  a.blocks = m.sequences * m.num_q, a.num_q = m.num_q, a.scale = m.scale;
  const size_t bytes = static_cast<size_t>(a.blocks) * kBlock * D * sizeof(float);
  const cudaStream_t stream = stream_of(m.stream);
  if (MegagenError e = check("clear", cudaMemsetAsync(at<void>(m.dq32), 0, bytes, stream))) return e;
  if (MegagenError e = key_grads<D, true>(m, maps)) return e;
  return launch(convert_kernel<Bf16, D>, a.blocks, kThreadsPerGroup, 0, stream, a);
}

template <int D>
MegagenError backward(const MegagenBackward& m) {
  Maps maps;
  if (MegagenError e = describe_all<D>(&maps, m)) return e;
  if (MegagenError e = row_stats<D>(m)) return e;
  if (m.fast) return fast_grads<D>(m, maps);
  if (MegagenError e = key_grads<D, false>(m, maps)) return e;
  return query_grads<D>(m, maps);
}
}  // namespace
}  // namespace megagen::cuda

extern "C" MegagenError megagen_vsa_backward(const MegagenBackward* a) {
  using namespace megagen::cuda;
  if (a->sequences == 0 || a->num_q == 0 || a->num_k == 0) return nullptr;
  if (a->dim == 64) return backward<64>(*a);
  if (a->dim == 128) return backward<128>(*a);
  return failed("vsa_backward", "the head size is neither 64 nor 128");
}
