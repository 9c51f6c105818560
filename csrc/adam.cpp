#include "adam.h"

#include <cmath>

#include "finite.h"
#include "parallel.h"

namespace vmm {

using std::int64_t;

namespace {

template <class T>
void step(const AdamSettings& settings, const AdamParameter<T>& p, int threads) {
  const double t = *p.steps + 1.0;
  const T beta1 = static_cast<T>(settings.beta1), beta2 = static_cast<T>(settings.beta2);
  const T rest1 = static_cast<T>(1.0 - settings.beta1);
  const T rest2 = static_cast<T>(1.0 - settings.beta2);
  const T rate = static_cast<T>(p.rate / (1.0 - std::pow(settings.beta1, t)));
  const T root = static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(settings.beta2, t)));
  const T epsilon = static_cast<T>(settings.epsilon);
  // A square root and a division an element: some 20 multiply-adds.
  threads = useful_threads(threads, 20.0 * static_cast<double>(p.size));
  parallel_ranges(p.size, threads, [=](int, int64_t begin, int64_t end) {
    const T* __restrict g = p.gradient;
    T* __restrict x = p.parameter;
    T* __restrict u = p.first_moment;
    T* __restrict v = p.second_moment;
    for (int64_t i = begin; i < end; i++) {
      u[i] = beta1 * u[i] + rest1 * g[i];
      v[i] = beta2 * v[i] + rest2 * g[i] * g[i];
      x[i] -= rate * u[i] / (root * std::sqrt(v[i]) + epsilon);
    }
  });
  ++*p.steps;
}

}  // namespace

template <class T>
bool adam_step(const AdamSettings& settings, const std::vector<AdamParameter<T>>& parameters,
               int threads) {
  for (const auto& p : parameters)
    if (!all_finite(p.gradient, p.size)) return false;
  for (const auto& p : parameters) step(settings, p, threads);
  return true;
}

#define VMM_INSTANTIATE(T) \
  template bool adam_step<T>(const AdamSettings&, const std::vector<AdamParameter<T>>&, int);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm
