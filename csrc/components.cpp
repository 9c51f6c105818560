// Everything around the kernels: threads, offsets, errors, and sums over a component's K centers.
#include "components.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "components_kernels.h"
#include "finite.h"
#include "instruction_set.h"
#include "parallel.h"

namespace vmm {
namespace {

using std::int64_t;

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

template <class T>
int64_t centers_per_component(const Components<T>& components) {
  return components.num_centers / components.num_components;
}

// A whole number of 64-byte vectors.
int64_t aligned(int64_t doubles) { return (doubles + 7) / 8 * 8; }

// Runs body(thread, first, count, scratch) over runs of at most kernel.lanes centers. A component's
// centers stay with one thread, in order. body must not throw.
template <class T, class Body>
void for_each_run(const Components<T>& components, const ComponentsKernels<T>& kernel, int threads,
                  int64_t extra_size, Body body) {
  const int64_t K = centers_per_component(components);
  // Allocated here: an exception must not leave a parallel region.
  const int64_t scratch_size = aligned(kernel.scratch_size(components.dim) + extra_size);
  const auto scratch = make_buffer<double>(threads * scratch_size);
  parallel_ranges(components.num_components, threads, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t j = begin * K; j < end * K; j += kernel.lanes)
      body(thread, j, static_cast<int>(std::min<int64_t>(kernel.lanes, end * K - j)),
           scratch.get() + thread * scratch_size);
  });
}

template <class T>
int threads_for(const Components<T>& components, int threads) {
  const double dim = static_cast<double>(components.dim);
  return useful_threads(threads, components.num_centers * dim * dim * (dim + 10));
}

}  // namespace

void refuse_covariance(int64_t component) {
  throw std::invalid_argument(
      "component " + std::to_string(component) +
      " has no positive-definite covariance: precision_cholesky and the scale that the encoder "
      "gives its pseudo-input must be finite with a positive diagonal");
}

template <class T>
double whitened_components(const Components<T>& components, int threads, T* whitening, T* offsets) {
  const int64_t D = components.dim, K = centers_per_component(components);
  check_log_weights("log_weights", components.log_weights, components.num_components);
  const auto& kernel = current_kernels<ComponentsKernels<T>>();
  threads = threads_for(components, threads);
  const double constant = -std::log(K) - 0.5 * D * std::log(2 * M_PI);
  std::vector<double> largest(threads, 0.0);
  std::vector<int64_t> bad(threads, kNone);
  for_each_run<T>(components, kernel, threads, 0,
                  [&](int thread, int64_t first, int count, double* scratch) {
                    double log_density[kMaxComponentLanes], condition[kMaxComponentLanes];
                    kernel.forward(components, first, count, whitening + first * D * D, log_density,
                                   condition, scratch);
                    for (int i = 0; i < count; i++) {
                      const int64_t j = first + i;
                      if (std::isnan(log_density[i])) bad[thread] = std::min(bad[thread], j / K);
                      const double log_weight = components.log_weights[j / K];
                      offsets[j] = static_cast<T>(log_weight + (constant + log_density[i]));
                      largest[thread] = std::max(largest[thread], condition[i]);
                    }
                  });
  const int64_t first_bad = *std::min_element(bad.begin(), bad.end());
  if (first_bad != kNone) refuse_covariance(first_bad);
  return *std::max_element(largest.begin(), largest.end());
}

template <class T>
void whitened_components_backward(const Components<T>& components, int threads, const T* whitening,
                                  const T* grad_whitening, const T* grad_offsets,
                                  const ComponentsGradients<T>& gradients) {
  const int64_t D = components.dim, K = centers_per_component(components);
  if (gradients.log_weights)
    for (int64_t c = 0; c < components.num_components; c++) {
      double total = 0;
      for (int64_t k = 0; k < K; k++) total += grad_offsets[c * K + k];
      gradients.log_weights[c] = static_cast<T>(total);
    }
  if (!gradients.precision_cholesky && !gradients.scale) return;

  const auto& kernel = current_kernels<ComponentsKernels<T>>();
  threads = threads_for(components, threads);
  // Gradients of L by centers, and their running sum over a component's.
  const int64_t matrix = D * D,
                extra_size = gradients.precision_cholesky ? (kernel.lanes + 1) * matrix : 0;
  const int64_t scale_size = components.full_scale ? matrix : D;
  for_each_run<T>(
      components, kernel, threads, extra_size, [&](int, int64_t first, int count, double* scratch) {
        double* by_center =
            gradients.precision_cholesky ? scratch + kernel.scratch_size(D) : nullptr;
        kernel.backward(components, first, count, whitening + first * matrix,
                        grad_whitening + first * matrix, grad_offsets + first,
                        gradients.scale ? gradients.scale + first * scale_size : nullptr, by_center,
                        scratch);
        if (!by_center) return;
        double* sum = by_center + kernel.lanes * matrix;
        for (int i = 0; i < count; i++) {
          const int64_t c = (first + i) / K, k = (first + i) % K;
          for (int64_t e = 0; e < matrix; e++)
            sum[e] = k == 0 ? by_center[i * matrix + e] : sum[e] + by_center[i * matrix + e];
          if (k == K - 1) std::copy(sum, sum + matrix, gradients.precision_cholesky + c * matrix);
        }
      });
}

#define VMM_INSTANTIATE(T)                                                                     \
  template double whitened_components<T>(const Components<T>&, int, T*, T*);                   \
  template void whitened_components_backward<T>(const Components<T>&, int, const T*, const T*, \
                                                const T*, const ComponentsGradients<T>&);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm
