// Functions that the bindings share. Tensors come as addresses, which Python takes after checking
// the tensors, so that building needs neither torch nor numpy; an address of 0 stands for None.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace vmm {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace vmm

void bind_components(pybind11::module_&);
void bind_counts(pybind11::module_&);
void bind_empirical_bayes(pybind11::module_&);
void bind_mixture(pybind11::module_&);
void bind_stick_breaking(pybind11::module_&);
