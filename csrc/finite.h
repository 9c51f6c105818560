// Tests for numbers that are NaN or infinite, by their bits: a loop of these tests has no branch
// and compiles to vector instructions.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace vmm
