// Everything around the kernels: packing, chunking, threads, and turning sums into gradients.
#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_set.h"
#include "mixture_kernels.h"
#include "parallel.h"

namespace vmm {
namespace {

using std::int64_t;

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  switch (current_instruction_set()) {
#ifdef VMM_HAVE_avx512
    case InstructionSet::avx512:
      return kernels_f32_avx512();
#endif
#ifdef VMM_HAVE_avx2
    case InstructionSet::avx2:
      return kernels_f32_avx2();
#endif
    default:
      return kernels_f32_baseline();
  }
}
template <>
const Kernels<double>& kernels<double>() {
  switch (current_instruction_set()) {
#ifdef VMM_HAVE_avx512
    case InstructionSet::avx512:
      return kernels_f64_avx512();
#endif
#ifdef VMM_HAVE_avx2
    case InstructionSet::avx2:
      return kernels_f64_avx2();
#endif
    default:
      return kernels_f64_baseline();
  }
}

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

// One value per sample of a chunk, on the stack: no kernel's chunk is wider than 8 vectors of 64
// bytes.
template <class T>
constexpr int kMaxChunk = 8 * 64 / sizeof(T);
template <class T>
struct Lanes {
  alignas(64) T data[kMaxChunk<T>];
};

template <class T>
bool all_finite(const T* values, int64_t count) {
  // x - x is 0 for a finite x and NaN else: no branch in the loop.
  T total = 0;
  for (int64_t i = 0; i < count; i++) total += values[i] - values[i];
  return total == 0;
}

// A^T form: with P the reversal of coordinates, |A^T d| = |(P A^T P) (P d)| and P A^T P is lower
// triangular again. Only packing, unpacking and z's transposition into lanes know of it.
int64_t turned(bool transpose, int64_t dim, int64_t r) { return transpose ? dim - 1 - r : r; }

template <class T>
class Packed {
 public:
  explicit Packed(const Mixture<T>& mixture) : dim_(mixture.dim) {
    const int64_t D = dim_, J = mixture.num_components;
    records_.reserve(static_cast<std::size_t>(J * record_size(D)));
    for (int64_t j = 0; j < J; j++) {
      const T c = mixture.offsets[j];
      if (c == -std::numeric_limits<T>::infinity()) continue;
      const T* m = mixture.centers + j * D;
      const T* A = mixture.whitening + j * D * D;
      const std::size_t start = records_.size();
      records_.push_back(c);
      for (int64_t r = 0; r < D; r++) records_.push_back(m[turned(mixture.transpose, D, r)]);
      for (int64_t r = 0; r < D; r++)
        for (int64_t t = 0; t <= r; t++)
          records_.push_back(mixture.transpose ? A[(D - 1 - t) * D + D - 1 - r] : A[r * D + t]);
      if (!std::isfinite(c)) fail("offsets", "finite or -inf", j);
      if (!all_finite(&records_[start + 1], D)) fail("centers", "finite", j);
      if (!all_finite(&records_[start + 1 + D], D * (D + 1) / 2)) fail("whitening", "finite", j);
      component_.push_back(j);
    }
    if (component_.empty())
      throw std::invalid_argument(
          "offsets are all -inf, so that every component is pruned; at least one must be finite");
  }
  PackedMixture<T> view() const {
    return {records_.data(), component_.data(), static_cast<int64_t>(component_.size()), dim_};
  }

 private:
  static void fail(const char* name, const char* condition, int64_t j) {
    throw std::invalid_argument(std::string(name) + " must be " + condition + ", but component " +
                                std::to_string(j) + " has a value that is not");
  }
  int64_t dim_;
  std::vector<T> records_;
  std::vector<int64_t> component_;
};

int threads_for(int threads, double pairs, int64_t dim) {
  return useful_threads(threads, pairs * (0.5 * dim * (dim + 3) + 20));
}

// Chunks of samples in lanes; remembers the first row that is not finite or whose density
// overflows.
template <class T>
class Chunks {
 public:
  Chunks(const Mixture<T>& mixture, Samples<T> samples, int chunk)
      : mixture_(mixture), samples_(samples), chunk_(chunk) {}

