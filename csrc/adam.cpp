#include "adam.h"

#include <cmath>

#include "parallel.h"

namespace vmm {

using std::int64_t;

template <class T>
void adam_step(const AdamSettings& settings, double steps, int64_t size, int threads,
               const T* gradient, T* parameter, T* first_moment, T* second_moment) {
  const double t = steps + 1.0;
  const T beta1 = static_cast<T>(settings.beta1), beta2 = static_cast<T>(settings.beta2);
  const T rest1 = static_cast<T>(1.0 - settings.beta1);
  const T rest2 = static_cast<T>(1.0 - settings.beta2);
  const T rate = static_cast<T>(settings.learning_rate / (1.0 - std::pow(settings.beta1, t)));
  const T root = static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(settings.beta2, t)));
  const T epsilon = static_cast<T>(settings.epsilon);
  // A square root and a division an element: some 20 multiply-adds.
  threads = useful_threads(threads, 20.0 * static_cast<double>(size));
  parallel_ranges(size, threads, [=](int, int64_t begin, int64_t end) {
    const T* __restrict g = gradient;
    T* __restrict x = parameter;
    T* __restrict u = first_moment;
    T* __restrict v = second_moment;
    for (int64_t i = begin; i < end; i++) {
      u[i] = beta1 * u[i] + rest1 * g[i];
      v[i] = beta2 * v[i] + rest2 * g[i] * g[i];
      x[i] -= rate * u[i] / (root * std::sqrt(v[i]) + epsilon);
    }
  });
}

#define VMM_INSTANTIATE(T) \
  template void adam_step<T>(const AdamSettings&, double, int64_t, int, const T*, T*, T*, T*);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm
