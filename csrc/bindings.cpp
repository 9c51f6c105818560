// The compiled core as a Python module, vmm_fast._core.
#include <pybind11/pybind11.h>

void bind_components(pybind11::module_&);
void bind_empirical_bayes(pybind11::module_&);
void bind_mixture(pybind11::module_&);
void bind_stick_breaking(pybind11::module_&);

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of vmm_fast: raw pointers in, raw pointers out.";
  bind_components(m);
  bind_empirical_bayes(m);
  bind_mixture(m);
  bind_stick_breaking(m);
}
