// The machine's own peak: independent chains of fused multiply-adds in vector registers, which is
// what a kernel would reach that did nothing else. Built by bench/peak.py with -march=native.
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// More chains than latency times units of any current core, few enough for 16 registers.
constexpr int kChains = 12;

template <class T>
double fma_loop(std::int64_t rounds) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  Vector sums[kChains] = {};
  const Vector a = Vector{} + T(0.999), b = Vector{} + T(1e-3);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) {
      sums[k] = sums[k] * a + b;
      asm volatile("" : "+v"(sums[k]));  // one step of one chain: nothing to fold or reorder
    }
  }
  Vector total = {};
#pragma GCC unroll 12
  for (int k = 0; k < kChains; ++k) total += sums[k];
  return total[0];
}

}  // namespace

// Each makes `rounds` times fma_*_operations() floating-point operations (an FMA counts two).
extern "C" {
double fma_float32(std::int64_t rounds) { return fma_loop<float>(rounds); }
double fma_float64(std::int64_t rounds) { return fma_loop<double>(rounds); }
int fma_float32_operations() { return 2 * kChains * kVectorBytes / int(sizeof(float)); }
int fma_float64_operations() { return 2 * kChains * kVectorBytes / int(sizeof(double)); }
}
