// Tests for numbers that are NaN or infinite; a loop of them has no branch and compiles to vector
// instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace vmm {

inline std::uint32_t exponent_full(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) == 0x7f800000u;
}
inline std::uint64_t exponent_full(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7ff0000000000000u) == 0x7ff0000000000000u;
}

template <class T>
bool is_finite(T x) {
  return !exponent_full(x);
}

template <class T>
bool all_finite(const T* values, std::int64_t count) {
  // As wide as the values are: a vector of flags then has as many lanes as one of values.
  decltype(exponent_full(T())) bad = 0;
  for (std::int64_t i = 0; i < count; i++) bad |= exponent_full(values[i]);
  return !bad;
}

// Logarithms of weights may be -inf, but not all. vmm_fast/backends/plain.py has the same texts.
template <class T>
void check_log_weights(const char* name, const T* values, std::int64_t count) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  bool valid = true, any = false;
  for (std::int64_t i = 0; i < count; i++) {
    valid &= values[i] < kInfinity;  // false for a NaN
    any |= values[i] > -kInfinity;
  }
  if (valid && any) return;
  std::int64_t row = 0;
  while (row < count && values[row] < kInfinity) row++;
  throw std::invalid_argument(
      name + (row == count ? " must be finite for at least one component, but are all -inf"
                           : " must be finite or -inf, but row " + std::to_string(row) +
                                 " has a NaN or infinite value"));
}

}  // namespace vmm
