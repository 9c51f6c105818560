// Adam (Kingma & Ba 2015, algorithm 1, without weight decay), on raw pointers:
//
//   u <- beta1 u + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
//   x <- x - learning_rate / (1 - beta1^t) u / (sqrt(v / (1 - beta2^t)) + epsilon)
#pragma once

#include <cstdint>

namespace vmm {

struct AdamSettings {
  double learning_rate, beta1, beta2, epsilon;
};

// One step of parameter x [size] after `steps` earlier ones.
template <class T>
void adam_step(const AdamSettings&, double steps, std::int64_t size, int threads, const T* gradient,
               T* parameter, T* first_moment, T* second_moment);

}  // namespace vmm
