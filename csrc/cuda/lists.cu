// Launches of the list builders.
#include "lists.cuh"

#include <algorithm>

#include "launch.h"

namespace {
using namespace megagen::cuda;
constexpr int kWarps = kListThreads / 32;

MegagenError transpose_some(TransposeArgs a, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(a.sequences) * a.num_k * a.words * sizeof(uint32_t);
  if (MegagenError e = check("clear", cudaMemsetAsync(a.bits, 0, bytes, stream))) return e;
  const int64_t rows = ceil_div(a.sequences * a.num_q, kWarps), columns = ceil_div(a.sequences * a.num_k, kWarps);
  if (MegagenError e = launch(mark_kernel, rows, kListThreads, 0, stream, a)) return e;
  if (MegagenError e = launch(count_kernel, columns, kListThreads, 0, stream, a)) return e;
  if (MegagenError e = launch(scan_kernel, a.sequences, 32, 0, stream, a)) return e;
  return launch(fill_kernel, columns, kListThreads, 0, stream, a);
}
}  // namespace

extern "C" MegagenError megagen_merge_lists(const MegagenMerge* m) {
  MergeArgs a{};
  a.items = at<const int>(m->items), a.num = at<const int>(m->num), a.indptr = at<const int>(m->indptr);
  a.owner_sizes = at<const int>(m->owner_sizes), a.item_sizes = at<const int>(m->item_sizes);
  a.entries = at<uint32_t>(m->entries), a.counts = at<int>(m->counts);
  a.sequences = m->sequences, a.stride = m->stride, a.owners = m->owners;
  a.pairs = static_cast<int>(ceil_div(m->owners, 2));
  const cudaStream_t stream = stream_of(m->stream);
  const int64_t blocks = ceil_div(a.sequences * a.pairs, kWarps);
  if (MegagenError e = launch(merge_kernel, blocks, kListThreads, 0, stream, a)) return e;
  if (!m->order || a.pairs == 0) return nullptr;
  return launch(order_kernel, a.sequences, kListThreads, 0, stream, static_cast<const int*>(a.counts),
                at<int>(m->order), a.pairs);
}

extern "C" int64_t megagen_transpose_bytes(int32_t num_q, int32_t num_k) {
  return int64_t{num_k} * ceil_div(num_q, 32) * static_cast<int64_t>(sizeof(uint32_t));
}

extern "C" MegagenError megagen_transpose(const MegagenTranspose* m) {
  const int64_t each = megagen_transpose_bytes(m->num_q, m->num_k);
  if (each > 0 && m->scratch_bytes < each) return failed("transpose", "the scratch is too small for one sequence");
  TransposeArgs a{};
  a.idx = at<const int>(m->idx), a.num = at<const int>(m->num), a.bits = at<uint32_t>(m->bits);
  a.indptr = at<int>(m->indptr), a.rows = at<int>(m->rows);
  a.num_q = m->num_q, a.num_k = m->num_k, a.width = m->width, a.words = static_cast<int>(ceil_div(m->num_q, 32));
  const int64_t most = each > 0 ? m->scratch_bytes / each : m->sequences;
  for (a.first = 0; a.first < m->sequences; a.first += a.sequences) {
    a.sequences = std::min(most, m->sequences - a.first);
    if (MegagenError e = transpose_some(a, stream_of(m->stream))) return e;
  }
  return nullptr;
}
