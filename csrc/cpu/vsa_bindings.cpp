// Video sparse attention in the module megagen._cpu: addresses and sizes in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "vsa.h"

namespace py = pybind11;
namespace {
using namespace megagen;

// Address, is bf16, strides of batch, head and token, address of token_of_slot or 0.
using TokensIn = std::array<Index, 6>;
Tokens tokens(const TokensIn& in) {
  const auto [data, bf16, batch, head, token, map] = in;
  return {at<void>(static_cast<Address>(data)), bf16 != 0, batch, head, token,
          at<const Index>(static_cast<Address>(map))};
}

// Width, and the addresses of idx, num, q_sizes, kv_sizes, indptr and rows.
using ListsIn = std::array<Index, 7>;
BlockLists lists(const ListsIn& in) {
  const auto ints = [&](int i) { return at<const int32_t>(static_cast<Address>(in[i])); };
  return {in[0], ints(1), ints(2), ints(3), ints(4), ints(5), ints(6)};
}

using FineSizes = std::array<Index, 5>;  // B, H, n_q, n_k, D
Fine fine(const FineSizes& sizes, float scale, const ListsIn& in) {
  Fine op{};
  const auto& [batch, heads, num_q, num_k, dim] = sizes;
  op.batch = batch, op.heads = heads, op.num_q = num_q, op.num_k = num_k, op.dim = dim;
  op.scale = scale, op.lists = lists(in);
  return op;
}
Coarse coarse(const FineSizes& sizes) {
  Coarse op{};
  const auto& [batch, heads, num_q, num_k, dim] = sizes;
  op.batch = batch, op.heads = heads, op.num_q = num_q, op.num_k = num_k, op.dim = dim;
  return op;
}

// Asks for huge pages behind fresh memory: the first touch of ordinary ones costs as much as filling them
// four times over. Only advice: where the system has none, nothing changes.
void advise_huge(Address address, Index bytes) {
#if defined(__linux__)
  constexpr Address kHuge = Address{1} << 21;
  const Address begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
}  // namespace

void bind_vsa(py::module_& m) {
  m.attr("BLOCK") = kBlock;
  m.def("advise_huge", advise_huge);
  m.def("block_panels", [](Index dim) { return MEGAGEN_CALL(block_panels, dim); });
  m.def("fine_forward_workspace", [](const FineSizes& sizes, int threads) {
    return MEGAGEN_CALL(fine_forward_workspace, fine(sizes, 0, {}), threads);
  });
  // panels: q, k, v; tokens: the same (address 0 where they come in panels) and o
  using Panels = std::array<Address, 3>;
  m.def("fine_forward", [](const FineSizes& sizes, float scale, const ListsIn& in, const Panels& panels,
                           const std::array<TokensIn, 4>& given, Address lse, Address workspace, int threads) {
    Fine op = fine(sizes, scale, in);
    op.q_panels = at<const float>(panels[0]), op.k_panels = at<const float>(panels[1]);
    op.v_panels = at<const float>(panels[2]);
    op.q = tokens(given[0]), op.k = tokens(given[1]), op.v = tokens(given[2]), op.o = tokens(given[3]);
    op.lse = at<float>(lse), op.workspace = at<float>(workspace);
    py::gil_scoped_release release;
    MEGAGEN_CALL(fine_forward, op, usable(threads));
  });
  m.def("fine_backward_workspace", [](const FineSizes& sizes, Index width, int threads) {
    return MEGAGEN_CALL(fine_backward_workspace, fine(sizes, 0, {width}), threads);
  });
  // given: do, q, k, v, o; wanted: dq, dk, dv; means: their gradients, or address 0
  m.def("fine_backward", [](const FineSizes& sizes, float scale, const ListsIn& in, const std::array<TokensIn, 5>& given,
                            const std::array<TokensIn, 3>& wanted, const std::array<TokensIn, 3>& means, Address lse,
                            Address dlse, Address workspace, int threads) {
    Fine op = fine(sizes, scale, in);
    op.do_ = tokens(given[0]), op.q = tokens(given[1]), op.k = tokens(given[2]), op.v = tokens(given[3]);
    op.o = tokens(given[4]), op.dq = tokens(wanted[0]), op.dk = tokens(wanted[1]), op.dv = tokens(wanted[2]);
    op.dqm = tokens(means[0]), op.dkm = tokens(means[1]), op.dvm = tokens(means[2]);
    op.lse = at<float>(lse), op.dlse = at<const float>(dlse), op.workspace = at<float>(workspace);
    py::gil_scoped_release release;
    MEGAGEN_CALL(fine_backward, op, usable(threads));
  });
  m.def("coarse_forward_workspace", [](const FineSizes& sizes, int threads) {
    return MEGAGEN_CALL(coarse_forward_workspace, coarse(sizes), threads);
  });
  m.def("coarse_forward", [](const FineSizes& sizes, Index topk, float scale, bool round_scores,
                             const std::array<TokensIn, 4>& qkvo, Address key_sizes, Address lse, Address idx,
                             Address num, Address workspace, int threads) {
    Coarse op = coarse(sizes);
    op.topk = topk, op.scale = scale, op.round_scores = round_scores;
    op.q = tokens(qkvo[0]), op.k = tokens(qkvo[1]), op.v = tokens(qkvo[2]), op.o = tokens(qkvo[3]);
    op.sizes = at<const int32_t>(key_sizes), op.lse = at<float>(lse);
    op.idx = at<int32_t>(idx), op.num = at<int32_t>(num), op.workspace = at<float>(workspace);
    py::gil_scoped_release release;
    MEGAGEN_CALL(coarse_forward, op, usable(threads));
  });
  m.def("select_topk", [](Index rows, Index num_k, Index topk, Address scores, Address sizes, Address idx, Address num,
                          Address workspace, int threads) {
    const Select op{rows, num_k, topk, at<const float>(scores), at<const int32_t>(sizes),
                    at<int32_t>(idx), at<int32_t>(num), at<float>(workspace)};
    py::gil_scoped_release release;
    MEGAGEN_CALL(select_topk, op, usable(threads));
  });
  m.def("transpose_lists", [](const std::array<Index, 4>& sizes, Address idx, Address num, Address indptr, Address rows,
                              int threads) {
    const auto [heads, num_q, num_k, width] = sizes;
    const Transpose op{heads, num_q, num_k, width, at<const int32_t>(idx), at<const int32_t>(num),
                       at<int32_t>(indptr), at<int32_t>(rows)};
    py::gil_scoped_release release;
    MEGAGEN_CALL(transpose_lists, op, usable(threads));
  });

  using GlueSizes = std::array<Index, 4>;     // B, H, n, D
  using GlueIn = std::array<TokensIn, 6>;     // x, slots, mean, gate, dgate, dmean; address 0 where there is none
  const auto glue = [](const GlueSizes& sizes, Address block_sizes, const GlueIn& in, Address panels) {
    const auto [batch, heads, num_blocks, dim] = sizes;
    return Glue{batch, heads, num_blocks, dim, at<const int32_t>(block_sizes), tokens(in[0]), tokens(in[1]),
                tokens(in[2]), tokens(in[3]), tokens(in[4]), tokens(in[5]), at<float>(panels)};
  };
#define MEGAGEN_GLUE(function)                                                                              \
  m.def(#function, [glue](const GlueSizes& sizes, Address block_sizes, const GlueIn& in, Address panels,    \
                          int threads) {                                                                    \
    const Glue op = glue(sizes, block_sizes, in, panels);                                                   \
    py::gil_scoped_release release;                                                                         \
    MEGAGEN_CALL(function, op, usable(threads));                                                            \
  })
  MEGAGEN_GLUE(block_mean);
  MEGAGEN_GLUE(block_mean_backward);
  MEGAGEN_GLUE(combine);
  MEGAGEN_GLUE(combine_backward);
#undef MEGAGEN_GLUE
}
