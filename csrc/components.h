// The whitened mixture (mixture.h) of Gaussians with uncertain centers, on raw row-major pointers.
// Center j = c K + k has q(mu_j) = N(m_j, S_j), S = s s^T, and shares the precision
// Lambda_c = L_c L_c^T and the weight pi_c with the K centers of its component:
//
//   marginal   A A^T = (Lambda_c^-1 + S_j)^-1,
//              offset = log(pi_c / K) - D/2 log 2 pi + log det A
//   expected   A = L_c,
//              offset = log(pi_c / K) - D/2 log 2 pi + log det L_c - 1/2 tr(Lambda_c S_j)
//
// (Stirn & Knowles, arXiv 2402.04412.) A is lower triangular with a positive diagonal and is used
// transposed, l = offset - 1/2 |A^T (z - m)|^2. Without S both are A = L_c. Without Lambda^-1 both
// are A = s^-1, used as it is: |A (z - m)|^2. With P = s^T L the marginal one is
//
//   I + P^T P = U U^T, U upper triangular,   A = L U^-T,
//
// which inverts nothing but U and whose factorisation meets no eigenvalue below 1.
//
// Arithmetic is in double. The same input gives the same bits at any thread count.
#pragma once

#include <cstdint>

namespace vmm {

template <class T>
struct Components {
  const T* log_weights;         // log pi [C]
  const T* precision_cholesky;  // L [C, D, D], of which the lower triangle is read, or null
  const T* scale;               // s [J, D, D], of which the lower triangle is read, or null
  bool full_scale;              // or scale is [J, D], the diagonals of s
  bool expected;
  std::int64_t num_components;  // C
  std::int64_t num_centers;     // J = C K
  std::int64_t dim;             // D
};

// Fills A [J, D, D] (upper parts with zeros) and offsets [J]. Returns the largest |A_j| /
// min_r A_jrr, with the Frobenius norm: a lower bound of the largest condition number.
//
// Throws std::invalid_argument for a component whose covariance is not finite and positive
// definite.
template <class T>
double whitened_components(const Components<T>&, int threads, T* whitening, T* offsets);

// Throws the std::invalid_argument that says so.
[[noreturn]] void refuse_covariance(std::int64_t component);

// Gradients of the inputs, each null where it is not asked for. Strictly upper parts are zero.
template <class T>
struct ComponentsGradients {
  T* log_weights;
  T* precision_cholesky;
  T* scale;
};

template <class T>
void whitened_components_backward(const Components<T>&, int threads, const T* whitening,
                                  const T* grad_whitening, const T* grad_offsets,
                                  const ComponentsGradients<T>&);

}  // namespace vmm
