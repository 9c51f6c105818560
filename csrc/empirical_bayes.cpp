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

#include "components.h"
#include "empirical_bayes_kernels.h"
#include "finite.h"
#include "instruction_set.h"
#include "parallel.h"
#include "stick_breaking.h"
#include "triangular.h"

namespace vmm::empirical_bayes {
namespace {

using std::int64_t;

constexpr double kLogTwoPi = 1.8378770664093453;
constexpr double kLogPi = 1.1447298858494002;

// A float whitening matrix of this condition number or more (as bounded from below by its norm over
// its smallest diagonal element) is evaluated in double; vmm_fast/ops.py has the same bound.
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

// Threads for loops over components with `products` triangular products per center.
template <class T>
int threads_for(const Parameters<T>& p, int threads, double products) {
  const double D = static_cast<double>(p.dim);
  return useful_threads(threads, products * p.num_components * p.per_component * D * D * D / 3);
}

// Calls body(first, count, scratch) for every group of components that fills a kernel's lanes.
template <class T, class Body>
void for_each_group(const Parameters<T>& p, const Kernels<T>& kernel, int threads, Body body) {
  const int64_t C = p.num_components, lanes = kernel.lanes, size = kernel.scratch_size(p.dim);
  const auto scratch = make_buffer<double>(threads * size);
  parallel_ranges((C + lanes - 1) / lanes, threads, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t c = begin * lanes; c < std::min(end * lanes, C); c += lanes)
      body(c, static_cast<int>(std::min(lanes, C - c)), scratch.get() + thread * size);
  });
}

// The expected log-joint: L [C, D, D] with log det L [C], log pi [C] and offsets [J].
template <class T>
struct ExpectedLogJoint {
  ExpectedLogJoint(const Parameters<T>& p, int threads);

  // The weighted sums over points and totals of vmm::statistics.
  void sum(const Parameters<T>& p, Samples<T> samples, int threads, double grad_lse,
           double grad_expected, Sums sums, double* totals, Sums slopes = {}) const {
    if (float32_suffices)
      sum_in<T>(p, samples, threads, grad_lse, grad_expected, sums, totals, slopes);
    else
      sum_in<double>(p, samples, threads, grad_lse, grad_expected, sums, totals, slopes);
  }

  Buffer<double> L, log_det, log_pi, offsets;
  bool float32_suffices = true;

 private:
  template <class U>
  void sum_in(const Parameters<T>& p, Samples<T> samples, int threads, double grad_lse,
              double grad_expected, Sums sums, double* totals, Sums slopes) const;
};

template <class T>
void log_softmax(const T* logits, int64_t count, double* out) {
  check_log_weights("logits", logits, count);
  double max = -INFINITY, total = 0.0;
  for (int64_t c = 0; c < count; c++) max = std::max<double>(max, logits[c]);
  for (int64_t c = 0; c < count; c++) total += std::exp(logits[c] - max);
  const double log_total = max + std::log(total);
  for (int64_t c = 0; c < count; c++) out[c] = logits[c] - log_total;
}

