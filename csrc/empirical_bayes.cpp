// The steps of empirical_bayes.h, where the formulas and sources are: loops over components around
// the one over points, which is vmm::statistics.
#include "empirical_bayes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "stick_breaking.h"
#include "triangular.h"

namespace vmm::empirical_bayes {
namespace {

using std::int64_t;

constexpr double kLogTwoPi = 1.8378770664093453;
constexpr double kLogPi = 1.1447298858494002;

// A float whitening matrix of this condition number or more (as bounded from below by its norm over
// its smallest diagonal element) is evaluated in double; vmm_fast/mixture.py has the same bound.
constexpr double kFloat32Condition = 1e4;

// torch.nn.functional.softplus: the identity above 20.
constexpr double kSoftplusLinear = 20.0;
double softplus(double x) { return x > kSoftplusLinear ? x : std::log1p(std::exp(x)); }
double softplus_slope(double x) { return x > kSoftplusLinear ? 1.0 : 1.0 / (1.0 + std::exp(-x)); }
double inverse_softplus(double x) { return x + std::log(-std::expm1(-x)); }

template <class T>
double concentration(const Parameters<T>& p) {
  return 1.0 / softplus(*p.raw_alpha);
}

// The factor v of the Wishart's scale matrix v I.
double wishart_scale(int64_t num_components, int64_t dim) {
  return std::pow(static_cast<double>(num_components), 2.0 / static_cast<double>(dim)) /
         static_cast<double>(dim + 2);
}

// Its normaliser, with D + 2 degrees of freedom.
double log_wishart_normaliser(int64_t num_components, int64_t dim) {
  const double D = static_cast<double>(dim), df = D + 2.0;
  double log_gamma = 0.25 * D * (D - 1.0) * kLogPi;
  for (int64_t i = 0; i < dim; i++) log_gamma += std::lgamma(0.5 * (df - static_cast<double>(i)));
  return 0.5 * df * D * std::log(2.0 * wishart_scale(num_components, dim)) + log_gamma;
}

// L [D, D] of a raw precision; the upper triangle is zero.
template <class T>
void precision_cholesky(const T* raw, int64_t D, double* L) {
  for (int64_t r = 0; r < D; r++) {
    std::copy(raw + r * D, raw + r * D + r, L + r * D);
    L[r * D + r] = softplus(raw[r * D + r]);
    std::fill(L + r * D + r + 1, L + (r + 1) * D, 0.0);
  }
}

// Threads for loops over components with `products` triangular products per center.
template <class T>
int threads_for(const Parameters<T>& p, int threads, double products) {
  const double D = static_cast<double>(p.dim);
  return useful_threads(threads, products * p.num_components * p.per_component * D * D * D / 3);
}

void require_positive(int64_t component) {
  if (component < 0) return;
  throw std::invalid_argument(
      "component " + std::to_string(component) +
      " has no positive-definite covariance: precision_cholesky and the scale that the encoder "
      "gives its pseudo-input must be finite with a positive diagonal");
}

// The expected log-joint: L [C, D, D] with log det L [C], log pi [C] and offsets [J].
template <class T>
struct ExpectedLogJoint {
  ExpectedLogJoint(const Parameters<T>& p, int threads);

  // The weighted sums over points and totals of vmm::statistics, with l / temperature.
  void sum(const Parameters<T>& p, Samples<T> samples, double temperature, int threads,
           double grad_lse, double grad_expected, Sums sums, double* totals) const {
    if (float32_suffices)
      sum_in<T>(p, samples, temperature, threads, grad_lse, grad_expected, sums, totals);
    else
      sum_in<double>(p, samples, temperature, threads, grad_lse, grad_expected, sums, totals);
  }

  Buffer<double> L, log_det, log_pi, offsets;
  bool float32_suffices = true;

