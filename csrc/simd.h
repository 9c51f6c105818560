// Vectors of one instruction set and the few functions on them that the kernels need. For files
// that the build compiles once per set, with VMM_VECTOR_BYTES the width of its registers.
//
// Everything lives in an unnamed namespace and no standard template is instantiated: the linker
// must never replace one instruction set's copy of a shared inline function by another's.
#pragma once

#include <cstdint>
#if VMM_VECTOR_BYTES == 64 && defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vmm {
namespace {

template <class T>
struct Scalar;
template <>
struct Scalar<float> {
  using Int = std::int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int log_terms = 5;
  // 2^r = 1 + r q(r) on |r| <= 1/2, minimax in relative error (2e-8; 3e-17 for double)
  static constexpr float exp2_coefficients[] = {1.69553094739071469e-4f, 1.34356471004131552e-3f,
                                                9.61261117299104333e-3f, 5.55020392950925172e-2f,
                                                2.40226965047484404e-1f, 6.93147303200041515e-1f};
};
template <>
struct Scalar<double> {
  using Int = std::int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int log_terms = 11;
  static constexpr double exp2_coefficients[] = {
      4.07963683838535983e-10, 7.07202616287080177e-9, 1.01805581173453492e-7,
      1.32154455179640001e-6,  1.52527278223540722e-5, 1.54035304366843036e-4,
      1.33335581527077867e-3,  9.61812910761006349e-3, 5.55041086647949050e-2,
      2.40226506959100930e-1,  6.93147180559945623e-1};
};

template <class T>
struct Simd {
  using Int = typename Scalar<T>::Int;
  typedef T Vec __attribute__((vector_size(VMM_VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(VMM_VECTOR_BYTES)));
  static constexpr int lanes = VMM_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename Simd<T>::Vec;

// The vector at an address, which must be aligned to it.
inline const Vec<float>& at(const float* p) { return *reinterpret_cast<const Vec<float>*>(p); }
inline const Vec<double>& at(const double* p) { return *reinterpret_cast<const Vec<double>*>(p); }
inline Vec<float>& at(float* p) { return *reinterpret_cast<Vec<float>*>(p); }
inline Vec<double>& at(double* p) { return *reinterpret_cast<Vec<double>*>(p); }

template <class T>
Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// GCC makes a comparison and a blend of the above for the widest vectors. Without a mask, its
// header passes a vector that is not initialized, and it warns of that wherever this is inlined.
#if VMM_VECTOR_BYTES == 64 && defined(__AVX512F__)
template <>
inline Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return _mm512_maskz_max_ps(__mmask16(-1), a, b);
}
template <>
inline Vec<double> max<double>(Vec<double> a, Vec<double> b) {
  return _mm512_maskz_max_pd(__mmask8(-1), a, b);
}
#endif

// The smaller of two; NaN if a is NaN.
template <class T>
Vec<T> min(Vec<T> a, Vec<T> b) {
  return b < a ? b : a;
}

// The compiler makes one instruction of this loop.
inline Vec<double> sqrt(Vec<double> x) {
  for (int lane = 0; lane < Simd<double>::lanes; lane++) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}

// Lane i is lane index[i] of a and b, side by side.
template <class T>
Vec<T> shuffle(Vec<T> a, Vec<T> b, typename Simd<T>::IntVec index) {
#ifdef __clang__  // has no such function for indices in a variable; it sees through the loop
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> found;
  for (int i = 0; i < lanes; i++) found[i] = index[i] < lanes ? a[index[i]] : b[index[i] - lanes];
  return found;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// The sums of as many vectors, side by side in memory, as a vector has lanes; pairwise, so that the
// order of additions is the same for every call.
template <class T>
Vec<T> sums(const T* vectors) {
  using IntVec = typename Simd<T>::IntVec;
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> x[lanes];
  IntVec lane{};
  for (int i = 0; i < lanes; i++) {
    x[i] = at(vectors + i * lanes);
    lane[i] = i;
  }
  // Of vectors i and i + width, lanes without and with the bit of width keep the one and the other.
#pragma GCC unroll 8
  for (int width = lanes / 2; width >= 1; width /= 2) {
    const IntVec second = (lane & width) != 0 ? IntVec{} + lanes : IntVec{};
#pragma GCC unroll 8
    for (int i = 0; i < width; i++)
      x[i] = shuffle<T>(x[i], x[i + width], lane | second) +
             shuffle<T>(x[i], x[i + width], (lane ^ width) | second);
  }
  return x[0];
}

// exp(x) for x up to a few; exactly 0 from log(2) times minus the exponent's bias down.
template <class T>
Vec<T> exp(Vec<T> x) {
  using S = Scalar<T>;
  using IntVec = typename Simd<T>::IntVec;
  // In units of log 2. The bound itself gives a mantissa of 1 and the exponent of zero: no branch.
  const Vec<T> t = max<T>(x * T(1.44269504088896340736), broadcast<T>(-S::exponent_bias));
  const Vec<T> shifted = t + S::round_magic;
  const Vec<T> r = t - (shifted - S::round_magic);
  Vec<T> p = broadcast<T>(S::exp2_coefficients[0]);
  for (int k = 1; k < int(sizeof(S::exp2_coefficients) / sizeof(T)); k++)
    p = p * r + S::exp2_coefficients[k];
  p = p * r + T(1);
  return (Vec<T>)((IntVec)p + ((IntVec)shifted << S::mantissa_bits));
}

// log(x + rest) for a positive normal x and, if `with_rest`, what is lost where a sum is rounded to
// x: with x = 2^n m, 1/sqrt(2) <= m < sqrt(2), and s = (m - 1) / (m + 1), log x = n log 2 + 2 (s +
// s^3 / 3 + s^5 / 5 + ..).
template <class T, bool with_rest>
Vec<T> log_of_sum(Vec<T> x, Vec<T> rest) {
  using S = Scalar<T>;
  using Int = typename S::Int;
  using IntVec = typename Simd<T>::IntVec;
  // Of 1/sqrt(2): subtracting it makes the exponent's bits count from there.
  constexpr Int root_half = sizeof(T) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);
  const IntVec bits = (IntVec)x - root_half;
  const IntVec exponent = bits >> S::mantissa_bits;
  const Vec<T> m = (Vec<T>)((bits - (exponent << S::mantissa_bits)) + root_half);
  const Vec<T> n = __builtin_convertvector(exponent, Vec<T>);
  Vec<T> above = m - 1;
  if (with_rest) above += rest * (Vec<T>)((S::exponent_bias - exponent) << S::mantissa_bits);
  const Vec<T> s = above / (m + 1);
  const Vec<T> ss = s * s;
  Vec<T> p = broadcast<T>(T(1) / (2 * S::log_terms + 1));
  for (int k = S::log_terms - 1; k >= 1; k--) p = p * ss + T(1) / (2 * k + 1);
  return n * T(0.693147180559945309417) + 2 * (s + s * ss * p);
}

template <class T>
Vec<T> log(Vec<T> x) {
  return log_of_sum<T, false>(x, x);
}

}  // namespace
}  // namespace vmm
