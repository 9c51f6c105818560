// The loops of stick_breaking.h, written for a team of members that work in step. On the CPU a team
// has one member, and these are plain loops over components; on a GPU the members are the threads
// of a CUDA block, in one launch. The GPU's algorithm is tested wherever the core is built, with
// emulated members. Only the type Team differs:
//   size()      the number of members
//   each(body)  calls body(rank) for all ranks, in any order, and returns when all are done: no
//               member may read what another one writes within the same call
//   slots<T>()  memory for 2 size() items of T
// Between two calls of each(), all members run the same code on the same values.
//
// The same input gives the same bits on every run with a team of the same size: there are no
// atomics, and the order in which values are combined depends on indices and ranks alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stick_breaking.h"

#ifdef __CUDACC__
#define VMM_DEVICE __device__
#else
#define VMM_DEVICE
#endif

namespace vmm::stick_breaking {

// What scans combine; T{} is neutral.
struct Sums {
  double first = 0.0, second = 0.0;
};
VMM_DEVICE inline Sums combine(Sums x, Sums y) { return {x.first + y.first, x.second + y.second}; }

// What is left of the stick: in expected log, in expectation, at the mode.
struct Rest {
  double log = 0.0, mean = 1.0, map = 1.0;
};
VMM_DEVICE inline Rest combine(Rest x, Rest y) {
  return {x.log + y.log, x.mean * y.mean, x.map * y.map};
}

constexpr std::size_t kSlotSize = sizeof(Rest);  // the largest item of a scan

template <class T>
struct Scan {
  const T* through;  // [size] what all members up to this one combine to; until the next scan
  T all;

  VMM_DEVICE T before(int rank) const { return rank == 0 ? T{} : through[rank - 1]; }
};

// Combines value(rank) in the order of ranks, in log2(size) turns (Hillis & Steele 1986, Data
// parallel algorithms).
template <class T, class Team, class Value>
VMM_DEVICE Scan<T> scan(Team& team, Value value) {
  const int size = team.size();
  T* from = team.template slots<T>();
  T* to = from + size;
  team.each([&](int rank) { from[rank] = value(rank); });
  for (int reach = 1; reach < size; reach *= 2) {
    team.each([&](int rank) {
      to[rank] = rank < reach ? from[rank] : combine(from[rank - reach], from[rank]);
    });
    T* const written = to;
    to = from;
    from = written;
  }
  const T all = from[size - 1];
  team.each([](int) {});  // nobody writes to the slots before everybody has read from them
  return {from, all};
}

// Sorts all components into `order` by merging runs of 1, 2, 4, .. of them, where each finds its
// place by bisecting the other run. from, to [C] are scratch.
template <class Team>
VMM_DEVICE void sort_by_count(Team& team, const Given& given, Ranked* from, Ranked* to,
                              std::int64_t* order) {
  const std::int64_t count = given.num_components;
  const int size = team.size();
  team.each([&](int rank) {
    for (std::int64_t i = rank; i < count; i += size) from[i] = ranked(given.counts, i);
  });
  for (std::int64_t run = 1; run < count; run *= 2) {
    team.each([&](int rank) {
      for (std::int64_t i = rank; i < count; i += size) {
        const std::int64_t start = i / (2 * run) * (2 * run);
        const std::int64_t middle = start + run < count ? start + run : count;
        const std::int64_t end = middle + run < count ? middle + run : count;
        // The number of the other run's that come first, by its end's index in `from`.
        std::int64_t low = i < middle ? middle : start;
        std::int64_t high = i < middle ? end : middle;
        const Ranked mine = from[i];
        while (low < high) {
          const std::int64_t half = low + (high - low) / 2;
          if (precedes(from[half], mine))
            low = half + 1;
          else
            high = half;
        }
        // In the first run: start + (i - start) + (low - middle); in the second:
        // start + (i - middle) + (low - start).
        to[i + low - middle] = mine;
      }
    });
    Ranked* const written = to;
    to = from;
    from = written;
  }
  team.each([&](int rank) {
    for (std::int64_t i = rank; i < count; i += size) order[i] = from[i].component;
  });
}

// The mode of gamma given sum_log_rest = sum_{c<C} E[log(1 - v_c)], at least kMinConcentration.
// d = 0: that of Gamma(shape + C - 1, rate - sum_log_rest). For d > 0, gamma times the derivative
// of the objective is
//   G(gamma) = shape - 1 + sum_{c<C} gamma [psi(gamma + c d + 1 - d) - psi(gamma + c d)]
//              - gamma (rate - sum_log_rest).
// G is concave: the difference of digammas is the Laplace transform of a decreasing function w with
// w(0) = 1 - d, so that gamma times it is concave and at most 1 - d. The bound gives a start to the
// right of every root, exact for d = 0, and from there Newton's method falls monotonically on the
// largest root, which is the maximum. With shape < 1 and d > 0 the objective also grows without
// bound as gamma -> 0; the interior maximum is returned where there is one, kMinConcentration where
// not.
template <class Team>
VMM_DEVICE double update_concentration(Team& team, const Given& given, double sum_log_rest) {
  constexpr int kMaxIterations = 200;
  constexpr double kTolerance = 1e-13;
  const double discount = given.discount;
  const double num_sticks = static_cast<double>(given.num_components - 1);
  const double rate = given.prior_rate - sum_log_rest;
  double gamma = (given.prior_shape - 1.0 + num_sticks * (1.0 - discount)) / rate;

  const int iterations = discount == 0.0 || std::isnan(gamma) ? 0 : kMaxIterations;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    if (gamma <= kMinConcentration) break;
    const Sums sums =
        scan<Sums>(team, [&](int rank) {
          Sums mine;
          // The smallest terms first.
          for (std::int64_t c = given.num_components - 1 - rank; c >= 1; c -= team.size()) {
            const double x = gamma + static_cast<double>(c) * discount;
            const double difference = digamma_difference(x, 1.0 - discount);
            mine.first += difference;
            mine.second += difference - gamma * trigamma_difference(x, 1.0 - discount);
          }
          return mine;
        }).all;
    const double value = given.prior_shape - 1.0 + gamma * (sums.first - rate);
    const double slope = sums.second - rate;
    if (value >= 0.0) break;                     // on the root, but for rounding
    if (slope >= 0.0) return kMinConcentration;  // past the top of G, which is below zero: no root
    const double step = value / slope;
    gamma -= step;
    if (step <= kTolerance * gamma) break;
  }
  return gamma <= kMinConcentration ? kMinConcentration : gamma;
}