 private:
  template <class U>
  void sum_in(const Parameters<T>& p, Samples<T> samples, double temperature, int threads,
              double grad_lse, double grad_expected, Sums sums, double* totals) const;
};

template <class T>
void log_softmax(const T* logits, int64_t count, double* out) {
  double max = -INFINITY, total = 0.0;
  bool valid = true;
  for (int64_t c = 0; c < count; c++) {
    valid = valid && logits[c] < std::numeric_limits<T>::infinity();
    max = std::max<double>(max, logits[c]);
  }
  if (!valid || max == -INFINITY)
    throw std::invalid_argument("logits must have at least one finite value and no NaN");
  for (int64_t c = 0; c < count; c++) total += std::exp(logits[c] - max);
  const double log_total = max + std::log(total);
  for (int64_t c = 0; c < count; c++) out[c] = logits[c] - log_total;
}

// 1/2 |L^T s|^2 = 1/2 tr(Lambda S); row [D] is scratch.
template <class T>
double half_trace(const double* L, const T* scale, bool full, int64_t D, double* row) {
  double total = 0.0;
  for (int64_t t = 0; t < D; t++) {
    // Row t of s^T L: with a diagonal s it is one row of L.
    std::fill(row, row + D, 0.0);
    for (int64_t r = t; r < (full ? D : t + 1); r++) {
      const double s = full ? scale[r * D + t] : scale[t];
      for (int64_t u = 0; u <= r; u++) row[u] += s * L[r * D + u];
    }
    for (int64_t u = 0; u < D; u++) total += row[u] * row[u];
  }
  return 0.5 * total;
}

template <class T>
ExpectedLogJoint<T>::ExpectedLogJoint(const Parameters<T>& p, int threads) {
  const int64_t C = p.num_components, K = p.per_component, D = p.dim;
  log_pi = make_buffer<double>(C);
  log_softmax(p.logits, C, log_pi.get());
  L = make_buffer<double>(C * D * D);
  log_det = make_buffer<double>(C);
  offsets = make_buffer<double>(C * K);
  threads = threads_for(p, threads, p.full_scale ? 1.0 : 0.5);
  const double constant =
      -std::log(static_cast<double>(K)) - 0.5 * static_cast<double>(D) * kLogTwoPi;
  const auto rows = make_buffer<double>(threads * D);
  std::vector<int64_t> bad(static_cast<std::size_t>(threads), -1);
  std::vector<char> narrow(static_cast<std::size_t>(threads), 1);
  const int64_t scale_size = p.full_scale ? D * D : D;
  parallel_ranges(C, threads, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t c = end - 1; c >= begin; c--) {  // downwards: the first bad one is named
      double* L_c = L.get() + c * D * D;
      precision_cholesky(p.raw_precision + c * D * D, D, L_c);
      double smallest = INFINITY, squares = 0.0;
      log_det[c] = 0.0;
      for (int64_t r = 0; r < D; r++) {
        smallest = std::min(smallest, L_c[r * D + r]);
        log_det[c] += std::log(L_c[r * D + r]);
      }
      for (int64_t i = 0; i < D * D; i++) squares += L_c[i] * L_c[i];
      narrow[thread] = narrow[thread] && std::sqrt(squares) <= kFloat32Condition * smallest;
      // log det L is NaN or infinite as soon as one diagonal element is not positive and finite.
      if (!std::isfinite(log_det[c])) bad[thread] = c;
      for (int64_t j = c * K; j < (c + 1) * K; j++) {
        double penalty = 0.0;
        if (p.scale)
          penalty =
              half_trace(L_c, p.scale + j * scale_size, p.full_scale, D, rows.get() + thread * D);
        if (!std::isfinite(penalty)) bad[thread] = c;
        offsets[j] = log_pi[c] + constant + log_det[c] - penalty;
      }
    }
  });
  for (const int64_t component : bad) require_positive(component);
  float32_suffices = std::all_of(narrow.begin(), narrow.end(), [](char x) { return x != 0; });
}

// `values` as they are where the type is right, else a copy kept in `storage`.
template <class U, class T>
const U* converted(const T* values, int64_t size, Buffer<U>& storage) {
  if constexpr (std::is_same_v<U, T>) {
    return values;
  } else {
    storage = make_buffer<U>(size);
    std::copy(values, values + size, storage.get());
    return storage.get();
  }
}

