// Threads and aligned memory, shared by the loops around the kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace vmm {

// Kernels load whole vectors, so memory for them is aligned to the widest.
struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;
template <class T>
Buffer<T> make_buffer(std::int64_t size) {
  return Buffer<T>(static_cast<T*>(
      ::operator new(static_cast<std::size_t>(std::max<std::int64_t>(size, 1)) * sizeof(T),
                     std::align_val_t(64))));
}

// Starting threads costs more than this many multiply-adds do.
constexpr double kWorkWorthAThread = 2e5;

inline int useful_threads(int threads, double multiply_adds) {
  return static_cast<int>(
      std::max(1.0, std::min<double>(threads, multiply_adds / kWorkWorthAThread)));
}

// Runs body(thread, begin, end) over an even split of [0, count). body must not throw.
template <class Body>
void parallel_ranges(std::int64_t count, int threads, Body body) {
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, count)));
  if (threads == 1) {
    body(0, std::int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++)
    body(thread, count * thread / threads, count * (thread + 1) / threads);
}

}  // namespace vmm
