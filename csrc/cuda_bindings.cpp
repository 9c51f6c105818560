// The CUDA kernels as a Python module, vmm_fast._cuda: a module of its own, so that the core is the
// same with and without a CUDA toolkit. Addresses are a device's, and nothing waits for it.
#include "bind_stick_breaking.h"
#include "stick_breaking_cuda.h"

namespace {

using vmm::Address;
using vmm::pointer;

void stick_breaking_posterior(const vmm::stick_breaking::Given& given,
                              const vmm::stick_breaking::Posterior& out, Address scratch,
                              int device, Address stream) {
  vmm::stick_breaking::posterior_on_gpu(given, out, pointer<vmm::stick_breaking::Ranked>(scratch),
                                        device, pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of vmm_fast: raw device pointers in, raw device pointers out.";
  m.def("is_served", &vmm::stick_breaking::gpu_is_served,
        "Whether the kernels can run on the device of this index.");
  vmm::stick_breaking::bind_posterior(m, "stick_breaking_posterior",
                                      "Enqueues the posterior of the sticks given counts.",
                                      &stick_breaking_posterior);
}