template <class T>
template <class U>
void ExpectedLogJoint<T>::sum_in(const Parameters<T>& p, Samples<T> samples, double temperature,
                                 int threads, double grad_lse, double grad_expected, Sums sums,
                                 double* totals) const {
  const int64_t K = p.per_component, D = p.dim, J = p.num_components * K;
  const auto whitening = make_buffer<U>(J * D * D), tempered = make_buffer<U>(J);
  const double factor = 1.0 / std::sqrt(temperature);
  for (int64_t j = 0; j < J; j++) {
    const double* L_c = L.get() + j / K * D * D;
    U* out = whitening.get() + j * D * D;
    for (int64_t i = 0; i < D * D; i++) out[i] = static_cast<U>(factor * L_c[i]);
    tempered[j] = static_cast<U>(offsets[j] / temperature);
  }
  Buffer<U> centers, z;
  const Mixture<U> mixture{
      converted<U>(p.centers, J * D, centers), whitening.get(), tempered.get(), J, D, true};
  const Samples<U> points{converted<U>(samples.z, samples.count * D, z), samples.count};
  vmm::statistics<U>(mixture, points, threads, static_cast<U>(grad_lse),
                     static_cast<U>(grad_expected), sums.N, sums.s, sums.M, totals);
}

// log p(pi) and, where gamma is learnt, its hyperprior; gradients by log pi [C] and by gamma.
double log_weight_prior(const double* log_pi, int64_t num_components, double gamma,
                        const ParameterPriors& priors, double* grad_log_pi, double* grad_gamma) {
  using stick_breaking::digamma_difference;
  const double C = static_cast<double>(num_components), d = priors.discount;
  const bool learnt = priors.map_prior == MapPrior::learnt;
  const auto counted = [log_pi](int64_t c) { return std::max(log_pi[c], kLogWeightFloor); };
  double total = 0.0;
  int64_t last = 0;  // of the components by decreasing size, ties by index
  for (int64_t c = 0; c < num_components; c++) {
    total += counted(c);
    if (counted(c) <= counted(last)) last = c;
  }
  double value;
  if (priors.weights == Weights::dirichlet) {
    std::fill(grad_log_pi, grad_log_pi + num_components, gamma / C - 1.0);
    value = std::lgamma(gamma) - C * std::lgamma(gamma / C) + (gamma / C - 1.0) * total;
    *grad_gamma = digamma_difference(gamma / C, gamma - gamma / C) + total / C;
    if (learnt) {
      value -= 1.0 / gamma;
      *grad_gamma += 1.0 / (gamma * gamma);
    }
  } else {
    double mass = 0.0;
    for (int64_t c = 0; c < num_components; c++) mass += std::exp(counted(c));
    const double smallest = counted(last), log_mass = std::log(mass), b = gamma + (C - 1.0) * d;
    for (int64_t c = 0; c < num_components; c++)
      grad_log_pi[c] = (1.0 - gamma) * std::exp(counted(c)) / mass - (c == last ? 1.0 - b : d);
    value = (1.0 - gamma) * log_mass + (b - 1.0) * smallest - d * (total - smallest);
    *grad_gamma = smallest - log_mass;
    if (d == 0.0) {
      value += (C - 1.0) * std::log(gamma);
      *grad_gamma += (C - 1.0) / gamma;
    } else {
      for (int64_t c = 1; c < num_components; c++) {
        const double b_c = gamma + static_cast<double>(c) * d;
        value += std::lgamma(b_c + 1.0 - d) - std::lgamma(b_c) - std::lgamma(1.0 - d);
        *grad_gamma += digamma_difference(b_c, 1.0 - d);
      }
    }
    if (learnt) {
      value -= gamma;
      *grad_gamma -= 1.0;
    }
  }
  for (int64_t c = 0; c < num_components; c++)
    if (log_pi[c] < kLogWeightFloor) grad_log_pi[c] = 0.0;
  return value;
}

// Everything of one component and its K centers: gradients of centers, scales and raw precision;
// returns its share of log p(m) + log p(L), less constants.
template <class T>
class ComponentGradients {
 public:
  ComponentGradients(const Parameters<T>& p, double data_weight, double prior_weight)
      : p_(p),
        data_(data_weight),
        prior_(prior_weight),
        v_(wishart_scale(p.num_components, p.dim)) {}

  static int64_t scratch_size(int64_t D) { return 4 * D * D + D; }

