// Adam (Kingma & Ba 2015, algorithm 1, without weight decay), on raw pointers:
//
//   u <- beta1 u + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
//   x <- x - rate / (1 - beta1^t) u / (sqrt(v / (1 - beta2^t)) + epsilon)
#pragma once

#include <cstdint>
#include <vector>

namespace vmm {

struct AdamSettings {
  double beta1, beta2, epsilon;
};

template <class T>
struct AdamParameter {
  double rate;
  std::int64_t size;
  const T* gradient;
  T *parameter, *first_moment, *second_moment;
  float* steps;  // taken so far
};

// One step of every parameter. Returns false, and changes nothing, unless all gradients are finite.
template <class T>
bool adam_step(const AdamSettings&, const std::vector<AdamParameter<T>>&, int threads);

}  // namespace vmm
