// The binding of the posterior of stick-breaking weights, with the same arguments for CPU and GPUs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind.h"
#include "stick_breaking.h"

namespace vmm::stick_breaking {

// Binds `compute` under `name`: addresses and sizes that vmm_fast.inference.stick_breaking has
// checked, then what is the function's own.
template <class... Own>
void bind_posterior(pybind11::module_& m, const char* name, const char* description,
                    void (*compute)(const Given&, const Posterior&, Own...)) {
  m.def(
      name,
      [compute](Address counts, std::int64_t num_components, Address concentration, double discount,
                double prior_shape, double prior_rate, Address order, Address a, Address b,
                Address expected_log_weights, Address mean_weights, Address map_weights,
                Address concentration_update, Own... own) {
        compute({pointer<const double>(counts), num_components,
                 pointer<const double>(concentration), discount, prior_shape, prior_rate},
                {pointer<std::int64_t>(order), pointer<double>(a), pointer<double>(b),
                 pointer<double>(expected_log_weights), pointer<double>(mean_weights),
                 pointer<double>(map_weights), pointer<double>(concentration_update)},
                own...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(), description);
}

}  // namespace vmm::stick_breaking