  double operator()(int64_t c, const double* L, double log_det, Sums sums,
                    const Gradients<T>& gradients, double* scratch) const {
    const int64_t K = p_.per_component, D = p_.dim, DD = D * D;
    double *second = scratch, *precision = second + DD, *factor = precision + DD,
           *product = factor + DD, *whitened = product + DD;
    double squares = 0.0, mass = 0.0;
    if (gradients.scale && p_.full_scale) {
      std::fill(precision, precision + DD, 0.0);
      triangular::add_gram(1.0, L, D, product, precision);
    }
    std::fill(second, second + DD, 0.0);
    for (int64_t j = c * K; j < (c + 1) * K; j++) {
      const double N = sums.N[j];
      const T* m = p_.centers + j * D;
      mass += N;
      for (int64_t r = 0; r < D; r++) squares += static_cast<double>(m[r]) * m[r];
      if (gradients.centers) {
        triangular::times_transposed(L, sums.s + j * D, D, whitened);
        for (int64_t r = 0; r < D; r++) {
          const double lambda_s = std::inner_product(L + r * D, L + r * D + r + 1, whitened, 0.0);
          gradients.centers[j * D + r] =
              static_cast<T>(-data_ * lambda_s + prior_ * static_cast<double>(m[r]));
        }
      }
      for (int64_t i = 0; i < DD; i++) second[i] += sums.M[j * DD + i];
      if (!p_.scale) continue;
      if (p_.full_scale) {
        const T* s = p_.scale + j * DD;
        for (int64_t r = 0; r < D; r++)
          for (int64_t t = 0; t < D; t++) factor[r * D + t] = t <= r ? s[r * D + t] : 0.0;
        for (int64_t i = 0; i < DD; i++) squares += factor[i] * factor[i];
        triangular::add_gram(N, factor, D, product, second);
        if (gradients.scale) {
          triangular::tril_times(precision, factor, D, product);
          for (int64_t i = 0; i < DD; i++)
            gradients.scale[j * DD + i] =
                static_cast<T>(data_ * N * product[i] + prior_ * factor[i]);
        }
      } else {
        const T* s = p_.scale + j * D;
        for (int64_t r = 0; r < D; r++) {
          const double s_r = s[r], *L_r = L + r * D;
          squares += s_r * s_r;
          second[r * D + r] += N * s_r * s_r;
          if (gradients.scale)
            gradients.scale[j * D + r] = static_cast<T>(
                (data_ * N * std::inner_product(L_r, L_r + r + 1, L_r, 0.0) + prior_) * s_r);
        }
      }
    }
    double norm = 0.0;
    for (int64_t i = 0; i < DD; i++) norm += L[i] * L[i];
    if (gradients.raw_precision) {
      triangular::tril_times(second, L, D, product);
      const T* raw = p_.raw_precision + c * DD;
      T* out = gradients.raw_precision + c * DD;
      for (int64_t i = 0; i < DD; i++)
        out[i] = static_cast<T>(data_ * product[i] + prior_ / v_ * L[i]);
      for (int64_t r = 0; r < D; r++) {
        const int64_t i = r * D + r;
        const double slope = data_ * (product[i] - mass / L[i]) + prior_ * (L[i] / v_ - 1.0 / L[i]);
        out[i] = static_cast<T>(slope * softplus_slope(raw[i]));
      }
    }
    return log_det - 0.5 / v_ * norm - 0.5 * squares;
  }

 private:
  const Parameters<T>& p_;
  double data_, prior_, v_;
};

// Owns N [J], s [J, D], M [J, D, D].
class SumsBuffer {
 public:
  SumsBuffer(int64_t J, int64_t D)
      : values_(make_buffer<double>(J * (1 + D + D * D))),
        sums{values_.get(), values_.get() + J, values_.get() + J * (1 + D)} {}

 private:
  Buffer<double> values_;

 public:
  const Sums sums;
};

}  // namespace

