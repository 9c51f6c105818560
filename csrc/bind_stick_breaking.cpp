// Python bindings of stick_breaking.h: data pointers come as integers, checked by
// vmm_fast.inference.stick_breaking, so that building needs neither torch nor numpy.
#include "bind_stick_breaking.h"

#include "bind.h"
#include "stick_breaking.h"

namespace py = pybind11;

namespace {

using vmm::Address;
using vmm::pointer;

void emulated_posterior(const vmm::stick_breaking::Given& given,
                        const vmm::stick_breaking::Posterior& out, Address scratch, int members,
                        bool falling) {
  vmm::stick_breaking::emulated_posterior(given, out, pointer<vmm::stick_breaking::Ranked>(scratch),
                                          members, falling);
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
  vmm::stick_breaking::bind_posterior(m, "stick_breaking_posterior",
                                      "Posterior of the sticks given counts; fills the outputs.",
                                      &vmm::stick_breaking::posterior);
  vmm::stick_breaking::bind_posterior(m, "stick_breaking_posterior_emulated",
                                      "The same by the GPU's algorithm, for tests.",
                                      &emulated_posterior);
  m.def("sticks_to_log_weights", &sticks_to_log_weights, py::arg("sticks"),
        py::arg("num_components"), py::arg("log_weights"), release_gil(),
        "Log weights [C] of sticks [C-1].");
  m.def("log_weights_to_sticks", &log_weights_to_sticks, py::arg("log_weights"),
        py::arg("num_components"), py::arg("sticks"), release_gil(),
        "Sticks [C-1] of log weights [C].");
}
