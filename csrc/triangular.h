// Small dense matrices [D, D], row-major: the products and the factorisation that the
// empirical-Bayes steps need. V is double, or a vector that holds one matrix in each lane.
//
// Internal linkage: some of the files that include this are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace vmm {
namespace {
namespace triangular {

// y = A x for a lower-triangular A.
template <class V>
void times(const V* A, const V* x, std::int64_t D, V* y) {
  for (std::int64_t r = 0; r < D; r++) {
    V total = A[r * D] * x[0];
    for (std::int64_t t = 1; t <= r; t++) total += A[r * D + t] * x[t];
    y[r] = total;
  }
}

// y = A^T x for a lower-triangular A.
template <class V>
void times_transposed(const V* A, const V* x, std::int64_t D, V* y) {
  for (std::int64_t t = 0; t < D; t++) y[t] = V{};
  for (std::int64_t r = 0; r < D; r++)
    for (std::int64_t t = 0; t <= r; t++) y[t] += x[r] * A[r * D + t];
}

// Lower triangle of out += weight A A^T for a lower-triangular A.
template <class V>
void add_gram(V weight, const V* A, std::int64_t D, V* out) {
  for (std::int64_t r = 0; r < D; r++)
    for (std::int64_t u = 0; u <= r; u++) {
      V total = A[r * D] * A[u * D];
      for (std::int64_t t = 1; t <= u; t++) total += A[r * D + t] * A[u * D + t];
      out[r * D + u] += weight * total;
    }
}

// Lower triangle of out = W A for a symmetric W, of which the lower triangle is read, and a
// lower-triangular A.
template <class V>
void tril_times(const V* W, const V* A, std::int64_t D, V* out) {
  for (std::int64_t r = 0; r < D; r++) {
    for (std::int64_t t = 0; t <= r; t++) out[r * D + t] = V{};
    for (std::int64_t u = 0; u < D; u++) {
      const V w = u <= r ? W[r * D + u] : W[u * D + r];
      const std::int64_t end = u <= r ? u : r;
      for (std::int64_t t = 0; t <= end; t++) out[r * D + t] += w * A[u * D + t];
    }
  }
}

// The lower triangle of a symmetric A = F^T F becomes the lower-triangular F: Cholesky's
// factorisation in reversed coordinates, from the last row up. pivots [D] receives F_ii^2; where
// one is not positive, A has no factor and holds NaN.
template <class V, class Sqrt>
void factorise(V* A, std::int64_t D, V* pivots, Sqrt square_root) {
  for (std::int64_t i = D - 1; i >= 0; i--) {
    V* F_i = A + i * D;
    pivots[i] = F_i[i];
    const V reciprocal = 1.0 / square_root(F_i[i]);
    for (std::int64_t t = 0; t <= i; t++) F_i[t] *= reciprocal;
    for (std::int64_t r = 0; r < i; r++)
      for (std::int64_t t = 0; t <= r; t++) A[r * D + t] -= F_i[r] * F_i[t];
  }
}

// x = (F^T F)^-1 x.
template <class V>
void solve(const V* F, std::int64_t D, V* x) {
  for (std::int64_t i = D - 1; i >= 0; i--) {
    x[i] /= F[i * D + i];
    for (std::int64_t t = 0; t < i; t++) x[t] -= F[i * D + t] * x[i];
  }
  for (std::int64_t i = 0; i < D; i++) {
    for (std::int64_t t = 0; t < i; t++) x[i] -= F[i * D + t] * x[t];
    x[i] /= F[i * D + i];
  }
}

// Lower triangle of out = F^-1 for a lower-triangular F.
template <class V>
void invert(const V* F, std::int64_t D, V* out) {
  for (std::int64_t i = 0; i < D; i++) {
    V* out_i = out + i * D;
    const V reciprocal = 1.0 / F[i * D + i];
    for (std::int64_t t = 0; t < i; t++) out_i[t] = V{};
    for (std::int64_t k = 0; k < i; k++)
      for (std::int64_t t = 0; t <= k; t++) out_i[t] -= F[i * D + k] * out[k * D + t];
    for (std::int64_t t = 0; t < i; t++) out_i[t] *= reciprocal;
    out_i[i] = reciprocal;
  }
}

}  // namespace triangular
}  // namespace
}  // namespace vmm