template <class T>
double map_gradients(const Parameters<T>& p, Samples<T> samples, const ParameterPriors& priors,
                     bool responsibility_gradient, double prior_weight, int threads,
                     const Gradients<T>& gradients) {
  const int64_t C = p.num_components, K = p.per_component, D = p.dim, J = C * K;
  if (priors.map_prior == MapPrior::none) prior_weight = 0.0;
  const double data_weight = 1.0 / static_cast<double>(samples.count);
  const ExpectedLogJoint<T> mixture(p, threads);
  const SumsBuffer buffer(J, D);
  const Sums& sums = buffer.sums;
  double totals[2];
  mixture.sum(p, samples, 1.0, threads, responsibility_gradient ? 0.0 : 1.0,
              responsibility_gradient ? 1.0 : 0.0, sums, totals);

  const ComponentGradients<T> component(p, data_weight, prior_weight);
  const int workers = threads_for(p, threads, p.full_scale ? 4.0 : 2.0);
  const int64_t scratch_size = component.scratch_size(D);
  const auto scratch = make_buffer<double>(workers * scratch_size);
  const auto log_priors = make_buffer<double>(C), grad_log_pi = make_buffer<double>(C);
  parallel_ranges(C, workers, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++)
      log_priors[c] = component(c, mixture.L.get() + c * D * D, mixture.log_det[c], sums, gradients,
                                scratch.get() + thread * scratch_size);
  });

  double log_prior = 0.0, grad_gamma = 0.0;
  const double gamma = concentration(p);
  if (priors.map_prior == MapPrior::none) {
    std::fill(grad_log_pi.get(), grad_log_pi.get() + C, 0.0);
  } else {
    log_prior = std::accumulate(log_priors.get(), log_priors.get() + C, 0.0);
    log_prior -= 0.5 * static_cast<double>(J * D) * kLogTwoPi;
    log_prior -= static_cast<double>(C) * log_wishart_normaliser(C, D);
    log_prior +=
        log_weight_prior(mixture.log_pi.get(), C, gamma, priors, grad_log_pi.get(), &grad_gamma);
  }
  if (gradients.logits) {
    double total = 0.0;
    for (int64_t c = 0; c < C; c++) {
      const double mass = std::accumulate(sums.N + c * K, sums.N + (c + 1) * K, 0.0);
      grad_log_pi[c] = -data_weight * mass - prior_weight * grad_log_pi[c];
      total += grad_log_pi[c];
    }
    for (int64_t c = 0; c < C; c++)
      gradients.logits[c] = static_cast<T>(grad_log_pi[c] - std::exp(mixture.log_pi[c]) * total);
  }
  // gamma = 1 / softplus(raw_alpha)
  if (gradients.raw_alpha)
    *gradients.raw_alpha =
        static_cast<T>(prior_weight * grad_gamma * gamma * gamma * softplus_slope(*p.raw_alpha));
  return -data_weight * totals[1] - prior_weight * log_prior;
}

template <class T>
void statistics(const Parameters<T>& p, Samples<T> samples, double temperature, int threads,
                Sums sums) {
  double totals[2];
  ExpectedLogJoint<T>(p, threads).sum(p, samples, temperature, threads, 1.0, 0.0, sums, totals);
}

namespace {

// The closed form of one component: its free center, then its precision around that.
template <class T>
class ComponentMaximum {
 public:
  ComponentMaximum(const Parameters<T>& p, Sums sums, double factor, MapPrior map_prior,
                   Learnt learnt)
      : p_(p),
        sums_(sums),
        factor_(factor),
        map_prior_(map_prior != MapPrior::none),
        learnt_(learnt),
        inverse_v_(1.0 / wishart_scale(p.num_components, p.dim)) {}

  static int64_t scratch_size(int64_t D) { return 3 * D * D + 2 * D; }

  void operator()(int64_t c, double* scratch) const {
    double* shift = scratch + 3 * p_.dim * p_.dim;  // from the new center to the old
    std::fill(shift, shift + p_.dim, 0.0);
    if (learnt_.centers) set_center(c, scratch, shift);
    if (learnt_.precision) set_precision(c, scratch, shift);
  }

