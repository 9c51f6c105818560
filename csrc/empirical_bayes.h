// The empirical-Bayes step: the prior's own parameters move, the network is held fixed.
//
// J = C K centers m_j with S_j = s_j s_j^T, j = c K + k, of which component c's K share a weight
// pi_c and a precision Lambda_c = L_c L_c^T. What is stored and moved is
//   L = tril(raw_precision, -1) + diag softplus(diag raw_precision),  pi = softmax(logits),
//   alpha = 1 / gamma = softplus(raw_alpha),  softplus(x) = log(1 + e^x), and x above 20.
// The data term is that of the expected log-joint
//   l_ij = log pi_c - log K - D/2 log 2 pi + sum_r log L_rr - 1/2 |L^T (z_i - m_j)|^2
//          - 1/2 |L^T s_j|^2,
// a whitened mixture (mixture.h), of which either step needs only weighted sums over the points,
// N_j = sum_i w_ij, t_j = sum_i w_ij d and M_j = sum_i w_ij d d^T with d = z_i - m_j.
//
// Objective (vmm_fast/inference/map_objective.py is its definition), minus it being the loss:
//   1/B sum_i sum_j q_ij l_ij + 1/n [log p(pi) + log p(gamma) + sum log p(m_j) + sum log p(L_c)]
// Gradients of the data term, with w = q, or w = q (1 + l - sum_j q l) through responsibilities:
//   m_j: Lambda t_j    s_j: -N_j tril(Lambda s_j)    log pi_c: sum_k N_j
//   L_c: sum_k [N_j diag(1 / L) - tril((M_j + N_j S_j) L)]
// and of the parameters' log-priors, with v = C^(2/D) / (D + 2) and x = max(log pi, -20):
//   m_j: -m_j    s_j: -tril(s_j)    L_c: diag(1 / L) - L / v
// Log-priors of the weights:
//   Dirichlet(gamma / C):  (gamma / C - 1) sum_c x_c + log Gamma(gamma) - C log Gamma(gamma / C)
//   sticks by size:  the densities Beta(v_c; 1 - d, gamma + c d) of stick_breaking.h telescope to
//     (1 - gamma) log sum_c e^x_c + (gamma + (C - 1) d - 1) min x - d (sum_c x_c - min x)
//     + sum_{c<C} log [Gamma(gamma + c d + 1 - d) / (Gamma(gamma + c d) Gamma(1 - d))]
// and, where gamma is learnt, alpha ~ Gamma(1, 1) with the first, gamma ~ Gamma(1, 1) with sticks.
//
// Closed form (vmm_fast/inference/closed_form.py is its definition), from sums with w = q:
//   Lambda_c = (N_c + 1) (I / v + sum_k [N_j S_j + M_j])^-1
//   m_c = (N_c Lambda + I)^-1 Lambda (N_c m_c + t_c)      (free centers alone)
// and the weights and the concentration that the definition gives.
//
// Sources: Stirn & Knowles, arXiv 2402.04412 (objective); Dempster, Laird & Rubin (1977);
// Cappe & Moulines (2009), On-line expectation-maximisation; Minka (2000), Estimating a Dirichlet
// distribution (gamma from counts).
//
// Arithmetic is in double, T (float or double) is what is stored. Every function throws
// std::invalid_argument for values that are not finite, before anything has changed. The same input
// gives the same bits at one thread count.
#pragma once

#include <cstdint>

#include "mixture.h"

namespace vmm::empirical_bayes {

enum class Weights { dirichlet, stick_breaking };
enum class MapPrior { none, fixed, learnt };  // no parameter priors; gamma fixed; gamma learnt

struct ParameterPriors {
  MapPrior map_prior;
  Weights weights;
  double discount;
};

// log pi counts from here up: below, the priors on it are constant.
constexpr double kLogWeightFloor = -20.0;

template <class T>
struct Parameters {
  T* centers;      // m [J, D]
  const T* scale;  // s [J, D, D], of which the lower triangle is read, or diagonals [J, D]; or null
  bool full_scale;   // which of the two
  T* raw_precision;  // [C, D, D]
  T* logits;         // [C], -inf prunes
  T* raw_alpha;      // [1]
  std::int64_t num_components;
  std::int64_t per_component;  // K
  std::int64_t dim;
};

// L [C, D, D] with zeros above the diagonal, and log pi [C]. Throws unless a logit is finite and
// none is NaN.
template <class T>
void constrained(const Parameters<T>&, int threads, T* precision_cholesky, T* log_weights);

// Gradients of the loss, in the shapes of the parameters; null where not asked for.
template <class T>
struct Gradients {
  T* centers;
  T* scale;
  T* raw_precision;
  T* logits;
  T* raw_alpha;
};

// N [J], s [J, D] (t above) and M [J, D, D].
struct Sums {
  double* N;
  double* s;
  double* M;
};

// The loss, in nats per point; prior_weight is 1 / n. Sums with w = softmax(l) go to *batch unless
// it is null, from the same responsibilities; with a gradient through these, raw_precision's is not
// among the by-products and must not be asked for.
template <class T>
double map_gradients(const Parameters<T>&, Samples<T>, const ParameterPriors&,
                     bool responsibility_gradient, double prior_weight, int threads,
                     const Gradients<T>&, const Sums* batch);

// Sums with w = v softmax(l), v the samples' weights; returns sum_i v_i log sum_j exp l_ij.
template <class T>
double statistics(const Parameters<T>&, Samples<T>, int threads, Sums);

// Which parameters move; free centers have a closed form, those of an encoder have not.
struct Learnt {
  bool centers;
  bool precision;
  bool weights;
  bool concentration;
};

// Sets the parameters to their maximisers given sums taken around the centers, times `factor`.
// A component whose precision has no finite maximiser keeps what it has; a pruned one stays pruned.
template <class T>
void maximise(const Parameters<T>&, Sums, double factor, const ParameterPriors&, Learnt,
              int threads);

// Online EM: running sums per point, and the centers [J, D] around which they were taken.
struct Running {
  Sums sums;
  double* centers;
  std::int64_t* steps;  // 0: the sums are yet to be set to those that the mixture itself expects
};

// Blends a batch's sums over `count` points into the running ones with weight `rate`, then
// maximises at `data_size` times them. With free centers the running sums are carried to the new
// centers; with those of an encoder, which moves points and centers together, d counts as it was.
template <class T>
void online_step(const Parameters<T>&, Sums batch, double count, double rate, double data_size,
                 bool free_centers, const ParameterPriors&, Learnt, int threads, const Running&);

// argmax over gamma in [1e-6, 1e6] of the Dirichlet-multinomial log-likelihood of counts N_c [C]
// plus log p(alpha = 1 / gamma); the search begins at `start`.
double maximise_concentration(const double* counts, std::int64_t num_components, double start);

}  // namespace vmm::empirical_bayes