  int64_t number() const { return (samples_.count + chunk_ - 1) / chunk_; }
  int64_t first(int64_t k) const { return k * chunk_; }
  int count(int64_t k) const {
    return static_cast<int>(std::min<int64_t>(chunk_, samples_.count - first(k)));
  }

  // Returns the first row that is not finite, else kNone.
  int64_t load(int64_t k, T* lanes) const {
    const int64_t D = mixture_.dim;
    const int n = count(k);
    const T* z = samples_.z + first(k) * D;
    for (int64_t r = 0; r < D; r++) {
      T* row = lanes + r * chunk_;
      const int64_t source = turned(mixture_.transpose, D, r);
      for (int i = 0; i < n; i++) row[i] = z[i * D + source];
      for (int i = n; i < chunk_; i++) row[i] = row[n - 1];
    }
    if (all_finite(lanes, D * chunk_)) return kNone;
    for (int i = 0; i < n; i++)
      if (!all_finite(z + i * D, D)) return first(k) + i;
    return kNone;
  }

  // Fills [chunk] with this chunk's part of a [B] array; the filling is `rest`.
  void gather(int64_t k, const T* values, T rest, T* lanes) const {
    const int n = count(k);
    std::copy(values + first(k), values + first(k) + n, lanes);
    std::fill(lanes + n, lanes + chunk_, rest);
  }

  // The first row of which every l was cut off, else kNone.
  int64_t overflowed(int64_t k, const T* max) const {
    for (int i = 0; i < count(k); i++)
      if (!(max[i] > kLowestLogJoint<T>)) return first(k) + i;
    return kNone;
  }