 private:
  // (N Lambda + I)^-1 Lambda (N m + s), the mode under N(0, I); or the mean; an empty one stays.
  void set_center(int64_t c, double* scratch, double* shift) const {
    const int64_t D = p_.dim, DD = D * D;
    double *L = scratch, *system = L + DD, *transposed = system + DD, *center = shift + D;
    const double N = factor_ * sums_.N[c];
    const double* s = sums_.s + c * D;
    T* m = p_.centers + c * D;
    for (int64_t r = 0; r < D; r++) center[r] = N * m[r] + factor_ * s[r];
    if (map_prior_) {
      precision_cholesky(p_.raw_precision + c * DD, D, L);
      triangular::times_transposed(L, center, D, shift);
      triangular::times(L, shift, D, center);
      std::fill(system, system + DD, 0.0);
      triangular::add_gram(N, L, D, transposed, system);
      for (int64_t r = 0; r < D; r++) system[r * D + r] += 1.0;
      triangular::factorise(system, D);
      triangular::solve(system, D, center);
    } else {
      for (int64_t r = 0; r < D; r++) center[r] = N > 0.0 ? center[r] / N : m[r];
    }
    for (int64_t r = 0; r < D; r++) {
      shift[r] = m[r] - center[r];
      m[r] = static_cast<T>(center[r]);
    }
  }

  void set_precision(int64_t c, double* scratch, const double* shift) const {
    const int64_t K = p_.per_component, D = p_.dim, DD = D * D;
    double *scatter = scratch, *factor = scatter + DD, *product = factor + DD;
    double mass = map_prior_ ? 1.0 : 0.0;
    std::fill(scatter, scatter + DD, 0.0);
    if (map_prior_)
      for (int64_t r = 0; r < D; r++) scatter[r * D + r] = inverse_v_;
    for (int64_t j = c * K; j < (c + 1) * K; j++) {
      const double N = factor_ * sums_.N[j];
      const double *s = sums_.s + j * D, *M = sums_.M + j * DD;
      mass += N;
      for (int64_t i = 0; i < DD; i++) scatter[i] += factor_ * M[i];
      if (learnt_.centers)
        for (int64_t r = 0; r < D; r++)
          for (int64_t t = 0; t < D; t++)
            scatter[r * D + t] +=
                factor_ * (s[r] * shift[t] + shift[r] * s[t]) + N * shift[r] * shift[t];
      if (!p_.scale) continue;
      if (p_.full_scale) {
        const T* scale = p_.scale + j * DD;
        for (int64_t r = 0; r < D; r++)
          for (int64_t t = 0; t < D; t++) factor[r * D + t] = t <= r ? scale[r * D + t] : 0.0;
        triangular::add_gram(N, factor, D, product, scatter);
      } else {
        const T* scale = p_.scale + j * D;
        for (int64_t r = 0; r < D; r++)
          scatter[r * D + r] += N * static_cast<double>(scale[r]) * scale[r];
      }
    }
    double largest = 0.0;
    for (int64_t r = 0; r < D; r++) largest = std::max(largest, scatter[r * D + r]);
    const double pivot = triangular::factorise(scatter, D);
    // Without the prior, a pivot that is rounding noise of the points' dtype is no evidence of a
    // spread.
    if (!(pivot > (map_prior_ ? 0.0 : std::numeric_limits<T>::epsilon() * largest))) return;
    // scatter = V^T V, so that its inverse has the lower factor V^-1.
    triangular::invert(scatter, D, factor);
    store(factor, std::sqrt(mass), p_.raw_precision + c * DD);
  }

  // The raw precision of L = weight * factor, unless a T cannot hold it.
  void store(double* factor, double weight, T* raw) const {
    const int64_t D = p_.dim, DD = D * D;
    for (int64_t i = 0; i < DD; i++) factor[i] *= weight;
    for (int64_t r = 0; r < D; r++) factor[r * D + r] = inverse_softplus(factor[r * D + r]);
    const double limit = std::numeric_limits<T>::max();
    if (!std::all_of(factor, factor + DD, [limit](double x) { return std::abs(x) <= limit; }))
      return;
    for (int64_t i = 0; i < DD; i++) raw[i] = static_cast<T>(factor[i]);
  }

