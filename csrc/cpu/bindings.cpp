// The module megagen._cpu: one function per operation, addresses and sizes in, nothing out; those of video
// sparse attention are in vsa_bindings.cpp.
// Python checks shapes, types and contiguity before it calls.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels.h"

namespace py = pybind11;
void bind_vsa(py::module_& m);

namespace megagen {
namespace {
const char* const kNames[] = {"generic", "avx2", "avx512"};

// The instruction sets that the builds were compiled for, as far as this processor has them.
bool has(Isa isa) {
#if MEGAGEN_X86
  if (isa == Isa::kAvx512)
    return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::kGeneric;
}
Isa best_isa() { return has(Isa::kAvx512) ? Isa::kAvx512 : has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kGeneric; }
Isa isa_in_use = best_isa();

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }
std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512})
    if (has(isa)) found.push_back(name_of(isa));
  return found;
}
void use_isa(const std::string& name) {
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512})
    if (has(isa) && name == name_of(isa)) {
      isa_in_use = isa;
      return;
    }
  throw std::invalid_argument("this processor and build have no " + name);
}

// OpenMP's threads do not survive a fork: a child of a process that had started them would wait for
// ever, so it stays on one thread.
bool pool_started = false, pool_lost = false;
void in_forked_child() { pool_lost = pool_started; }
}  // namespace

Isa chosen_isa() { return isa_in_use; }

int usable(int threads) {
  if (pool_lost) return 1;
  if (threads > 1) pool_started = true;
  return threads;
}
}  // namespace megagen

namespace {
using namespace megagen;
using Strided = std::array<Index, 3>;  // address, row stride, batch stride
using NormRopeSizes = std::array<Index, 8>;

// Sizes of an operation with modulation rows, and which row each token uses.
struct Rows {
  Index num_tokens, batch, dim, num_rows, mod_batch;
  Address rows, bounds;
  Index num_segments;
};
Segments segments_of(const Rows& r) {
  return {r.num_tokens, r.num_segments, at<const Index>(r.bounds), at<const Index>(r.rows), r.num_tokens / r.num_rows};
}

Modulation modulation(const Strided& address_and_strides) {
  const auto [address, row_stride, batch_stride] = address_and_strides;
  return {at<const float>(static_cast<Address>(address)), row_stride, batch_stride};
}
LayerNorm layernorm(const Rows& r, float eps, float one, Address x, const Strided& scale) {
  LayerNorm op{};
  op.batch = r.batch, op.dim = r.dim, op.num_rows = r.num_rows, op.mod_batch = r.mod_batch;
  op.segments = segments_of(r);
  op.eps = eps, op.one = one, op.x = at<const float>(x), op.scale = modulation(scale);
  return op;
}
Residual residual(const Rows& r, Address y, const Strided& gate) {
  Residual op{};
  op.batch = r.batch, op.dim = r.dim, op.num_rows = r.num_rows, op.mod_batch = r.mod_batch;
  op.segments = segments_of(r);
  op.y = at<const float>(y), op.gate = modulation(gate);
  return op;
}
NormRope norm_rope(const NormRopeSizes& sizes, float eps, Address x, Address weight, Address cos, Address sin,
                   Address sum_squares) {
  NormRope op{};
  const auto& [num_tokens, batch, heads, head_dim, token_stride, batch_stride, head_stride, num_features] = sizes;
  op.num_tokens = num_tokens, op.batch = batch, op.heads = heads, op.head_dim = head_dim;
  op.token_stride = token_stride, op.batch_stride = batch_stride, op.head_stride = head_stride;
  op.num_features = num_features, op.eps = eps;
  op.x = at<const float>(x), op.weight = at<const float>(weight);
  op.cos = at<const float>(cos), op.sin = at<const float>(sin);
  op.sum_squares = at<const float>(sum_squares);
  return op;
}

// Cuts token positions into runs with one row each, at most kSegment long; returns their number, or
// -1 where a row is not one of num_rows.
Index cut_segments(Address rows_address, Index num_tokens, Index num_rows, Address bounds_address) {
  const Index* rows = at<const Index>(rows_address);
  Index *bounds = at<Index>(bounds_address), count = 0;
  for (Index s = 0; s < num_tokens; ++s) {
    if (rows[s] < 0 || rows[s] >= num_rows) return -1;
    if (s == 0 || rows[s] != rows[s - 1] || s - bounds[count - 1] == kSegment) bounds[count++] = s;
  }
  bounds[count] = num_tokens;
  return count;
}
}  // namespace

