// The interface between csrc/counts.cpp and the kernels, whose source (count_kernels.cpp) is
// compiled once per instruction set. A call computes one cell.
#pragma once

#include <cstdint>

namespace vmm {

template <class T>
struct CountRow {
  std::int64_t genes;
  const T* counts;
  const T* mean;
  const T* inverse_dispersion;  // null: Poisson
  const T* dropout_logits;      // null: not zero-inflated
};

// Null where it is not asked for. That of inverse_dispersion is added to what is there.
template <class T>
struct CountGradients {
  T* mean;
  T* inverse_dispersion;
  T* dropout_logits;
};

template <class T>
struct CountKernels {
  // `positions` has room for 2 G numbers.
  T (*log_prob)(const CountRow<T>&, std::int32_t* positions);
  void (*backward)(const CountRow<T>&, T grad, const CountGradients<T>&, std::int32_t* positions);
  // mean [G] = library_size softmax(logits [G])
  void (*softmax_mean)(std::int64_t genes, const T* logits, T library_size, T* mean);
  // Turns the gradient of such a mean into that of its logits; returns that of its library size.
  T (*softmax_mean_backward)(std::int64_t genes, const T* mean, T library_size, T* grad);

  // As compiled for each instruction set.
  static const CountKernels& baseline();
  static const CountKernels& avx2();
  static const CountKernels& avx512();
};

}  // namespace vmm