 private:
  const Mixture<T>& mixture_;
  Samples<T> samples_;
  int chunk_;
};

struct Faults {
  explicit Faults(int threads) : not_finite(threads, kNone), overflow(threads, kNone) {}
  std::vector<int64_t> not_finite, overflow;  // first offending row, per thread
  void raise() const {
    const int64_t bad = *std::min_element(not_finite.begin(), not_finite.end());
    if (bad != kNone)
      throw std::invalid_argument("z must be finite, but row " + std::to_string(bad) +
                                  " has a NaN or infinite value");
    const int64_t far = *std::min_element(overflow.begin(), overflow.end());
    if (far != kNone)
      throw std::invalid_argument(
          "z must be near enough to a center for its log-density to be representable, but row " +
          std::to_string(far) + " is too far from all for its dtype");
  }
};

// The frame of the forward operations: body(chunks, k, z in lanes, scratch) for each chunk k; it
// returns the first row whose density overflowed, or kNone.
template <class T, class Body>
void for_each_chunk(const Mixture<T>& mixture, Samples<T> samples, const PackedMixture<T>& packed,
                    const Kernels<T>& kernel, int threads, Body body) {
  const Chunks<T> chunks(mixture, samples, kernel.chunk);
  threads = threads_for(threads, static_cast<double>(samples.count) * packed.size, mixture.dim);
  Faults faults(threads);
  // Allocated here: an exception must not leave a parallel region.
  const int64_t z_size = mixture.dim * kernel.chunk,
                scratch_size = kernel.scratch_size(mixture.dim);
  const auto z = make_buffer<T>(threads * z_size), scratch = make_buffer<T>(threads * scratch_size);
  parallel_ranges(chunks.number(), threads, [&](int thread, int64_t begin, int64_t end) {
    T* z_k = z.get() + thread * z_size;
    for (int64_t k = begin; k < end; k++) {
      const int64_t bad = chunks.load(k, z_k);
      faults.not_finite[thread] = std::min(faults.not_finite[thread], bad);
      if (bad != kNone) return;
      const int64_t far = body(chunks, k, z_k, scratch.get() + thread * scratch_size);
      faults.overflow[thread] = std::min(faults.overflow[thread], far);
    }
  });
  faults.raise();
}

// Sums over all samples, [size, statistics_size] in float64.
template <class T>
Buffer<double> accumulate(const Mixture<T>& mixture, Samples<T> samples,
                          const PackedMixture<T>& packed, const Kernels<T>& kernel, int threads,
                          const T* softmax, const T* grad_lse, const T* grad_expected, T* grad_z) {
  const Chunks<T> chunks(mixture, samples, kernel.chunk);
  const int64_t D = mixture.dim, size = packed.size * statistics_size(D);
  threads = threads_for(threads, 3.0 * samples.count * packed.size, D);
  // Threads share out either samples (each has sums of its own) or components (each has a grad_z of
  // its own): whichever needs less memory for the copies. Both are added up in the order of
  // threads.
  const bool over_components = size > samples.count * D && packed.size >= threads;
  threads = static_cast<int>(std::max<int64_t>(
      1, std::min<int64_t>(threads, over_components ? packed.size : chunks.number())));
  const int sum_copies = over_components ? 1 : threads;
  const int grad_copies = over_components && grad_z ? threads : 0;
  auto sums = make_buffer<double>(size * sum_copies);
  std::fill(sums.get(), sums.get() + size * sum_copies, 0.0);
  const int64_t grad_size = samples.count * D;
  auto grads = make_buffer<T>(grad_size * grad_copies);
  // Allocated here: an exception must not leave a parallel region.
  const int64_t chunk = kernel.chunk, B = samples.count;
  const int64_t buffer_size = (2 * D + 5) * chunk + kernel.scratch_size(D);
  const auto buffers = make_buffer<T>(threads * buffer_size);

  parallel_ranges(
      over_components ? packed.size : chunks.number(), threads,
      [&](int thread, int64_t begin, int64_t end) {
        T* z = buffers.get() + thread * buffer_size;
        T *grad = z + D * chunk, *rows = grad + D * chunk, *scratch = rows + 5 * chunk;
        T* target = grad_copies ? grads.get() + thread * grad_size : grad_z;
        double* sum = sums.get() + (over_components ? 0 : thread * size);
        const int64_t j_begin = over_components ? begin : 0,
                      j_end = over_components ? end : packed.size;
        const int64_t k_begin = over_components ? 0 : begin,
                      k_end = over_components ? chunks.number() : end;
        for (int64_t k = k_begin; k < k_end; k++) {
          chunks.load(k, z);
          const int n = chunks.count(k);
          const int64_t first = chunks.first(k), last = first + n - 1;
          // The filling repeats the last sample, with weights of zero.
          for (int row = 0; row < 3; row++)
            chunks.gather(k, softmax + row * B, softmax[row * B + last], rows + row * chunk);
          chunks.gather(k, grad_lse, T(0), rows + 3 * chunk);
          chunks.gather(k, grad_expected, T(0), rows + 4 * chunk);
          if (target) std::fill(grad, grad + D * chunk, T(0));
          kernel.backward(packed, j_begin, j_end, z, {rows, rows + chunk, rows + 2 * chunk},
                          rows + 3 * chunk, rows + 4 * chunk, sum, target ? grad : nullptr,
                          scratch);
          if (target)
            for (int64_t r = 0; r < D; r++)
              for (int i = 0; i < n; i++)
                target[(first + i) * D + turned(mixture.transpose, D, r)] = grad[r * chunk + i];
        }
      });

  for (int copy = 1; copy < sum_copies; copy++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[copy * size + i];
  if (grad_copies)
    for (int64_t i = 0; i < grad_size; i++) {
      T total = grads[i];
      for (int copy = 1; copy < grad_copies; copy++) total += grads[copy * grad_size + i];
      grad_z[i] = total;
    }
  return sums;
}

}  // namespace

template <class T>
void log_prob(const Mixture<T>& mixture, Samples<T> samples, int threads, T* lse, T* expected,
              T* softmax) {
  const Packed<T> packed(mixture);
  const Kernels<T>& kernel = kernels<T>();
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Chunks<T>& chunks, int64_t k, const T* z, T* scratch) {
                      Lanes<T> max, log_sum, gap;
                      kernel.log_prob(packed.view(), z, {max.data, log_sum.data, gap.data},
                                      scratch);
                      for (int i = 0; i < chunks.count(k); i++) {
                        const int64_t row = chunks.first(k) + i;
                        lse[row] = max.data[i] + log_sum.data[i];
                        expected[row] = max.data[i] + gap.data[i];
                        softmax[row] = max.data[i];
                        softmax[samples.count + row] = log_sum.data[i];
                        softmax[2 * samples.count + row] = gap.data[i];
                      }
                      return chunks.overflowed(k, max.data);
                    });
}

