// Python bindings of stick_breaking.h: data pointers come as integers, checked by
// vmm_fast.inference.stick_breaking, so that building needs neither torch nor numpy.
#include "bind.h"
#include "stick_breaking.h"

namespace py = pybind11;

namespace {

using vmm::Address;
using vmm::pointer;

double posterior(Address counts, std::int64_t num_components, double concentration, double discount,
                 double prior_shape, double prior_rate, Address order, Address a, Address b,
                 Address expected_log_weights, Address mean_weights, Address map_weights) {
  double concentration_update = 0.0;
  vmm::stick_breaking::posterior(
      pointer<const double>(counts), num_components, concentration, discount, prior_shape,
      prior_rate, pointer<std::int64_t>(order), pointer<double>(a), pointer<double>(b),
      pointer<double>(expected_log_weights), pointer<double>(mean_weights),
      pointer<double>(map_weights), &concentration_update);
  return concentration_update;
}

void sticks_to_log_weights(Address sticks, std::int64_t num_components, Address log_weights) {
  vmm::stick_breaking::sticks_to_log_weights(pointer<const double>(sticks), num_components,
                                             pointer<double>(log_weights));
}

void log_weights_to_sticks(Address log_weights, std::int64_t num_components, Address sticks) {
  vmm::stick_breaking::log_weights_to_sticks(pointer<const double>(log_weights), num_components,
                                             pointer<double>(sticks));
}

}  // namespace

void bind_stick_breaking(py::module_& m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  m.def("stick_breaking_posterior", &posterior, py::arg("counts"), py::arg("num_components"),
        py::arg("concentration"), py::arg("discount"), py::arg("prior_shape"),
        py::arg("prior_rate"), py::arg("order"), py::arg("a"), py::arg("b"),
        py::arg("expected_log_weights"), py::arg("mean_weights"), py::arg("map_weights"),
        release_gil(),
        "Posterior of the sticks given counts; fills the outputs, returns the concentration.");
  m.def("sticks_to_log_weights", &sticks_to_log_weights, py::arg("sticks"),
        py::arg("num_components"), py::arg("log_weights"), release_gil(),
        "Log weights [C] of sticks [C-1].");
  m.def("log_weights_to_sticks", &log_weights_to_sticks, py::arg("log_weights"),
        py::arg("num_components"), py::arg("sticks"), release_gil(),
        "Sticks [C-1] of log weights [C].");
}