  const Parameters<T>& p_;
  Sums sums_;
  double factor_;
  bool map_prior_;
  Learnt learnt_;
  double inverse_v_;
};

// log pi [count] from masses N_c; returns the concentration.
double maximise_weights(const double* mass, int64_t count, const ParameterPriors& priors,
                        double gamma, double* log_weights) {
  const bool learnt = priors.map_prior == MapPrior::learnt;
  std::vector<double> shares(mass, mass + count);
  double room = 1.0;
  if (priors.map_prior != MapPrior::none && priors.weights == Weights::stick_breaking) {
    const auto size = static_cast<std::size_t>(count);
    std::vector<double> a(size), b(size), expected_log_weights(size), map_weights(size);
    std::vector<int64_t> order(size);
    double learnt_gamma;
    stick_breaking::posterior(mass, count, gamma, priors.discount, 1.0, 1.0, order.data(), a.data(),
                              b.data(), expected_log_weights.data(), shares.data(),
                              map_weights.data(), &learnt_gamma);
    if (learnt) gamma = learnt_gamma;
  } else if (priors.map_prior != MapPrior::none) {
    if (learnt) gamma = maximise_concentration(mass, count, gamma);
    const double excess = gamma / static_cast<double>(count) - 1.0;
    // With fewer points than components, their mass alone tells components apart.
    const bool any = *std::max_element(mass, mass + count) + excess > 0.0;
    for (double& share : shares) {
      share = std::max(any ? share + excess : share, 0.0);
      if (share == 0.0) room -= std::exp(kLogWeightFloor);
    }
  }
  const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
  for (int64_t c = 0; c < count; c++)
    log_weights[c] =
        std::max(std::log(shares[static_cast<std::size_t>(c)] / total * room), kLogWeightFloor);
  return gamma;
}

}  // namespace

// The slope by t = log gamma is f = gamma h + 1 / gamma,
//   h = mean_c [psi(N_c + a) - psi(a)] - [psi(N + gamma) - psi(gamma)],  a = gamma / C.
// Newton's method in t, safeguarded by bisection.
double maximise_concentration(const double* counts, int64_t num_components, double start) {
  using stick_breaking::digamma_difference;
  using stick_breaking::trigamma_difference;
  constexpr double kTolerance = 1e-10;
  const double C = static_cast<double>(num_components);
  const double total = std::accumulate(counts, counts + num_components, 0.0);
  const auto slope = [&](double gamma) {
    double sum = 0.0;
    for (int64_t c = 0; c < num_components; c++) sum += digamma_difference(gamma / C, counts[c]);
    return gamma * (sum / C - digamma_difference(gamma, total)) + 1.0 / gamma;
  };
  const auto curvature = [&](double gamma) {  // gamma df / dgamma
    double sum = 0.0;
    for (int64_t c = 0; c < num_components; c++) sum += trigamma_difference(gamma / C, counts[c]);
    return slope(gamma) - 2.0 / gamma +
           gamma * gamma * (trigamma_difference(gamma, total) - sum / (C * C));
  };
  double low = std::log(1e-6), high = std::log(1e6);
  // Counts more even than any gamma explains give the upper end.
  if (slope(std::exp(high)) > 0.0) return std::exp(high);
  double t = std::min(std::max(std::log(start), low), high), step = high - low;
  while (high - low > kTolerance) {
    const double gamma = std::exp(t), f = slope(gamma);
    (f > 0.0 ? low : high) = t;
    const double previous = step;
    step = -f / curvature(gamma);
    // Newton's step, where it stays inside and falls fast enough; else half of the bracket.
    if (!(t + step > low && t + step < high && std::abs(step) < 0.5 * std::abs(previous)))
      step = 0.5 * (low + high) - t;
    t += step;
    if (std::abs(step) < kTolerance) break;
  }
  return std::exp(t);
}

template <class T>
void maximise(const Parameters<T>& p, Sums sums, double factor, const ParameterPriors& priors,
              Learnt learnt, int threads) {
  const int64_t C = p.num_components, K = p.per_component;
  const ComponentMaximum<T> component(p, sums, factor, priors.map_prior, learnt);
  const int workers = threads_for(p, threads, 4.0);
  const int64_t scratch_size = component.scratch_size(p.dim);
  const auto scratch = make_buffer<double>(workers * scratch_size);
  parallel_ranges(C, workers, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) component(c, scratch.get() + thread * scratch_size);
  });

  std::vector<int64_t> kept;
  std::vector<double> mass;
  for (int64_t c = 0; c < C; c++)
    if (p.logits[c] > -std::numeric_limits<T>::infinity()) {
      kept.push_back(c);
      mass.push_back(factor * std::accumulate(sums.N + c * K, sums.N + (c + 1) * K, 0.0));
    }
  std::vector<double> log_weights(mass.size());
  const double gamma = maximise_weights(mass.data(), static_cast<int64_t>(mass.size()), priors,
                                        concentration(p), log_weights.data());
  if (learnt.weights)
    for (std::size_t i = 0; i < kept.size(); i++)
      p.logits[kept[i]] = static_cast<T>(log_weights[i]);
  if (learnt.concentration) *p.raw_alpha = static_cast<T>(inverse_softplus(1.0 / gamma));
}