template <class T>
void log_prob_backward(const Mixture<T>& mixture, Samples<T> samples, int threads, const T* softmax,
                       const T* grad_lse, const T* grad_expected, T* grad_z, T* grad_centers,
                       T* grad_whitening, T* grad_offsets) {
  const Packed<T> packed(mixture);
  const PackedMixture<T> view = packed.view();
  const int64_t D = mixture.dim, J = mixture.num_components;
  const auto sums = accumulate<T>(mixture, samples, view, kernels<T>(), threads, softmax, grad_lse,
                                  grad_expected, grad_z);
  std::fill(grad_centers, grad_centers + J * D, T(0));
  std::fill(grad_whitening, grad_whitening + J * D * D, T(0));
  std::fill(grad_offsets, grad_offsets + J, T(0));
  std::vector<double> whitened(static_cast<std::size_t>(D)), M(static_cast<std::size_t>(D * D));
  for (int64_t j = 0; j < view.size; j++) {
    const double* N = sums.get() + j * statistics_size(D);
    const double* s = N + 1;
    const double* packed_M = s + D;
    const T* W = view.records + j * record_size(D) + 1 + D;
    const int64_t out = view.component[j];
    grad_offsets[out] = static_cast<T>(*N);
    for (int64_t r = 0; r < D; r++) {
      whitened[r] = 0;
      for (int64_t t = 0; t <= r; t++) {
        whitened[r] += static_cast<double>(W[r * (r + 1) / 2 + t]) * s[t];
        M[r * D + t] = M[t * D + r] = packed_M[r * (r + 1) / 2 + t];
      }
    }
    for (int64_t t = 0; t < D; t++) {
      double total = 0;
      for (int64_t r = t; r < D; r++)
        total += static_cast<double>(W[r * (r + 1) / 2 + t]) * whitened[r];
      grad_centers[out * D + turned(mixture.transpose, D, t)] = static_cast<T>(total);
    }
    T* grad_A = grad_whitening + out * D * D;
    for (int64_t r = 0; r < D; r++)
      for (int64_t t = 0; t <= r; t++) {
        double total = 0;
        for (int64_t u = 0; u <= r; u++)
          total -= static_cast<double>(W[r * (r + 1) / 2 + u]) * M[u * D + t];
        grad_A[mixture.transpose ? (D - 1 - t) * D + D - 1 - r : r * D + t] = static_cast<T>(total);
      }
  }
}

template <class T>
void statistics(const Mixture<T>& mixture, Samples<T> samples, int threads, T grad_lse,
                T grad_expected, double* N, double* s, double* M, double* totals) {
  const Packed<T> packed(mixture);
  const PackedMixture<T> view = packed.view();
  const int64_t D = mixture.dim, J = mixture.num_components, B = samples.count;
  const auto rows = make_buffer<T>(7 * B);
  T *lse = rows.get(), *expected = lse + B, *softmax = expected + B, *grads = softmax + 3 * B;
  log_prob<T>(mixture, samples, threads, lse, expected, softmax);
  totals[0] = std::accumulate(lse, lse + B, 0.0);
  totals[1] = std::accumulate(expected, expected + B, 0.0);
  std::fill(grads, grads + B, grad_lse);
  std::fill(grads + B, grads + 2 * B, grad_expected);
  const auto sums = accumulate<T>(mixture, samples, view, kernels<T>(), threads, softmax, grads,
                                  grads + B, nullptr);
  std::fill(N, N + J, 0.0);
  std::fill(s, s + J * D, 0.0);
  std::fill(M, M + J * D * D, 0.0);
  for (int64_t j = 0; j < view.size; j++) {
    const double* sum = sums.get() + j * statistics_size(D);
    const int64_t out = view.component[j];
    N[out] = *sum++;
    for (int64_t r = 0; r < D; r++) s[out * D + turned(mixture.transpose, D, r)] = *sum++;
    for (int64_t r = 0; r < D; r++)
      for (int64_t t = 0; t <= r; t++) {
        const int64_t row = turned(mixture.transpose, D, r),
                      column = turned(mixture.transpose, D, t);
        M[(out * D + row) * D + column] = M[(out * D + column) * D + row] = *sum++;
      }
  }
}

