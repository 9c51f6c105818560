// The compiled core as a Python module, vmm_fast._core.
#include "bind.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of vmm_fast: raw pointers in, raw pointers out.";
  bind_components(m);
  bind_counts(m);
  bind_empirical_bayes(m);
  bind_mixture(m);
  bind_stick_breaking(m);
}
