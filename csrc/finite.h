// Whether numbers are neither NaN nor infinite, by their bits: a loop over them has no branch and
// runs in vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace vmm {

inline bool is_finite(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) != 0x7f800000u;
}
inline bool is_finite(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

template <class T>
bool all_finite(const T* values, std::int64_t count) {
  bool finite = true;
  for (std::int64_t i = 0; i < count; i++) finite &= is_finite(values[i]);
  return finite;
}

}  // namespace vmm
