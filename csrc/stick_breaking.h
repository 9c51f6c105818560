// Stick-breaking weights of a truncated Dirichlet or Pitman-Yor process: the prior over mixture
// weights, its posterior given counts, and the update of its concentration.
//
// Model (c = 1..C, concentration gamma > 0, discount 0 <= d < 1; d = 0 is the Dirichlet process)
//   v_c ~ Beta(1 - d, gamma + c d) for c < C,  v_C = 1,     pi_c = v_c prod_{l<c} (1 - v_l)
// Posterior given counts N (real, >= 0), where (c) is the c-th component by decreasing count
//   v_(c) | N ~ Beta(a_c, b_c),  a_c = 1 - d + N_(c),  b_c = gamma + c d + sum_{l>c} N_(l)
//   E[log v] = psi(a) - psi(a + b),  E[log(1 - v)] = psi(b) - psi(a + b)
//   E[log pi_(c)] = E[log v_(c)] + sum_{l<c} E[log(1 - v_(l))],  E[pi_(c)] the same with products
// Concentration under gamma ~ Gamma(shape, rate): the maximum over gamma of
//   (shape - 1) log gamma - rate gamma
//     + sum_{c<C} [(gamma + c d - 1) E[log(1 - v_c)] - log B(1 - d, gamma + c d)]
//
// Sources: Sethuraman (1994), A constructive definition of Dirichlet priors; Pitman & Yor (1997),
// The two-parameter Poisson-Dirichlet distribution; Ishwaran & James (2001), Gibbs sampling methods
// for stick-breaking priors, section 3 (truncation); Blei & Jordan (2006), Variational inference
// for Dirichlet process mixtures (posterior, conjugate gamma); Kurihara, Welling & Teh (2007),
// Collapsed variational Dirichlet process mixture models (components ordered by size).
//
// Only differences psi(x + h) - psi(x) occur, and they are computed directly: subtracting two
// digammas would leave no correct digit of E[log(1 - v)] ~ -a/b if b is large. Everything is in
// double and in nats.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define VMM_HD __host__ __device__
#else
#define VMM_HD
#endif

