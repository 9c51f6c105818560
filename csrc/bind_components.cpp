// Python bindings of csrc/components.h, in the order of vmm_fast/operations.py: addresses of the
// tensors (0 is an argument that is None; after that of a scale whether it is of the full form),
// the sizes C, D and J, flags, threads, addresses of the results (0 is a gradient that is not
// wanted).
#include "bind.h"
#include "components.h"

namespace py = pybind11;

namespace {

using std::int64_t;
using vmm::Address;
using vmm::pointer;

template <class T>
vmm::Components<T> components(Address log_weights, Address precision_cholesky, Address scale,
                              bool full_scale, bool expected, int64_t C, int64_t J, int64_t D) {
  return {pointer<const T>(log_weights),
          pointer<const T>(precision_cholesky),
          pointer<const T>(scale),
          full_scale,
          expected,
          C,
          J,
          D};
}

// One function a dtype, told apart by its suffix.
template <class T>
void bind(py::module_& m, const std::string& suffix) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def(("whitened_components" + suffix).c_str(),
        [](Address w, Address L, Address s, bool full_scale, int64_t C, int64_t D, int64_t J,
           bool expected, int threads, Address whitening, Address offsets) {
          return vmm::whitened_components<T>(components<T>(w, L, s, full_scale, expected, C, J, D),
                                             threads, pointer<T>(whitening), pointer<T>(offsets));
        },
        nogil);
  m.def(("whitened_components_backward" + suffix).c_str(),
        [](Address grad_whitening, Address grad_offsets, Address w, Address L, Address s,
           bool full_scale, Address whitening, int64_t C, int64_t D, int64_t J, bool expected,
           int threads, Address grad_log_weights, Address grad_precision_cholesky,
           Address grad_scale) {
          vmm::whitened_components_backward<T>(
              components<T>(w, L, s, full_scale, expected, C, J, D), threads,
              pointer<const T>(whitening), pointer<const T>(grad_whitening),
              pointer<const T>(grad_offsets),
              {pointer<T>(grad_log_weights), pointer<T>(grad_precision_cholesky),
               pointer<T>(grad_scale)});
        },
        nogil);
}

}  // namespace

void bind_components(py::module_& m) {
  bind<float>(m, "_float32");
  bind<double>(m, "_float64");
}