namespace {

// Sums per point that a sample of the mixture would have: pi_c / K, 0, pi_c / K Lambda_c^-1.
template <class T>
void set_matching(const Parameters<T>& p, const double* log_pi, int64_t j, Sums sums,
                  double* scratch) {
  const int64_t K = p.per_component, D = p.dim, DD = D * D, c = j / K;
  double *L = scratch, *inverse = scratch + DD, *M = sums.M + j * DD;
  const double mass = std::exp(log_pi[c]) / static_cast<double>(K);
  precision_cholesky(p.raw_precision + c * DD, D, L);
  triangular::invert(L, D, inverse);
  sums.N[j] = mass;
  std::fill(sums.s + j * D, sums.s + (j + 1) * D, 0.0);
  std::fill(M, M + DD, 0.0);
  for (int64_t r = 0; r < D; r++)  // Lambda^-1 = L^-T L^-1
    for (int64_t t = 0; t <= r; t++)
      for (int64_t u = 0; u <= r; u++)
        M[t * D + u] += mass * inverse[r * D + t] * inverse[r * D + u];
}

}  // namespace

template <class T>
void online_step(const Parameters<T>& p, Sums batch, double count, double rate, double data_size,
                 bool free_centers, const ParameterPriors& priors, Learnt learnt, int threads,
                 const Running& running) {
  const int64_t C = p.num_components, J = C * p.per_component, D = p.dim, DD = D * D;
  const bool first = *running.steps == 0;
  const int workers = threads_for(p, threads, 1.0);
  const auto scratch = make_buffer<double>(workers * 2 * DD), log_pi = make_buffer<double>(C);
  log_softmax(p.logits, C, log_pi.get());
  const double keep = 1.0 - rate, add = rate / count;
  const Sums old = running.sums;
  parallel_ranges(J, workers, [&](int thread, int64_t begin, int64_t end) {
    double* shift = scratch.get() + thread * 2 * DD;
    for (int64_t j = begin; j < end; j++) {
      if (first) set_matching(p, log_pi.get(), j, old, shift);
      double &N = old.N[j], *s = old.s + j * D, *M = old.M + j * DD,
             *center = running.centers + j * D;
      const T* m = p.centers + j * D;
      if (!first && free_centers) {
        for (int64_t r = 0; r < D; r++) shift[r] = center[r] - m[r];
        for (int64_t r = 0; r < D; r++)
          for (int64_t t = 0; t < D; t++)
            M[r * D + t] += s[r] * shift[t] + shift[r] * s[t] + N * shift[r] * shift[t];
        for (int64_t r = 0; r < D; r++) s[r] += N * shift[r];
      }
      N = keep * N + add * batch.N[j];
      for (int64_t r = 0; r < D; r++) s[r] = keep * s[r] + add * batch.s[j * D + r];
      for (int64_t i = 0; i < DD; i++) M[i] = keep * M[i] + add * batch.M[j * DD + i];
      std::copy(m, m + D, center);
    }
  });
  ++*running.steps;
  maximise(p, old, data_size, priors, learnt, threads);
}

#define VMM_INSTANTIATE(T)                                                                         \
  template double map_gradients<T>(const Parameters<T>&, Samples<T>, const ParameterPriors&, bool, \
                                   double, int, const Gradients<T>&);                              \
  template void statistics<T>(const Parameters<T>&, Samples<T>, double, int, Sums);                \
  template void maximise<T>(const Parameters<T>&, Sums, double, const ParameterPriors&, Learnt,    \
                            int);                                                                  \
  template void online_step<T>(const Parameters<T>&, Sums, double, double, double, bool,           \
                               const ParameterPriors&, Learnt, int, const Running&);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm::empirical_bayes
