// The posterior of stick_breaking.h on a CPU, and sticks from weights and back.
#include "stick_breaking.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "stick_breaking_team.h"

namespace vmm::stick_breaking {

namespace {

// One member alone.
class Alone {
 public:
  static constexpr int size() { return 1; }
  template <class Body>
  void each(Body body) {
    body(0);
  }
  template <class T>
  T* slots() {
    return reinterpret_cast<T*>(slots_);
  }

 private:
  alignas(Rest) unsigned char slots_[2 * kSlotSize];
};

// Members that a phase calls one after another. Results that depend on the direction would mean
// that one reads what another one writes.
class Emulated {
 public:
  Emulated(int size, bool falling)
      : size_(size), falling_(falling), slots_(2 * static_cast<std::size_t>(size)) {}
  int size() const { return size_; }
  template <class Body>
  void each(Body body) {
    for (int i = 0; i < size_; ++i) body(falling_ ? size_ - 1 - i : i);
  }
  template <class T>
  T* slots() {
    static_assert(sizeof(T) <= kSlotSize);
    return reinterpret_cast<T*>(slots_.data());
  }

 private:
  struct alignas(Rest) Slot {
    unsigned char bytes[kSlotSize];
  };
  int size_;
  bool falling_;
  std::vector<Slot> slots_;
};

}  // namespace

void posterior(const Given& given, const Posterior& out) {
  std::iota(out.order, out.order + given.num_components, std::int64_t{0});
  std::sort(out.order, out.order + given.num_components, [&](std::int64_t i, std::int64_t j) {
    return precedes(ranked(given.counts, i), ranked(given.counts, j));
  });
  Alone team;
  posterior_of_sorted(team, given, out);
}

void emulated_posterior(const Given& given, const Posterior& out, Ranked* scratch, int members,
                        bool falling) {
  Emulated team(members, falling);
  sort_by_count(team, given, scratch, scratch + given.num_components, out.order);
  posterior_of_sorted(team, given, out);
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
