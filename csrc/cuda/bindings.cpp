// Python's view of api.h: each argument struct is a class of plain fields, each entry point a function of
// one of them. A failure is a RuntimeError.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "api.h"

namespace py = pybind11;

namespace {
template <class Args>
auto caller(MegagenError (*entry)(const Args*)) {
  return [entry](const Args& args) {
    py::gil_scoped_release release;
    if (MegagenError error = entry(&args)) throw std::runtime_error(error);
  };
}
}  // namespace

#define MG_FIELD(name) .def_readwrite(#name, &Args::name)

PYBIND11_MODULE(_cuda, m) {
  m.def("devices", [] {
    MegagenError reason = nullptr;
    const int count = megagen_cuda_devices(&reason);
    return py::make_tuple(count, reason ? reason : "");
  });
  m.def("transpose_bytes", &megagen_transpose_bytes);
  m.def("merge_lists", caller(megagen_merge_lists));
  m.def("transpose", caller(megagen_transpose));
  m.def("vsa_forward", caller(megagen_vsa_forward));
  m.def("combine_backward", caller(megagen_combine_backward));
  m.def("vsa_backward", caller(megagen_vsa_backward));
  m.def("gather_probe", caller(megagen_gather_probe));
  {
    using Args = MegagenMerge;
    py::class_<Args>(m, "Merge", py::module_local()).def(py::init([] { return Args{}; }))
        MG_FIELD(items) MG_FIELD(num) MG_FIELD(indptr) MG_FIELD(owner_sizes) MG_FIELD(item_sizes)
        MG_FIELD(entries) MG_FIELD(counts) MG_FIELD(order) MG_FIELD(sequences) MG_FIELD(stride)
        MG_FIELD(owners) MG_FIELD(stream);
  }
  {
    using Args = MegagenTranspose;
    py::class_<Args>(m, "Transpose", py::module_local()).def(py::init([] { return Args{}; }))
        MG_FIELD(idx) MG_FIELD(num) MG_FIELD(indptr) MG_FIELD(rows) MG_FIELD(bits) MG_FIELD(sequences)
        MG_FIELD(scratch_bytes) MG_FIELD(num_q) MG_FIELD(num_k) MG_FIELD(width) MG_FIELD(stream);
  }
  {
    using Args = MegagenForward;
    py::class_<Args>(m, "Forward", py::module_local()).def(py::init([] { return Args{}; }))
        MG_FIELD(q) MG_FIELD(k) MG_FIELD(v) MG_FIELD(o) MG_FIELD(lse) MG_FIELD(entries) MG_FIELD(counts)
        MG_FIELD(q_sizes) MG_FIELD(gate) MG_FIELD(coarse) MG_FIELD(out) MG_FIELD(token) MG_FIELD(sequences)
        MG_FIELD(tokens) MG_FIELD(heads) MG_FIELD(num_q) MG_FIELD(num_k) MG_FIELD(width) MG_FIELD(dim)
        MG_FIELD(fp16) MG_FIELD(scale) MG_FIELD(stream);
  }
  {
    using Args = MegagenBackward;
    py::class_<Args>(m, "Backward", py::module_local()).def(py::init([] { return Args{}; }))
        MG_FIELD(q) MG_FIELD(k) MG_FIELD(v) MG_FIELD(o) MG_FIELD(grad) MG_FIELD(lse) MG_FIELD(dlse)
        MG_FIELD(stats) MG_FIELD(dq) MG_FIELD(dk) MG_FIELD(dv) MG_FIELD(dq32) MG_FIELD(entries)
        MG_FIELD(counts) MG_FIELD(key_entries) MG_FIELD(key_counts) MG_FIELD(key_order) MG_FIELD(key_indptr)
        MG_FIELD(q_sizes) MG_FIELD(k_sizes) MG_FIELD(sequences) MG_FIELD(key_width) MG_FIELD(num_q)
        MG_FIELD(num_k) MG_FIELD(width) MG_FIELD(dim) MG_FIELD(fast) MG_FIELD(scale) MG_FIELD(stream);
  }
  {
    using Args = MegagenProbe;
    py::class_<Args>(m, "Probe", py::module_local()).def(py::init([] { return Args{}; }))
        MG_FIELD(k) MG_FIELD(v) MG_FIELD(entries) MG_FIELD(counts) MG_FIELD(sequences) MG_FIELD(pairs)
        MG_FIELD(num_k) MG_FIELD(width) MG_FIELD(dim) MG_FIELD(stream);
  }
  {
    using Args = MegagenCombine;
    py::class_<Args>(m, "Combine", py::module_local()).def(py::init([] { return Args{}; }))
        MG_FIELD(grad) MG_FIELD(gate) MG_FIELD(coarse) MG_FIELD(tiled) MG_FIELD(dgate) MG_FIELD(dcoarse)
        MG_FIELD(token) MG_FIELD(sequences) MG_FIELD(tokens) MG_FIELD(heads) MG_FIELD(num_q) MG_FIELD(dim)
        MG_FIELD(fp16) MG_FIELD(stream);
  }
}