template <class T>
ExpectedLogJoint<T>::ExpectedLogJoint(const Parameters<T>& p, int threads) {
  const int64_t C = p.num_components, K = p.per_component, D = p.dim;
  log_pi = make_buffer<double>(C);
  log_softmax(p.logits, C, log_pi.get());
  L = make_buffer<double>(C * D * D);
  log_det = make_buffer<double>(C);
  offsets = make_buffer<double>(C * K);
  const auto condition = make_buffer<double>(C);
  const auto& kernel = current_kernels<Kernels<T>>();
  for_each_group(p, kernel, threads_for(p, threads, 1.0),
                 [&](int64_t c, int count, double* scratch) {
                   kernel.expected(p, c, count, L.get() + c * D * D, log_det.get() + c,
                                   condition.get() + c, offsets.get() + c * K, scratch);
                 });
  const double constant =
      -std::log(static_cast<double>(K)) - 0.5 * static_cast<double>(D) * kLogTwoPi;
  for (int64_t c = 0; c < C; c++) {
    float32_suffices = float32_suffices && condition[c] <= kFloat32Condition;
    for (int64_t j = c * K; j < (c + 1) * K; j++) {
      const double log_density = log_det[c] - offsets[j];  // at the center, less a constant
      offsets[j] = log_pi[c] + constant + log_density;
      if (!std::isfinite(log_density)) refuse_covariance(c);
    }
  }
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
void ExpectedLogJoint<T>::sum_in(const Parameters<T>& p, Samples<T> samples, int threads,
                                 double grad_lse, double grad_expected, Sums sums, double* totals,
                                 Sums slopes) const {
  const int64_t K = p.per_component, D = p.dim, J = p.num_components * K;
  const auto whitening = make_buffer<U>(J * D * D), narrowed = make_buffer<U>(J);
  const double moved = static_cast<double>(J * D * D);
  parallel_ranges(J, useful_threads(threads, 4.0 * moved), [&](int, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) {
      const double* L_c = L.get() + j / K * D * D;
      U* out = whitening.get() + j * D * D;
      for (int64_t i = 0; i < D * D; i++) out[i] = static_cast<U>(L_c[i]);
      narrowed[j] = static_cast<U>(offsets[j]);
    }
  });
  Buffer<U> centers, z, weights;
  const Mixture<U> mixture{
      converted<U>(p.centers, J * D, centers), whitening.get(), narrowed.get(), J, D, true};
  const Samples<U> points{
      converted<U>(samples.z, samples.count * D, z), samples.count,
      samples.weights ? converted<U>(samples.weights, samples.count, weights) : nullptr};
  vmm::statistics<U>(mixture, points, threads, static_cast<U>(grad_lse),
                     static_cast<U>(grad_expected), sums.N, sums.s, sums.M, totals, slopes.N,
                     slopes.s);
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

}  // namespace

template <class T>
void constrained(const Parameters<T>& p, int threads, T* precision_cholesky, T* log_weights) {
  const int64_t C = p.num_components, D = p.dim;
  const auto log_pi = make_buffer<double>(C);
  log_softmax(p.logits, C, log_pi.get());
  std::copy(log_pi.get(), log_pi.get() + C, log_weights);
  const auto& kernel = current_kernels<Kernels<T>>();
  for_each_group(p, kernel, threads_for(p, threads, 1.0),
                 [&](int64_t c, int count, double* scratch) {
                   kernel.precision_cholesky(p, c, count, precision_cholesky + c * D * D, scratch);
                 });
}