template <class T>
void statistics(const Mixture<T>& mixture, Samples<T> samples, int threads, T* N, T* s, T* M) {
  const int64_t D = mixture.dim, J = mixture.num_components, size = J * (1 + D + D * D);
  const auto sums = make_buffer<double>(size);
  double totals[2];
  statistics<T>(mixture, samples, threads, T(1), T(0), sums.get(), sums.get() + J,
                sums.get() + J * (1 + D), totals);
  std::transform(sums.get(), sums.get() + J, N, [](double x) { return static_cast<T>(x); });
  std::transform(sums.get() + J, sums.get() + J * (1 + D), s,
                 [](double x) { return static_cast<T>(x); });
  std::transform(sums.get() + J * (1 + D), sums.get() + size, M,
                 [](double x) { return static_cast<T>(x); });
}

template <class T>
void log_joint(const Mixture<T>& mixture, Samples<T> samples, int64_t group, int threads, T* out) {
  const Packed<T> packed(mixture);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t groups = mixture.num_components / group;
  std::fill(out, out + samples.count * groups, -std::numeric_limits<T>::infinity());
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Chunks<T>& chunks, int64_t k, const T* z, T* scratch) {
                      kernel.log_joint(packed.view(), group, groups, z, chunks.count(k),
                                       out + chunks.first(k) * groups, scratch);
                      return kNone;
                    });
}

template <class T>
void responsibilities(const Mixture<T>& mixture, Samples<T> samples, int64_t group, int threads,
                      T* out) {
  const Packed<T> packed(mixture);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t groups = mixture.num_components / group;
  std::fill(out, out + samples.count * groups, T(0));
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Chunks<T>& chunks, int64_t k, const T* z, T* scratch) {
                      Lanes<T> max, log_sum, gap;
                      const Softmax<T> softmax{max.data, log_sum.data, gap.data};
                      kernel.log_prob(packed.view(), z, softmax, scratch);
                      kernel.responsibilities(packed.view(), group, groups, z, softmax,
                                              chunks.count(k), out + chunks.first(k) * groups,
                                              scratch);
                      return chunks.overflowed(k, max.data);
                    });
}

template <class T>
void assign(const Mixture<T>& mixture, Samples<T> samples, int64_t group, int threads,
            int64_t* label, T* probability, T* entropy) {
  const Packed<T> packed(mixture);
  const Kernels<T>& kernel = kernels<T>();
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Chunks<T>& chunks, int64_t k, const T* z, T* scratch) {
                      Lanes<T> probability_k, entropy_k, max;
                      int64_t label_k[kMaxChunk<T>];
                      kernel.assign(packed.view(), group, z, label_k, probability_k.data,
                                    entropy_k.data, max.data, scratch);
                      const int n = chunks.count(k);
                      const int64_t first = chunks.first(k);
                      std::copy(label_k, label_k + n, label + first);
                      std::copy(probability_k.data, probability_k.data + n, probability + first);
                      std::copy(entropy_k.data, entropy_k.data + n, entropy + first);
                      return chunks.overflowed(k, max.data);
                    });
}

#define VMM_INSTANTIATE(T)                                                                         \
  template void log_prob<T>(const Mixture<T>&, Samples<T>, int, T*, T*, T*);                       \
  template void log_prob_backward<T>(const Mixture<T>&, Samples<T>, int, const T*, const T*,       \
                                     const T*, T*, T*, T*, T*);                                    \
  template void statistics<T>(const Mixture<T>&, Samples<T>, int, T*, T*, T*);                     \
  template void statistics<T>(const Mixture<T>&, Samples<T>, int, T, T, double*, double*, double*, \
                              double*);                                                            \
  template void log_joint<T>(const Mixture<T>&, Samples<T>, int64_t, int, T*);                     \
  template void responsibilities<T>(const Mixture<T>&, Samples<T>, int64_t, int, T*);              \
  template void assign<T>(const Mixture<T>&, Samples<T>, int64_t, int, int64_t*, T*, T*);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm
