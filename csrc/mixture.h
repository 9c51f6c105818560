// Operations on a whitened mixture, on raw row-major pointers:
//
//   l_ij = c_j - 1/2 |A_j (z_i - m_j)|^2                (transpose: A_j^T in place of A_j)
//   lse_i = log sum_j exp l_ij,   q_ij = exp(l_ij - lse_i),   expected_i = sum_j q_ij l_ij
//
// z [B, D], centers m [J, D], whitening A [J, D, D] of which the lower triangle is read, offsets c
// [J]. c_j = -inf prunes component j. Extra memory is O(threads (D + J D^2)) or O(threads B D),
// whichever is less, and a few MiB of l per thread for statistics; arrays of size B x J are stored
// only if they are the result.
//
// Every function throws std::invalid_argument, naming the argument, for values that are not finite
// and for a z whose log-density overflows T. The same input gives the same bits at one thread
// count.
#pragma once

#include <cstdint>

namespace vmm {

template <class T>
struct Mixture {
  const T* centers;
  const T* whitening;
  const T* offsets;
  std::int64_t num_centers;  // J
  std::int64_t dim;          // D
  bool transpose;
};

template <class T>
struct Samples {
  const T* z;
  std::int64_t count;          // B
  const T* weights = nullptr;  // v [B], for the sums of statistics alone; null for ones
};

// softmax [3, B] is for the backward: max_j l_ij, lse - max and expected - max, which float32 keeps
// apart far more exactly than their sums.
template <class T>
void log_prob(const Mixture<T>&, Samples<T>, int threads, T* lse, T* expected, T* softmax);

// With w_ij = q_ij (grad_lse_i + grad_expected_i (1 + l_ij - expected_i)), d = z_i - m_j, and the
// sums N_j = sum_i w, s_j = sum_i w d, M_j = sum_i w d d^T:
//   grad_z_i = -sum_j w A^T A d,  grad_centers = A^T A s,  grad_whitening = -tril(A M),
//   grad_offsets = N.
// grad_lse or grad_expected may be null, for zeros.
template <class T>
void log_prob_backward(const Mixture<T>&, Samples<T>, int threads, const T* softmax,
                       const T* grad_lse, const T* grad_expected, T* grad_z, T* grad_centers,
                       T* grad_whitening, T* grad_offsets);

// Gaussian posteriors q_i whose samples the z are, by their scales: lower triangular [B, D, D] with
// a positive diagonal, of which that is read, or the diagonals alone [B, D].
template <class T>
struct Posteriors {
  const T* scale;
  bool full_scale;
};

// The estimate kl_i = -H(q_i) - lse_i of KL(q_i || p), H = sum_r log s_irr + D/2 log 2 pi e, and
// its gradients. Throws for a q whose entropy is not finite.
template <class T>
void kl(const Mixture<T>&, Samples<T>, Posteriors<T>, int threads, T* kl, T* softmax);
template <class T>
void kl_backward(const Mixture<T>&, Samples<T>, Posteriors<T>, int threads, const T* softmax,
                 const T* grad_kl, T* grad_z, T* grad_scale, T* grad_centers, T* grad_whitening,
                 T* grad_offsets);

// N [J], s [J, D], M [J, D, D] above with w = q: the backward's sums for grad_lse = 1 (Fisher's
// identity).
template <class T>
void statistics(const Mixture<T>&, Samples<T>, int threads, T* N, T* s, T* M);

// The same in float64 with w_ij = v_i q_ij (grad_lse + grad_expected (1 + l_ij - expected_i)), and
// totals [2] = sum_i v_i lse_i, sum_i v_i expected_i. slope_N [J] and slope_s [J, D], unless null,
// are the sums with w_ij = q_ij (1 + l_ij - expected_i), the gradient of expected_i by l_ij; for
// grad_lse = 1 and grad_expected = 0 alone.
template <class T, class Out>
void statistics(const Mixture<T>&, Samples<T>, int threads, T grad_lse, T grad_expected, Out* N,
                Out* s, Out* M, double* totals, Out* slope_N, Out* slope_s);

// Below, `group` consecutive components count as one: l_ig = log sum_{j in g} exp l_ij. [B, J /
// group]
template <class T>
void log_joint(const Mixture<T>&, Samples<T>, std::int64_t group, int threads, T* out);
template <class T>
void responsibilities(const Mixture<T>&, Samples<T>, std::int64_t group, int threads, T* out);

// Most probable group, its probability, and the entropy of the groups' probabilities in nats. [B]
template <class T>
void assign(const Mixture<T>&, Samples<T>, std::int64_t group, int threads, std::int64_t* label,
            T* probability, T* entropy);

}  // namespace vmm
