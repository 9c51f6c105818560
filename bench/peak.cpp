// The machine's own peak: independent chains of fused multiply-adds in vector registers, which is
// what a kernel would reach that did nothing else. Built by bench/limits.py with -march=native.
#include <cstdint>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// More chains than latency times units of any current core, few enough for 16 registers.
constexpr int kChains = 12;

// fma_loop(rounds) makes `rounds` times fma_operations() floating-point operations, an FMA counts
// two.
extern "C" float fma_loop(std::int64_t rounds) {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  Vector sums[kChains] = {};
  const Vector a = Vector{} + 0.999f, b = Vector{} + 1e-3f;
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

extern "C" int fma_operations() { return 2 * kChains * kVectorBytes / int(sizeof(float)); }
