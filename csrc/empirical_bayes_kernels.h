// The interface between csrc/empirical_bayes.cpp and the kernels, whose source
// (empirical_bayes_kernels.cpp) is compiled once per instruction set.
//
// A call takes `count` consecutive components from `first` on, at most `lanes`, which lie in SIMD
// lanes. Formulas are in empirical_bayes.h.
#pragma once

#include <cstdint>

#include "empirical_bayes.h"

namespace vmm::empirical_bayes {

// What one kernel call reads beside the parameters.
struct Weighted {
  Sums sums;
  double data_weight;    // of the sums
  double prior_weight;   // of the parameters' log-priors
  double wishart_scale;  // v
};

template <class T>
struct Kernels {
  int lanes;

  // Number of doubles that `scratch` must hold, aligned to 64 bytes, for every function below.
  std::int64_t (*scratch_size)(std::int64_t dim);

  // L [count, D, D] with a zero upper triangle.
  void (*precision_cholesky)(const Parameters<T>&, std::int64_t first, int count, T* L,
                             double* scratch);

  // The same L, log det L [count] (NaN where a diagonal element is
  // not positive and finite), |L| / min_r L_rr [count] and 1/2 tr(Lambda S) [count K].
  void (*expected)(const Parameters<T>&, std::int64_t first, int count, double* L, double* log_det,
                   double* condition, double* half_trace, double* scratch);

  // Gradients of centers, scales and raw precisions; log_prior [count] receives what depends on
  // them of the components' log p(m) + log p(Lambda), but for log det L.
  void (*gradients)(const Parameters<T>&, std::int64_t first, int count, const Weighted&,
                    const Gradients<T>&, double* log_prior, double* scratch);

  // Sets free centers, then precisions, to their maximisers; map_prior says whether there is one.
  void (*maximise)(const Parameters<T>&, std::int64_t first, int count, const Weighted&,
                   bool map_prior, Learnt, double* scratch);

  // As compiled for each instruction set.
  static const Kernels& baseline();
  static const Kernels& avx2();
  static const Kernels& avx512();
};

}  // namespace vmm::empirical_bayes