// Everything but `order`, which must hold the components by decreasing count.
template <class Team>
VMM_DEVICE void posterior_of_sorted(Team& team, const Given& given, const Posterior& out) {
  const int size = team.size();
  const std::int64_t last = given.num_components - 1;
  const double concentration = in_domain(*given.concentration);

  // From the smallest count up: a tail of small counts is not lost behind a large one.
  Sums tail;
  for (std::int64_t done = 0; done < last; done += size) {
    const auto counts = scan<Sums>(team, [&](int rank) {
      const std::int64_t i = last - 1 - done - rank;
      return Sums{i < 0 ? 0.0 : in_domain(given.counts[out.order[i + 1]]), 0.0};
    });
    team.each([&](int rank) {
      const std::int64_t i = last - 1 - done - rank;
      if (i < 0) return;
      const Beta q = posterior_stick(in_domain(given.counts[out.order[i]]),
                                     combine(tail, counts.through[rank]).first,
                                     static_cast<double>(i + 1), concentration, given.discount);
      out.a[i] = q.a;
      out.b[i] = q.b;
    });
    tail = combine(tail, counts.all);
  }

  Rest rest;
  for (std::int64_t done = 0; done < last; done += size) {
    const auto rests = scan<Rest>(team, [&](int rank) {
      const std::int64_t i = done + rank;
      if (i >= last) return Rest{};
      const Beta q{out.a[i], out.b[i]};
      return Rest{expected_log_rest(q), q.b / (q.a + q.b), 1.0 - stick_mode(q)};
    });
    team.each([&](int rank) {
      const std::int64_t i = done + rank;
      if (i >= last) return;
      const Beta q{out.a[i], out.b[i]};
      const Rest before = combine(rest, rests.before(rank));
      const std::int64_t component = out.order[i];
      out.expected_log_weights[component] = expected_log_stick(q) + before.log;
      out.mean_weights[component] = q.a / (q.a + q.b) * before.mean;
      out.map_weights[component] = stick_mode(q) * before.map;
    });
    rest = combine(rest, rests.all);
  }

  const double update = update_concentration(team, given, rest.log);
  team.each([&](int rank) {
    if (rank != 0) return;
    const std::int64_t component = out.order[last];
    out.expected_log_weights[component] = rest.log;
    out.mean_weights[component] = rest.mean;
    out.map_weights[component] = rest.map;
    *out.concentration = update;
  });
}

}  // namespace vmm::stick_breaking
