// One CUDA block as the team of stick_breaking_team.h, and its launch.
#include <stdexcept>
#include <string>

#include "stick_breaking_cuda.h"
#include "stick_breaking_team.h"

namespace vmm::stick_breaking {

namespace {

// Twice as many would leave each thread 64 registers, of which some would be spilled.
constexpr int kThreads = 512;

class Block {
 public:
  __device__ explicit Block(unsigned char* slots) : slots_(slots) {}
  __device__ static constexpr int size() { return kThreads; }
  template <class Body>
  __device__ void each(Body body) {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class T>
  __device__ T* slots() {
    static_assert(sizeof(T) <= kSlotSize);
    return reinterpret_cast<T*>(slots_);
  }

 private:
  unsigned char* slots_;
};

}  // namespace

// extern "C" for a name that can be read in reports and profiles.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    stick_breaking_posterior(Given given, Posterior out, Ranked* scratch) {
  __shared__ alignas(Rest) unsigned char slots[2 * kThreads * kSlotSize];
  Block team(slots);
  sort_by_count(team, given, scratch, scratch + given.num_components, out.order);
  posterior_of_sorted(team, given, out);
}

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
}

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    if (device_ != previous_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_;
};

}  // namespace

void posterior_on_gpu(const Given& given, const Posterior& out, Ranked* scratch, int device,
                      void* stream) {
  const DeviceGuard guard(device);
  stick_breaking_posterior<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(given, out,
                                                                                  scratch);
  check(cudaGetLastError());
}

bool gpu_is_served(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, stick_breaking_posterior));
    return true;
  } catch (const std::runtime_error&) {
    cudaGetLastError();  // the next launch is not to blame for it
    return false;
  }
}

}  // namespace vmm::stick_breaking