namespace vmm::stick_breaking {

// A concentration of zero would end the process, so updates stop here.
constexpr double kMinConcentration = 1e-8;

struct Beta {
  double a, b;
};

// From here on the asymptotic series, cut after its seventh term, is exact to double precision.
constexpr double kAsymptotic = 10.0;

struct PolynomialDifference {
  double at_u;     // p(u)
  double divided;  // (p(u) - p(w)) / (u - w)
};

// p(t) = sum_k coefficients[k] t^(k+1), k = 0..6; Horner's rule for the divided difference loses
// nothing as u -> w.
VMM_HD inline PolynomialDifference polynomial_difference(const double (&coefficients)[7], double u,
                                                         double w) {
  double p = coefficients[6];
  double divided = 0.0;
  for (int k = 5; k >= 0; --k) {
    divided = divided * w + p;
    p = p * u + coefficients[k];
  }
  return {p * u, divided * w + p};
}

// psi(x + h) - psi(x) for x > 0, h >= 0, with full relative precision: every term is >= 0.
// psi(x) = psi(x + 1) - 1/x;  psi(x) ~ log x - 1/(2x) - sum_k B_2k / (2k x^2k)
// (Abramowitz & Stegun 6.3.5, 6.3.18)
VMM_HD inline double digamma_difference(double x, double h) {
  constexpr double series[7] = {1.0 / 12,  -1.0 / 120,     1.0 / 252, -1.0 / 240,
                                1.0 / 132, -691.0 / 32760, 1.0 / 12};
  double shifted = 0.0;
  for (; x < kAsymptotic; x += 1.0) shifted += h / (x + h) / x;
  const double y = x + h;
  const double r = 1.0 / x, s = 1.0 / y;
  const double r_minus_s = h / y * r;
  const auto p = polynomial_difference(series, r * r, s * s);
  return shifted + std::log1p(h / x) + r_minus_s * (0.5 + (r + s) * p.divided);
}

// psi'(x) - psi'(x + h) for x > 0, h >= 0, likewise.
// psi'(x) ~ 1/x + 1/(2x^2) + (1/x) sum_k B_2k / x^2k  (Abramowitz & Stegun 6.4.12)
VMM_HD inline double trigamma_difference(double x, double h) {
  constexpr double series[7] = {1.0 / 6,  -1.0 / 30,     1.0 / 42, -1.0 / 30,
                                5.0 / 66, -691.0 / 2730, 7.0 / 6};
  double shifted = 0.0;
  for (; x < kAsymptotic; x += 1.0) {
    const double y = x + h;
    shifted += h / y / x * (1.0 / x + 1.0 / y);
  }
  const double y = x + h;
  const double r = 1.0 / x, s = 1.0 / y;
  const double r_minus_s = h / y * r;
  const auto p = polynomial_difference(series, r * r, s * s);
  return shifted + r_minus_s * (1.0 + 0.5 * (r + s) + p.at_u + s * (r + s) * p.divided);
}

// The posterior of stick c (1-based) with `count` on its component and `tail` on all later ones.
VMM_HD inline Beta posterior_stick(double count, double tail, double c, double concentration,
                                   double discount) {
  return {1.0 - discount + count, concentration + c * discount + tail};
}

// E[log v]
VMM_HD inline double expected_log_stick(Beta q) { return -digamma_difference(q.a, q.b); }

// E[log(1 - v)]
VMM_HD inline double expected_log_rest(Beta q) { return -digamma_difference(q.b, q.a); }

// argmax over v in [0, 1] of v^(a-1) (1-v)^(b-1), a density in v; NaN only if a or b is:
//   a > 1 and b > 1   (a - 1) / (a + b - 2)
//   a <= 1 < b        0  (decreasing; infinite at 0 if a < 1)
//   b <= 1 < a        1
//   a, b <= 1         the end with more mass, that is 1 if a > b and 0 if a < b;
//                     a = b < 1 (both ends equal) 1, the larger component; a = b = 1 (flat) 1/2
VMM_HD inline double stick_mode(Beta q) {
  if (q.a > 1.0 && q.b > 1.0) return (q.a - 1.0) / ((q.a - 1.0) + (q.b - 1.0));
  if (q.a == 1.0 && q.b == 1.0) return 0.5;
  if (q.a >= q.b) return 1.0;
  return q.a < q.b ? 0.0 : NAN;
}

// log(exp(x) + exp(y)), -inf included.
VMM_HD inline double log_add(double x, double y) {
  const double high = x > y ? x : y;
  const double low = x > y ? y : x;
  return low == -INFINITY ? high : high + std::log1p(std::exp(low - high));
}

// A count or a concentration; NaN for what is none, so that its results are NaN.
VMM_HD inline double in_domain(double value) { return value >= 0.0 ? value : NAN; }

// A component in the order of size. What is no count stands among the zeros: the order is total
// whatever the counts are. Aligned for a GPU to load it as one.
struct alignas(16) Ranked {
  double count;
  std::int64_t component;
};
VMM_HD inline Ranked ranked(const double* counts, std::int64_t component) {
  const double count = counts[component];
  return {count > 0.0 ? count : 0.0, component};
}
VMM_HD inline bool precedes(Ranked x, Ranked y) {
  return x.count > y.count || (x.count == y.count && x.component < y.component);
}

struct Given {
  const double* counts;  // [C]
  std::int64_t num_components;
  const double* concentration;  // [1]
  double discount, prior_shape, prior_rate;
};

// `order` [C] receives the components by decreasing count (ties by index); a, b [C-1] belong to the
// sorted sticks; expected_log_weights, mean_weights and map_weights [C] are in the components' own
// order, as counts are. map_weights has every stick at its mode (in v, not in pi). concentration
// [1] receives the mode of gamma, and may be the given one.
struct Posterior {
  std::int64_t* order;
  double *a, *b, *expected_log_weights, *mean_weights, *map_weights, *concentration;
};

// Everything about the posterior in one call, O(C log C).
void posterior(const Given& given, const Posterior& out);

// The same as a CUDA block of so many threads computes it, by members that are called one after
// another by rising or falling rank. scratch holds 2 C.
void emulated_posterior(const Given& given, const Posterior& out, Ranked* scratch, int members,
                        bool falling);

// log pi_c = log v_c + sum_{l<c} log(1 - v_l); sticks [C-1] in [0, 1], log_weights [C].
void sticks_to_log_weights(const double* sticks, std::int64_t num_components, double* log_weights);

// v_c = pi_c / sum_{l>=c} pi_l, and 0 where nothing is left to break; any common offset in
// log_weights [C] drops out.
void log_weights_to_sticks(const double* log_weights, std::int64_t num_components, double* sticks);

}  // namespace vmm::stick_breaking
