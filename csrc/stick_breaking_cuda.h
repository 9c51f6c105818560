// The posterior of stick_breaking.h on NVIDIA GPUs. One launch of one thread block does sorting,
// sums and Newton's iterations without waiting for the host in between. One block is a small part
// of a GPU, so vmm_fast leaves more than 100,000 components to the CPU.
#pragma once

#include "stick_breaking.h"

namespace vmm::stick_breaking {

// Enqueues on `stream`, a cudaStream_t of `device`, and returns; a CUDA graph may capture it. All
// addresses are the device's; scratch holds 2 C. Throws std::runtime_error with CUDA's reason.
void posterior_on_gpu(const Given& given, const Posterior& out, Ranked* scratch, int device,
                      void* stream);

// Whether there is such a device, with a driver and an architecture that the kernel can run on.
bool gpu_is_served(int device);

}  // namespace vmm::stick_breaking
