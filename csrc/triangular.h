// Small dense matrices [D, D], row-major, in double: the products and the factorisation that the
// empirical-Bayes steps need for one component. Inner loops run along rows, so that they vectorise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace vmm::triangular {

// y = A x for a lower-triangular A.
inline void times(const double* A, const double* x, std::int64_t D, double* y) {
  for (std::int64_t r = 0; r < D; r++) {
    double total = 0.0;
    for (std::int64_t t = 0; t <= r; t++) total += A[r * D + t] * x[t];
    y[r] = total;
  }
}

// y = A^T x for a lower-triangular A.
inline void times_transposed(const double* A, const double* x, std::int64_t D, double* y) {
  std::fill(y, y + D, 0.0);
  for (std::int64_t r = 0; r < D; r++)
    for (std::int64_t t = 0; t <= r; t++) y[t] += x[r] * A[r * D + t];
}

// out += weight A A^T for a lower-triangular A; transposed [D, D] is scratch.
inline void add_gram(double weight, const double* A, std::int64_t D, double* transposed,
                     double* out) {
  for (std::int64_t r = 0; r < D; r++)
    for (std::int64_t t = 0; t <= r; t++) transposed[t * D + r] = A[r * D + t];
  for (std::int64_t r = 0; r < D; r++)
    for (std::int64_t t = 0; t <= r; t++) {
      const double a = weight * A[r * D + t];
      for (std::int64_t u = t; u < D; u++) out[r * D + u] += a * transposed[t * D + u];
    }
}

// out = tril(W A) for a lower-triangular A; the upper triangle is zero.
inline void tril_times(const double* W, const double* A, std::int64_t D, double* out) {
  std::fill(out, out + D * D, 0.0);
  for (std::int64_t r = 0; r < D; r++)
    for (std::int64_t u = 0; u < D; u++) {
      const double w = W[r * D + u];
      for (std::int64_t t = 0; t <= std::min(r, u); t++) out[r * D + t] += w * A[u * D + t];
    }
}

// Symmetric A = V^T V with V lower triangular, in place of A's lower triangle: Cholesky's
// factorisation in reversed coordinates, from the last row up. Returns the smallest pivot V_ii^2;
// one that is not positive ends it, and A then holds no factor.
inline double factorise(double* A, std::int64_t D) {
  double smallest = INFINITY;
  for (std::int64_t i = D - 1; i >= 0; i--) {
    double* V_i = A + i * D;
    smallest = std::min(smallest, V_i[i]);
    if (!(V_i[i] > 0.0)) return V_i[i];
    const double reciprocal = 1.0 / std::sqrt(V_i[i]);
    for (std::int64_t t = 0; t <= i; t++) V_i[t] *= reciprocal;
    for (std::int64_t r = 0; r < i; r++)
      for (std::int64_t t = 0; t <= r; t++) A[r * D + t] -= V_i[r] * V_i[t];
  }
  return smallest;
}

// x = (V^T V)^-1 x.
inline void solve(const double* V, std::int64_t D, double* x) {
  for (std::int64_t i = D - 1; i >= 0; i--) {
    x[i] /= V[i * D + i];
    for (std::int64_t t = 0; t < i; t++) x[t] -= V[i * D + t] * x[i];
  }
  for (std::int64_t i = 0; i < D; i++) {
    for (std::int64_t t = 0; t < i; t++) x[i] -= V[i * D + t] * x[t];
    x[i] /= V[i * D + i];
  }
}

// out = V^-1 for a lower-triangular V; the upper triangle is zero.
inline void invert(const double* V, std::int64_t D, double* out) {
  std::fill(out, out + D * D, 0.0);
  for (std::int64_t i = 0; i < D; i++) {
    double* out_i = out + i * D;
    const double reciprocal = 1.0 / V[i * D + i];
    for (std::int64_t k = 0; k < i; k++)
      for (std::int64_t t = 0; t <= k; t++) out_i[t] -= V[i * D + k] * out[k * D + t];
    for (std::int64_t t = 0; t < i; t++) out_i[t] *= reciprocal;
    out_i[i] = reciprocal;
  }
}

}  // namespace vmm::triangular