template <class T>
double map_gradients(const Parameters<T>& p, Samples<T> samples, const ParameterPriors& priors,
                     bool responsibility_gradient, double prior_weight, int threads,
                     const Gradients<T>& gradients, const Sums* batch) {
  const int64_t C = p.num_components, K = p.per_component, D = p.dim, J = C * K;
  if (priors.map_prior == MapPrior::none) prior_weight = 0.0;
  const double data_weight = 1.0 / static_cast<double>(samples.count);
  const ExpectedLogJoint<T> mixture(p, threads);
  const auto memory = make_buffer<double>(J * (1 + D + (batch ? 0 : D * D)));
  Sums sums{memory.get(), memory.get() + J, batch ? nullptr : memory.get() + J * (1 + D)};
  double totals[2];
  if (!batch) {
    mixture.sum(p, samples, threads, responsibility_gradient ? 0.0 : 1.0,
                responsibility_gradient ? 1.0 : 0.0, sums, totals);
  } else if (responsibility_gradient) {
    if (gradients.raw_precision)
      throw std::invalid_argument("the batch's sums do not have the gradient of raw_precision");
    mixture.sum(p, samples, threads, 1.0, 0.0, *batch, totals, sums);
  } else {
    sums = *batch;
    mixture.sum(p, samples, threads, 1.0, 0.0, sums, totals);
  }

  const Weighted weighted{sums, data_weight, prior_weight, wishart_scale(C, D)};
  const auto log_priors = make_buffer<double>(C), grad_log_pi = make_buffer<double>(C);
  const auto& kernel = current_kernels<Kernels<T>>();
  for_each_group(
      p, kernel, threads_for(p, threads, 4.0), [&](int64_t c, int count, double* scratch) {
        kernel.gradients(p, c, count, weighted, gradients, log_priors.get() + c, scratch);
      });

  double log_prior = 0.0, grad_gamma = 0.0;
  const double gamma = concentration(p);
  if (priors.map_prior == MapPrior::none) {
    std::fill(grad_log_pi.get(), grad_log_pi.get() + C, 0.0);
  } else {
    log_prior = std::accumulate(log_priors.get(), log_priors.get() + C, 0.0);
    log_prior += std::accumulate(mixture.log_det.get(), mixture.log_det.get() + C, 0.0);
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
double statistics(const Parameters<T>& p, Samples<T> samples, int threads, Sums sums) {
  double totals[2];
  ExpectedLogJoint<T>(p, threads).sum(p, samples, threads, 1.0, 0.0, sums, totals);
  return totals[0];
}

namespace {

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
    stick_breaking::posterior({mass, count, &gamma, priors.discount, 1.0, 1.0},
                              {order.data(), a.data(), b.data(), expected_log_weights.data(),
                               shares.data(), map_weights.data(), &learnt_gamma});
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
  const Weighted weighted{sums, factor, 1.0, wishart_scale(C, p.dim)};
  const bool map_prior = priors.map_prior != MapPrior::none;
  const auto& kernel = current_kernels<Kernels<T>>();
  for_each_group(p, kernel, threads_for(p, threads, 4.0),
                 [&](int64_t c, int count, double* scratch) {
                   kernel.maximise(p, c, count, weighted, map_prior, learnt, scratch);
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
void set_matching(const Parameters<T>& p, int threads, Sums sums) {
  const int64_t K = p.per_component, D = p.dim, DD = D * D;
  const ExpectedLogJoint<T> mixture(p, threads);
  std::vector<double> inverse(static_cast<std::size_t>(DD));
  for (int64_t j = 0; j < p.num_components * K; j++) {
    double* M = sums.M + j * DD;
    sums.N[j] = std::exp(mixture.log_pi[j / K]) / static_cast<double>(K);
    std::fill(sums.s + j * D, sums.s + (j + 1) * D, 0.0);
    std::fill(M, M + DD, 0.0);
    triangular::invert(mixture.L.get() + j / K * DD, D, inverse.data());
    for (int64_t r = 0; r < D; r++)  // Lambda^-1 = L^-T L^-1
      for (int64_t t = 0; t <= r; t++)
        for (int64_t u = 0; u <= r; u++)
          M[t * D + u] += sums.N[j] * inverse[r * D + t] * inverse[r * D + u];
  }
}

}  // namespace

template <class T>
void online_step(const Parameters<T>& p, Sums batch, double count, double rate, double data_size,
                 bool free_centers, const ParameterPriors& priors, Learnt learnt, int threads,
                 const Running& running) {
  const int64_t C = p.num_components, J = C * p.per_component, D = p.dim, DD = D * D;
  const bool first = *running.steps == 0;
  const Sums old = running.sums;
  if (first) set_matching(p, threads, old);
  const double keep = 1.0 - rate, add = rate / count;
  const int workers = useful_threads(threads, 2.0 * J * DD);
  const auto shifts = make_buffer<double>(workers * D);
  parallel_ranges(J, workers, [&](int thread, int64_t begin, int64_t end) {
    double* shift = shifts.get() + thread * D;
    for (int64_t j = begin; j < end; j++) {
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
  template void constrained<T>(const Parameters<T>&, int, T*, T*);                                 \
  template double map_gradients<T>(const Parameters<T>&, Samples<T>, const ParameterPriors&, bool, \
                                   double, int, const Gradients<T>&, const Sums*);                 \
  template double statistics<T>(const Parameters<T>&, Samples<T>, int, Sums);                      \
  template void maximise<T>(const Parameters<T>&, Sums, double, const ParameterPriors&, Learnt,    \
                            int);                                                                  \
  template void online_step<T>(const Parameters<T>&, Sums, double, double, double, bool,           \
                               const ParameterPriors&, Learnt, int, const Running&);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm::empirical_bayes
