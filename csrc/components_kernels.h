// The interface between csrc/components.cpp and the kernels, whose source (components_kernels.cpp)
// is compiled once per instruction set.
//
// A call takes up to `lanes` consecutive centers, which lie in SIMD lanes.
#pragma once

#include <cstdint>

#include "components.h"

namespace vmm {

// No kernel has more lanes: 64 bytes of doubles.
constexpr int kMaxComponentLanes = 8;

template <class T>
struct ComponentsKernels {
  int lanes;

  // Number of doubles that `scratch` must hold, for both functions below, aligned to 64 bytes.
  std::int64_t (*scratch_size)(std::int64_t dim);

  // For centers [first, first + count): A to whitening [count, D, D], and for each
  //   log_density [count]   offset - log(pi_c / K) + D/2 log 2 pi, NaN where the covariance is not
  //                         finite and positive definite
  //   condition [count]     |A| / min_r A_rr
  void (*forward)(const Components<T>&, std::int64_t first, int count, T* whitening,
                  double* log_density, double* condition, double* scratch);

  // whitening, grad_whitening [count, D, D] and grad_offsets [count] are those of the same centers,
  // and so are the outputs, each null where it is not asked for: grad_scale [count, D, D] or
  // [count, D], and each center's part of the gradient of L, grad_precision [count, D, D].
  void (*backward)(const Components<T>&, std::int64_t first, int count, const T* whitening,
                   const T* grad_whitening, const T* grad_offsets, T* grad_scale,
                   double* grad_precision, double* scratch);

  // As compiled for each instruction set.
  static const ComponentsKernels& baseline();
  static const ComponentsKernels& avx2();
  static const ComponentsKernels& avx512();
};

}  // namespace vmm