PYBIND11_MODULE(_cpu, m) {
  pthread_atfork(nullptr, nullptr, megagen::in_forked_child);
  m.attr("SEGMENT") = kSegment;
  m.def("isa", [] { return name_of(isa_in_use); });
  m.def("isas", isas);  // those that can be used here, slowest first
  m.def("use_isa", use_isa);
  m.def("use_generic", [](bool wanted) { isa_in_use = wanted ? Isa::kGeneric : best_isa(); }, py::arg("wanted"));
  m.def("cut_segments", cut_segments);
  bind_vsa(m);

  py::class_<Rows>(m, "Rows").def(py::init([](Index num_tokens, Index batch, Index dim, Index num_rows,
                                              Index mod_batch, Address rows, Address bounds, Index num_segments) {
    return Rows{num_tokens, batch, dim, num_rows, mod_batch, rows, bounds, num_segments};
  }));

  m.def("layernorm_forward", [](const Rows& rows, float eps, float one, Address x, const Strided& scale,
                                const Strided& shift, Address y, Address mean, Address rstd, int threads) {
    LayerNorm op = layernorm(rows, eps, one, x, scale);
    op.shift = modulation(shift), op.y = at<float>(y);
    op.mean = at<float>(mean), op.rstd = at<float>(rstd);
    py::gil_scoped_release release;
    MEGAGEN_CALL(layernorm_forward, op, usable(threads));
  });
  m.def("layernorm_backward", [](const Rows& rows, float one, Address x, const Strided& scale, Address mean,
                                 Address rstd, Address dy, Address dx, Address partial, Address dscale,
                                 Address dshift, int threads) {
    LayerNorm op = layernorm(rows, 0, one, x, scale);
    op.mean = at<float>(mean), op.rstd = at<float>(rstd), op.dy = at<const float>(dy), op.dx = at<float>(dx);
    op.partial = at<float>(partial), op.dscale = at<float>(dscale), op.dshift = at<float>(dshift);
    py::gil_scoped_release release;
    MEGAGEN_CALL(layernorm_backward, op, usable(threads));
  });
  m.def("residual_forward", [](const Rows& rows, Address x, Address y, const Strided& gate, Address out, int threads) {
    Residual op = residual(rows, y, gate);
    op.x = at<const float>(x), op.out = at<float>(out);
    py::gil_scoped_release release;
    MEGAGEN_CALL(residual_forward, op, usable(threads));
  });
  m.def("residual_backward", [](const Rows& rows, Address y, const Strided& gate, Address dout, Address dy,
                                Address partial, Address dgate, int threads) {
    Residual op = residual(rows, y, gate);
    op.dout = at<const float>(dout), op.dy = at<float>(dy);
    op.partial = at<float>(partial), op.dgate = at<float>(dgate);
    py::gil_scoped_release release;
    MEGAGEN_CALL(residual_backward, op, usable(threads));
  });
  m.def("norm_rope_forward", [](const NormRopeSizes& sizes, float eps, Address x, Address weight, Address cos,
                                Address sin, Address sum_squares, Address y, Address rstd, int threads) {
    NormRope op = norm_rope(sizes, eps, x, weight, cos, sin, sum_squares);
    op.y = at<float>(y), op.rstd = at<float>(rstd);
    py::gil_scoped_release release;
    MEGAGEN_CALL(norm_rope_forward, op, usable(threads));
  });
  m.def("norm_rope_backward", [](const NormRopeSizes& sizes, Address x, Address weight, Address cos, Address sin,
                                 Address sum_squares, Address rstd, Address dy, Address dx, Address dsum_squares,
                                 Address partial, Address dweight, const std::array<Index, 3>& dy_strides,
                                 int threads) {
    NormRope op = norm_rope(sizes, 0, x, weight, cos, sin, sum_squares);
    op.rstd = at<float>(rstd), op.dy = at<const float>(dy), op.dx = at<float>(dx);
    op.dy_token_stride = dy_strides[0], op.dy_batch_stride = dy_strides[1], op.dy_head_stride = dy_strides[2];
    op.dsum_squares = at<float>(dsum_squares), op.partial = at<float>(partial), op.dweight = at<float>(dweight);
    py::gil_scoped_release release;
    MEGAGEN_CALL(norm_rope_backward, op, usable(threads));
  });
  m.def("sum_squares", [](const NormRopeSizes& sizes, Address x, Address out, int threads) {
    const NormRope op = norm_rope(sizes, 0, x, 0, 0, 0, 0);
    py::gil_scoped_release release;
    MEGAGEN_CALL(sum_squares, op, at<float>(out), usable(threads));
  });
  m.def("bias_gelu_forward", [](Index lines, Index dim, Address x, Address bias, Address y, int threads) {
    BiasGelu op{};
    op.lines = lines, op.dim = dim, op.x = at<const float>(x), op.bias = at<const float>(bias), op.y = at<float>(y);
    py::gil_scoped_release release;
    MEGAGEN_CALL(bias_gelu_forward, op, usable(threads));
  });
  m.def("bias_gelu_backward", [](Index lines, Index dim, Address x, Address bias, Address dy, Address dx,
                                 Address partial, Address dbias, int threads) {
    BiasGelu op{};
    op.lines = lines, op.dim = dim, op.x = at<const float>(x), op.bias = at<const float>(bias);
    op.dy = at<const float>(dy), op.dx = at<float>(dx);
    op.partial = at<float>(partial), op.dbias = at<float>(dbias);
    py::gil_scoped_release release;
    MEGAGEN_CALL(bias_gelu_backward, op, usable(threads));
  });
}
