// The loops over components of stick_breaking.h, where the model, its formulas and sources are.
#include "stick_breaking.h"

#include <algorithm>
#include <numeric>

namespace vmm::stick_breaking {

void posterior(const double* counts, std::int64_t num_components, double concentration,
               double discount, double prior_shape, double prior_rate, std::int64_t* order,
               double* a, double* b, double* expected_log_weights, double* mean_weights,
               double* map_weights, double* concentration_update) {
  const std::int64_t last = num_components - 1;
  std::iota(order, order + num_components, std::int64_t{0});
  std::sort(order, order + num_components, [counts](std::int64_t i, std::int64_t j) {
    return counts[i] != counts[j] ? counts[i] > counts[j] : i < j;
  });

  // From the smallest count up: a tail of small counts is not lost behind a large one.
  double tail = 0.0;
  for (std::int64_t i = last - 1; i >= 0; --i) {
    tail += counts[order[i + 1]];
    const Beta q = posterior_stick(counts[order[i]], tail, static_cast<double>(i + 1),
                                   concentration, discount);
    a[i] = q.a;
    b[i] = q.b;
  }

  // What is left of the stick before component (i): in expected log, in expectation, at the mode.
  double log_rest = 0.0, mean_rest = 1.0, map_rest = 1.0;
  for (std::int64_t i = 0; i < last; ++i) {
    const Beta q{a[i], b[i]};
    const double mode = stick_mode(q);
    expected_log_weights[order[i]] = expected_log_stick(q) + log_rest;
    mean_weights[order[i]] = q.a / (q.a + q.b) * mean_rest;
    map_weights[order[i]] = mode * map_rest;
    log_rest += expected_log_rest(q);
    mean_rest *= q.b / (q.a + q.b);
    map_rest *= 1.0 - mode;
  }
  expected_log_weights[order[last]] = log_rest;
  mean_weights[order[last]] = mean_rest;
  map_weights[order[last]] = map_rest;

  *concentration_update =
      update_concentration(log_rest, num_components, discount, prior_shape, prior_rate);
}

// gamma times the derivative of the objective is
//   G(gamma) = shape - 1 + sum_{c<C} gamma [psi(gamma + c d + 1 - d) - psi(gamma + c d)]
//              - gamma (rate - sum_log_rest).
// G is concave: the difference of digammas is the Laplace transform of a decreasing function w with
// w(0) = 1 - d, so that gamma times it is concave and at most 1 - d. The bound gives a start to the
// right of every root, exact for d = 0, and from there Newton's method falls monotonically on the
// largest root, which is the maximum. With shape < 1 and d > 0 the objective also grows without
// bound as gamma -> 0; the interior maximum is returned where there is one, kMinConcentration where
// not.
double update_concentration(double sum_log_rest, std::int64_t num_components, double discount,
                            double prior_shape, double prior_rate) {
  constexpr int kMaxIterations = 200;
  constexpr double kTolerance = 1e-13;
  const double num_sticks = static_cast<double>(num_components - 1);
  const double rate = prior_rate - sum_log_rest;
  double gamma = (prior_shape - 1.0 + num_sticks * (1.0 - discount)) / rate;
  if (discount == 0.0) return std::max(gamma, kMinConcentration);

  for (int iteration = 0; iteration < kMaxIterations; ++iteration) {
    if (!(gamma > kMinConcentration)) return kMinConcentration;
    double sum = 0.0, slope = 0.0;
    for (std::int64_t c = num_components - 1; c >= 1; --c) {  // the smallest terms first
      const double x = gamma + static_cast<double>(c) * discount;
      const double difference = digamma_difference(x, 1.0 - discount);
      sum += difference;
      slope += difference - gamma * trigamma_difference(x, 1.0 - discount);
    }
    const double value = prior_shape - 1.0 + gamma * (sum - rate);
    slope -= rate;
    if (value >= 0.0) return gamma;              // on the root, but for rounding
    if (slope >= 0.0) return kMinConcentration;  // past the top of G, which is below zero: no root
    const double step = value / slope;
    gamma -= step;
    if (step <= kTolerance * gamma) break;
  }
  return std::max(gamma, kMinConcentration);
}

void sticks_to_log_weights(const double* sticks, std::int64_t num_components, double* log_weights) {
  double log_rest = 0.0;
  for (std::int64_t i = 0; i < num_components - 1; ++i) {
    log_weights[i] = std::log(sticks[i]) + log_rest;
    log_rest += std::log1p(-sticks[i]);
  }
  log_weights[num_components - 1] = log_rest;
}

void log_weights_to_sticks(const double* log_weights, std::int64_t num_components, double* sticks) {
  double log_rest = log_weights[num_components - 1];
  for (std::int64_t i = num_components - 2; i >= 0; --i) {
    log_rest = log_add(log_rest, log_weights[i]);
    sticks[i] = log_weights[i] == -INFINITY ? 0.0 : std::exp(log_weights[i] - log_rest);
  }
}

}  // namespace vmm::stick_breaking
