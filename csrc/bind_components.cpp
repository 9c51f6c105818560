// Python bindings of csrc/components.h. Arguments are addresses and sizes: vmm_fast/ops.py checks
// shapes, dtypes and devices before it takes an address.
#include "bind.h"
#include "components.h"

namespace py = pybind11;

namespace {

using std::int64_t;
using vmm::Address;
using vmm::pointer;

template <class T>
vmm::Components<T> components(Address log_weights, Address precision_cholesky, Address scale,
                              bool diagonal, bool expected, int64_t C, int64_t J, int64_t D) {
  return {pointer<const T>(log_weights),
          pointer<const T>(precision_cholesky),
          pointer<const T>(scale),
          diagonal,
          expected,
          C,
          J,
          D};
}

// One function a dtype, told apart by its suffix. An address of 0 is an argument that is None. The
// order of arguments is that of ops.py: log_weights, precision_cholesky, scale, diagonal, expected,
// C, J, D, threads; then what belongs to the operation; then outputs.
template <class T>
void bind(py::module_& m, const std::string& suffix) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def(("whitened_components" + suffix).c_str(),
        [](Address w, Address L, Address s, bool diagonal, bool expected, int64_t C, int64_t J,
           int64_t D, int threads, Address whitening, Address offsets) {
          return vmm::whitened_components<T>(components<T>(w, L, s, diagonal, expected, C, J, D),
                                             threads, pointer<T>(whitening), pointer<T>(offsets));
        },
        nogil);
  m.def(("whitened_components_backward" + suffix).c_str(),
        [](Address w, Address L, Address s, bool diagonal, bool expected, int64_t C, int64_t J,
           int64_t D, int threads, Address whitening, Address grad_whitening, Address grad_offsets,
           Address grad_log_weights, Address grad_precision_cholesky, Address grad_scale) {
          vmm::whitened_components_backward<T>(
              components<T>(w, L, s, diagonal, expected, C, J, D), threads,
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
