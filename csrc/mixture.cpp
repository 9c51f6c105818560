// Everything around the kernels: threads, and turning sums into gradients.
#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "instruction_set.h"
#include "mixture_tiles.h"

namespace vmm {
namespace {

// Adds up the threads' copies of sums [size], in the order of threads, into the first.
template <class T>
void add_copies(T* sums, int64_t size, int copies) {
  for (int copy = 1; copy < copies; copy++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[copy * size + i];
}

// What a backward pass needs of a tile besides its lanes, and its part of grad_z.
template <class T>
class TileRows {
 public:
  TileRows(int64_t dim, int64_t stride, int64_t size, bool with_grad)
      : lanes_size_(with_grad ? dim * size : 0),
        rows_size_(with_grad ? stride * size : 0),
        rows_(make_buffer<T>(stride * size)),
        grad_(make_buffer<T>(lanes_size_ + rows_size_)),
        total_(make_buffer<double>(lanes_size_ + rows_size_)) {}

  T* rows() const { return rows_.get(); }
  T* grad_lanes() const { return lanes_size_ ? grad_.get() : nullptr; }
  T* grad_rows() const { return lanes_size_ ? grad_.get() + lanes_size_ : nullptr; }
  const double* total_lanes() const { return total_.get(); }
  const double* total_rows() const { return total_.get() + lanes_size_; }
  void clear_total() { std::fill_n(total_.get(), lanes_size_ + rows_size_, 0.0); }
  void clear_grad() { std::fill_n(grad_.get(), lanes_size_ + rows_size_, T(0)); }
  void add_grad() {
    for (int64_t i = 0; i < lanes_size_ + rows_size_; i++) total_[i] += grad_[i];
  }

 private:
  int64_t lanes_size_, rows_size_;
  Buffer<T> rows_, grad_;
  Buffer<double> total_;
};

// l of all pairs, [packed.size][stride], kept from a forward pass for the sums; or null.
template <class T>
struct LogJoint {
  T* values = nullptr;
  int64_t stride = 0;
};

// So many bytes of l stay in the caches between two passes; and so many, at most, does a thread
// keep, where one chunk of very many components is more.
constexpr int64_t kKeptBytes = 1 << 21, kMostKeptBytes = 1 << 23;

// Threads share out either samples (each has sums of its own) or components (each has a grad_z of
// its own): whichever needs less memory for the copies. Both are added up in the order of threads.
bool over_components(int64_t samples, int64_t components, int64_t dim, int threads) {
  return components * statistics_size(dim) > samples * dim && components >= threads;
}

// Sums over all samples, [size, sums_length] in float64, and grad_z.
template <class T>
Buffer<double> accumulate(const Mixture<T>& mixture, Samples<T> samples,
                          const PackedMixture<T>& packed, const Kernels<T>& kernel, int threads,
                          const T* softmax, const T* grad_lse, const T* grad_expected,
                          LogJoint<T> log_joint, bool slopes, T* grad_z) {
  const int64_t D = mixture.dim, B = samples.count, length = sums_length(D, slopes),
                size = packed.size * length;
  threads = threads_for(threads, 3.0 * B * packed.size, D);
  const bool by_component = over_components(B, packed.size, D, threads);
  const Tiles<T> tiles(mixture, samples, kernel.chunk,
                       tile_chunks(B, kernel.chunk, by_component ? 1 : threads, kTile));
  threads = static_cast<int>(std::max<int64_t>(
      1, std::min<int64_t>(threads, by_component ? packed.size : tiles.number())));
  const int sum_copies = by_component ? 1 : threads;
  const int grad_copies = by_component && grad_z && threads > 1 ? threads : 0;
  auto sums = make_buffer<double>(size * sum_copies);
  auto grads = make_buffer<T>(B * D * grad_copies);
  // Allocated here: an exception must not leave a parallel region.
  const int64_t tile = tiles.size(), stride = kernel.row_stride(D);
  const int64_t buffer_size = (D + 5) * tile + kernel.scratch_size(D);
  const auto buffers = make_buffer<T>(threads * buffer_size);
  std::vector<TileRows<T>> all_rows;
  for (int thread = 0; thread < threads; thread++)
    all_rows.emplace_back(D, stride, tile, grad_z != nullptr);

  parallel_ranges(
      by_component ? packed.size : tiles.number(), threads,
      [&](int thread, int64_t begin, int64_t end) {
        T* z = buffers.get() + thread * buffer_size;
        T *per_sample = z + D * tile, *scratch = per_sample + 5 * tile;
        TileRows<T>& rows = all_rows[thread];
        T* target = grad_copies ? grads.get() + thread * B * D : grad_z;
        const int64_t j_begin = by_component ? begin : 0, j_end = by_component ? end : packed.size;
        const int64_t k_begin = by_component ? 0 : begin,
                      k_end = by_component ? tiles.number() : end;
        double* sum = sums.get() + (by_component ? 0 : thread * size);
        std::fill(sum + j_begin * length, sum + j_end * length, 0.0);
        for (int64_t k = k_begin; k < k_end; k++) {
          tiles.load(k, z);
          tiles.load_rows(k, stride, rows.rows());
          const int64_t last = tiles.first(k) + tiles.count(k) - 1;
          // The filling repeats the last sample, with weights of zero.
          for (int row = 0; row < 3; row++)
            tiles.gather(k, softmax + row * B, softmax[row * B + last], per_sample + row * tile);
          tiles.gather(k, grad_lse, T(0), per_sample + 3 * tile);
          tiles.gather(k, grad_expected, T(0), per_sample + 4 * tile);
          const WeightedTile<T> weighted{
              z,
              rows.rows(),
              tiles.count(k),
              {per_sample, per_sample + tile, per_sample + 2 * tile},
              per_sample + 3 * tile,
              per_sample + 4 * tile,
              log_joint.values ? log_joint.values + tiles.first(k) : nullptr,
              log_joint.stride};
          rows.clear_total();
          for (int64_t j = j_begin; j < j_end; j += kGradientBlock) {
            rows.clear_grad();
            kernel.backward(packed, j, std::min(j + kGradientBlock, j_end), weighted,
                            {sum, slopes, rows.grad_lanes(), rows.grad_rows()}, scratch);
            rows.add_grad();
          }
          if (target) tiles.store(k, rows.total_lanes(), rows.total_rows(), stride, target);
        }
      });

  add_copies(sums.get(), size, sum_copies);
  if (grad_copies) {
    add_copies(grads.get(), B * D, grad_copies);
    std::copy(grads.get(), grads.get() + B * D, grad_z);
  }
  return sums;
}

// The same sums without a softmax from before, for gradients that are the same for all samples:
// each tile's l is kept between its log-sum-exp and its sums. Threads share out samples.
template <class T>
Buffer<double> accumulate_at_once(const Mixture<T>& mixture, Samples<T> samples,
                                  const PackedMixture<T>& packed, const Kernels<T>& kernel,
                                  int threads, T grad_lse, T grad_expected, bool slopes,
                                  double* totals) {
  const int64_t D = mixture.dim, B = samples.count, size = packed.size * sums_length(D, slopes);
  const int64_t chunk_bytes = packed.size * kernel.chunk * static_cast<int64_t>(sizeof(T));
  const int limit =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(kTile, kKeptBytes / chunk_bytes)));
  const Tiles<T> tiles(mixture, samples, kernel.chunk,
                       tile_chunks(B, kernel.chunk, threads, limit));
  auto sums = make_buffer<double>((size + 2) * threads);
  std::fill(sums.get(), sums.get() + (size + 2) * threads, 0.0);
  const int64_t tile = tiles.size(), stride = kernel.row_stride(D);
  const int64_t buffer_size = (5 + packed.size + stride) * tile;
  const auto buffers = make_buffer<T>(threads * buffer_size);
  for_each_tile<T>(
      tiles, mixture, kernel, threads, [&](int thread, int64_t k, const T* z, T* scratch) {
        T *max = buffers.get() + thread * buffer_size, *log_sum = max + tile, *gap = log_sum + tile;
        T *lse_weights = gap + tile, *expected_weights = lse_weights + tile,
          *rows = expected_weights + tile, *log_joint = rows + stride * tile;
        double* sum = sums.get() + thread * (size + 2);
        const int n = tiles.count(k);
        kernel.log_prob(packed, z, n, {max, log_sum, gap}, log_joint, tile, scratch);
        std::fill(lse_weights, lse_weights + 2 * tile, T(0));
        for (int i = 0; i < n; i++) {
          const T v = samples.weights ? samples.weights[tiles.first(k) + i] : T(1);
          sum[size] += v * (static_cast<double>(max[i]) + log_sum[i]);
          sum[size + 1] += v * (static_cast<double>(max[i]) + gap[i]);
          lse_weights[i] = v * grad_lse;
          expected_weights[i] = v * grad_expected;
        }
        tiles.load_rows(k, stride, rows);
        const WeightedTile<T> weighted{
            z, rows, n, {max, log_sum, gap}, lse_weights, expected_weights, log_joint, tile};
        kernel.backward(packed, 0, packed.size, weighted, {sum, slopes, nullptr, nullptr}, scratch);
        return tiles.overflowed(k, max);
      });
  add_copies(sums.get(), size + 2, threads);
  totals[0] = sums[size];
  totals[1] = sums[size + 1];
  return sums;
}

template <class T>
void forward(const Mixture<T>& mixture, Samples<T> samples, const PackedMixture<T>& packed,
             const Kernels<T>& kernel, int threads, T* lse, T* expected, T* softmax,
             LogJoint<T> log_joint) {
  const int64_t B = samples.count;
  threads = threads_for(threads, static_cast<double>(B) * packed.size, mixture.dim);
  const Tiles<T> tiles(mixture, samples, kernel.chunk,
                       tile_chunks(B, kernel.chunk, threads, kTile));
  const int64_t tile = tiles.size();
  const auto rows = make_buffer<T>(threads * 3 * tile);
  for_each_tile<T>(
      tiles, mixture, kernel, threads, [&](int thread, int64_t k, const T* z, T* scratch) {
        T *max = rows.get() + thread * 3 * tile, *log_sum = max + tile, *gap = log_sum + tile;
        const int n = tiles.count(k);
        const int64_t first = tiles.first(k);
        kernel.log_prob(packed, z, n, {max, log_sum, gap},
                        log_joint.values ? log_joint.values + first : nullptr, log_joint.stride,
                        scratch);
        for (int i = 0; i < n; i++) {
          lse[first + i] = max[i] + log_sum[i];
          expected[first + i] = max[i] + gap[i];
        }
        std::copy(max, max + n, softmax + first);
        std::copy(log_sum, log_sum + n, softmax + B + first);
        std::copy(gap, gap + n, softmax + 2 * B + first);
        return tiles.overflowed(k, max);
      });
}

// Whether float32 holds sums of squared distances: they overflow from distances of 1e19 on, and
// vanish below 1e-19, although gradients, distances times what they are whitened to, are ordinary
// numbers. Distances are about what the whitening matrices divide by.
bool holds(const Mixture<float>& mixture, const double* sums, int64_t size) {
  constexpr float kLeast = 1e-15f, kMost = 1e15f;
  for (int64_t j = 0; j < mixture.num_centers; j++) {
    if (mixture.offsets[j] == -std::numeric_limits<float>::infinity()) continue;
    const float* A = mixture.whitening + j * mixture.dim * mixture.dim;
    for (int64_t r = 0; r < mixture.dim; r++) {
      const float scale = std::abs(A[r * (mixture.dim + 1)]);
      if (!(scale >= kLeast && scale <= kMost)) return false;
    }
  }
  return all_finite(sums, size);
}

// The same problem in float64.
struct Widened {
  Widened(const Mixture<float>& m, Samples<float> s)
      : centers(copy(m.centers, m.num_centers * m.dim)),
        whitening(copy(m.whitening, m.num_centers * m.dim * m.dim)),
        offsets(copy(m.offsets, m.num_centers)),
        z(copy(s.z, s.count * m.dim)),
        weights(copy(s.weights, s.count)),
        mixture{centers.get(), whitening.get(), offsets.get(), m.num_centers, m.dim, m.transpose},
        samples{z.get(), s.count, s.weights ? weights.get() : nullptr} {}
  static Buffer<double> copy(const float* values, int64_t size) {
    auto wide = make_buffer<double>(values ? size : 0);
    if (values) std::copy(values, values + size, wide.get());
    return wide;
  }
  Buffer<double> centers, whitening, offsets, z, weights;
  Mixture<double> mixture;
  Samples<double> samples;
};

// What accumulate() gives, in float64 throughout.
Buffer<double> accumulate_widened(const Mixture<float>& mixture, Samples<float> samples,
                                  int threads, const float* grad_lse, const float* grad_expected) {
  const Widened wide(mixture, samples);
  const int64_t B = samples.count;
  const Packed<double> packed(wide.mixture, threads);
  const auto& kernel = current_kernels<Kernels<double>>();
  const auto rows = make_buffer<double>(5 * B);
  double *lse = rows.get(), *expected = lse + B, *softmax = expected + B;
  forward<double>(wide.mixture, wide.samples, packed.view(), kernel, threads, lse, expected,
                  softmax, {});
  const auto lse_weights = Widened::copy(grad_lse, B),
             expected_weights = Widened::copy(grad_expected, B);
  return accumulate<double>(wide.mixture, wide.samples, packed.view(), kernel, threads, softmax,
                            grad_lse ? lse_weights.get() : nullptr,
                            grad_expected ? expected_weights.get() : nullptr, {}, false, nullptr);
}

}  // namespace

template <class T>
void log_prob(const Mixture<T>& mixture, Samples<T> samples, int threads, T* lse, T* expected,
              T* softmax) {
  const Packed<T> packed(mixture, threads);
  forward<T>(mixture, samples, packed.view(), current_kernels<Kernels<T>>(), threads, lse, expected,
             softmax, {});
}

template <class T>
void log_prob_backward(const Mixture<T>& mixture, Samples<T> samples, int threads, const T* softmax,
                       const T* grad_lse, const T* grad_expected, T* grad_z, T* grad_centers,
                       T* grad_whitening, T* grad_offsets) {
  const Packed<T> packed(mixture, threads);
  const PackedMixture<T> view = packed.view();
  const auto& kernel = current_kernels<Kernels<T>>();
  const int64_t D = mixture.dim, J = mixture.num_centers;
  auto sums = accumulate<T>(mixture, samples, view, kernel, threads, softmax, grad_lse,
                            grad_expected, {}, false, grad_z);
  if constexpr (std::is_same_v<T, float>)
    if (!holds(mixture, sums.get(), view.size * statistics_size(D)))
      sums = accumulate_widened(mixture, samples, threads, grad_lse, grad_expected);
  if (view.size < J) {
    std::fill(grad_centers, grad_centers + J * D, T(0));
    std::fill(grad_whitening, grad_whitening + J * D * D, T(0));
    std::fill(grad_offsets, grad_offsets + J, T(0));
  }
  threads = useful_threads(threads, static_cast<double>(view.size) * D * D * (D + 12) / 3);
  const int64_t row = kernel.gradients_stride(D), gradient_size = 2 * (D + 1) * row;
  const auto gradients = make_buffer<double>(threads * gradient_size);
  parallel_ranges(view.size, threads, [&](int thread, int64_t begin, int64_t end) {
    double* center = gradients.get() + thread * gradient_size;
    double *whitening = center + row, *scratch = whitening + D * row;
    for (int64_t j = begin; j < end; j++) {
      const double* sum = sums.get() + j * statistics_size(D);
      kernel.gradients(view, j, sum, center, whitening, scratch);
      const int64_t out = view.component[j];
      grad_offsets[out] = static_cast<T>(*sum);
      T* m = grad_centers + out * D;
      const Turned<T> A(grad_whitening + out * D * D, mixture.transpose, D);
      for (int64_t r = 0; r < D; r++) {
        m[turned(mixture.transpose, D, r)] = static_cast<T>(center[r]);
        for (int64_t t = 0; t <= r; t++) A(r, t) = static_cast<T>(whitening[r * row + t]);
        for (int64_t t = r + 1; t < D; t++) A(r, t) = T(0);
      }
    }
  });
}

namespace {

// sum_r log s_rr, one logarithm for as many factors as double can hold; NaN unless all are positive
// and finite.
template <class T>
double log_determinant(const T* diagonal, int64_t dim, int64_t stride) {
  constexpr int64_t kFactors = sizeof(T) == 4 ? 7 : 1;
  double total = 0;
  for (int64_t begin = 0; begin < dim; begin += kFactors) {
    double product = 1;
    for (int64_t r = begin; r < std::min(dim, begin + kFactors); r++) {
      const T s = diagonal[r * stride];
      product *= s > 0 && is_finite(s) ? s : std::numeric_limits<double>::quiet_NaN();
    }
    total += std::log(product);
  }
  return total;
}

template <class T>
const T* diagonal_of(Posteriors<T> posteriors, int64_t dim, int64_t i) {
  return posteriors.scale + i * (posteriors.full_scale ? dim * dim : dim);
}

}  // namespace

template <class T>
void kl(const Mixture<T>& mixture, Samples<T> samples, Posteriors<T> posteriors, int threads, T* kl,
        T* softmax) {
  constexpr double kHalfLog2PiE = 1.41893853320467274178;
  const int64_t D = mixture.dim, stride = posteriors.full_scale ? D + 1 : 1;
  const auto expected = make_buffer<T>(samples.count);
  log_prob<T>(mixture, samples, threads, kl, expected.get(), softmax);
  for (int64_t i = 0; i < samples.count; i++) {
    const double entropy =
        log_determinant(diagonal_of(posteriors, D, i), D, stride) + D * kHalfLog2PiE;
    if (std::isnan(entropy))
      throw std::invalid_argument("q must be finite with a positive scale, but row " +
                                  std::to_string(i) + " is not");
    kl[i] = static_cast<T>(-entropy - kl[i]);
  }
}

template <class T>
void kl_backward(const Mixture<T>& mixture, Samples<T> samples, Posteriors<T> posteriors,
                 int threads, const T* softmax, const T* grad_kl, T* grad_z, T* grad_scale,
                 T* grad_centers, T* grad_whitening, T* grad_offsets) {
  const int64_t D = mixture.dim, B = samples.count;
  const int64_t size = posteriors.full_scale ? D * D : D,
                stride = posteriors.full_scale ? D + 1 : 1;
  const auto upstream = make_buffer<T>(B);
  std::fill(grad_scale, grad_scale + B * size, T(0));
  for (int64_t i = 0; i < B; i++) {
    upstream[i] = -grad_kl[i];
    const T* diagonal = diagonal_of(posteriors, D, i);
    for (int64_t r = 0; r < D; r++)
      grad_scale[i * size + r * stride] = -grad_kl[i] / diagonal[r * stride];
  }
  log_prob_backward<T>(mixture, samples, threads, softmax, upstream.get(), nullptr, grad_z,
                       grad_centers, grad_whitening, grad_offsets);
}

template <class T, class Out>
void statistics(const Mixture<T>& mixture, Samples<T> samples, int threads, T grad_lse,
                T grad_expected, Out* N, Out* s, Out* M, double* totals, Out* slope_N,
                Out* slope_s) {
  // Samples are passed over once, and each thread has sums of its own, unless these are more bytes,
  // or so few samples lie in so many threads that sharing out components is less work.
  constexpr double kCopiedBytes = 1 << 28;
  const Packed<T> packed(mixture, threads);
  const PackedMixture<T> view = packed.view();
  const auto& kernel = current_kernels<Kernels<T>>();
  const int64_t D = mixture.dim, J = mixture.num_centers, B = samples.count;
  const int useful = threads_for(threads, 2.0 * B * view.size, D);
  const int64_t stride = (B + kernel.chunk - 1) / kernel.chunk * kernel.chunk;
  const bool slopes = slope_N != nullptr;
  const auto size = static_cast<double>(view.size * sums_length(D, slopes));
  const bool kept = view.size * stride * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
  Buffer<double> sums;
  const int64_t chunk_bytes = view.size * kernel.chunk * static_cast<int64_t>(sizeof(T));
  const bool shared_out = useful > 1 && kept && over_components(B, view.size, D, useful);
  if (!shared_out && chunk_bytes <= kMostKeptBytes &&
      (useful == 1 || 8.0 * useful * size < kCopiedBytes)) {
    sums = accumulate_at_once<T>(mixture, samples, view, kernel, useful, grad_lse, grad_expected,
                                 slopes, totals);
  } else {
    const auto rows = make_buffer<T>(7 * B), values = make_buffer<T>(kept ? view.size * stride : 0);
    const LogJoint<T> log_joint{kept ? values.get() : nullptr, stride};
    T *lse = rows.get(), *expected = lse + B, *softmax = expected + B, *grads = softmax + 3 * B;
    forward<T>(mixture, samples, view, kernel, threads, lse, expected, softmax, log_joint);
    totals[0] = totals[1] = 0;
    for (int64_t i = 0; i < B; i++) {
      const T v = samples.weights ? samples.weights[i] : T(1);
      totals[0] += static_cast<double>(v) * lse[i];
      totals[1] += static_cast<double>(v) * expected[i];
      grads[i] = v * grad_lse;
      grads[B + i] = v * grad_expected;
    }
    sums = accumulate<T>(mixture, samples, view, kernel, threads, softmax, grads, grads + B,
                         log_joint, slopes, nullptr);
  }
  if constexpr (std::is_same_v<T, float>)
    if (!holds(mixture, sums.get(), view.size * sums_length(D, slopes))) {
      const Widened wide(mixture, samples);
      return statistics<double, Out>(wide.mixture, wide.samples, threads, grad_lse, grad_expected,
                                     N, s, M, totals, slope_N, slope_s);
    }
  if (view.size < J) {
    std::fill(N, N + J, Out(0));
    std::fill(s, s + J * D, Out(0));
    std::fill(M, M + J * D * D, Out(0));
    if (slopes) {
      std::fill(slope_N, slope_N + J, Out(0));
      std::fill(slope_s, slope_s + J * D, Out(0));
    }
  }
  const auto unpack_moments = [&](const double* sum, int64_t j, Out* N, Out* s) {
    N[j] = static_cast<Out>(*sum++);
    for (int64_t r = 0; r < D; r++)
      s[j * D + turned(mixture.transpose, D, r)] = static_cast<Out>(*sum++);
  };
  parallel_ranges(view.size, threads_to_move(threads, view.size * D * D),
                  [&](int, int64_t begin, int64_t end) {
                    for (int64_t j = begin; j < end; j++) {
                      const double* sum = sums.get() + j * sums_length(D, slopes);
                      const int64_t out = view.component[j];
                      unpack_moments(sum, out, N, s);
                      if (slopes) unpack_moments(sum + statistics_size(D), out, slope_N, slope_s);
                      sum += 1 + D;
                      const Turned<Out> M_j(M + out * D * D, mixture.transpose, D);
                      for (int64_t r = 0; r < D; r++)
                        for (int64_t t = 0; t <= r; t++)
                          M_j(r, t) = M_j(t, r) = static_cast<Out>(*sum++);
                    }
                  });
}

template <class T>
void statistics(const Mixture<T>& mixture, Samples<T> samples, int threads, T* N, T* s, T* M) {
  double totals[2];
  statistics<T, T>(mixture, samples, threads, T(1), T(0), N, s, M, totals, nullptr, nullptr);
}

// The operations below go chunk by chunk.
template <class T, class Body>
void for_each_chunk(const Mixture<T>& mixture, Samples<T> samples, const PackedMixture<T>& packed,
                    const Kernels<T>& kernel, int threads, Body body) {
  threads = threads_for(threads, static_cast<double>(samples.count) * packed.size, mixture.dim);
  const Tiles<T> chunks(mixture, samples, kernel.chunk, 1);
  for_each_tile<T>(chunks, mixture, kernel, threads, [&](int, int64_t k, const T* z, T* scratch) {
    return body(chunks, k, z, scratch);
  });
}

template <class T>
void log_joint(const Mixture<T>& mixture, Samples<T> samples, int64_t group, int threads, T* out) {
  const Packed<T> packed(mixture, threads);
  const auto& kernel = current_kernels<Kernels<T>>();
  const int64_t groups = mixture.num_centers / group;
  std::fill(out, out + samples.count * groups, -std::numeric_limits<T>::infinity());
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Tiles<T>& chunks, int64_t k, const T* z, T* scratch) {
                      const T* row = out + chunks.first(k) * groups;
                      kernel.log_joint(packed.view(), group, groups, z, chunks.count(k),
                                       out + chunks.first(k) * groups, scratch);
                      Lanes<T> max;
                      for (int i = 0; i < chunks.count(k); i++, row += groups)
                        max.data[i] = *std::max_element(row, row + groups);
                      return chunks.overflowed(k, max.data);
                    });
}

template <class T>
void responsibilities(const Mixture<T>& mixture, Samples<T> samples, int64_t group, int threads,
                      T* out) {
  const Packed<T> packed(mixture, threads);
  const auto& kernel = current_kernels<Kernels<T>>();
  const int64_t groups = mixture.num_centers / group;
  std::fill(out, out + samples.count * groups, T(0));
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Tiles<T>& chunks, int64_t k, const T* z, T* scratch) {
                      Lanes<T> max, log_sum, gap;
                      const Softmax<T> softmax{max.data, log_sum.data, gap.data};
                      const int n = chunks.count(k);
                      kernel.log_prob(packed.view(), z, n, softmax, nullptr, 0, scratch);
                      kernel.responsibilities(packed.view(), group, groups, z, softmax, n,
                                              out + chunks.first(k) * groups, scratch);
                      return chunks.overflowed(k, max.data);
                    });
}

template <class T>
void assign(const Mixture<T>& mixture, Samples<T> samples, int64_t group, int threads,
            int64_t* label, T* probability, T* entropy) {
  const Packed<T> packed(mixture, threads);
  const auto& kernel = current_kernels<Kernels<T>>();
  for_each_chunk<T>(mixture, samples, packed.view(), kernel, threads,
                    [&](const Tiles<T>& chunks, int64_t k, const T* z, T* scratch) {
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

#define VMM_INSTANTIATE(T)                                                                        \
  template void kl<T>(const Mixture<T>&, Samples<T>, Posteriors<T>, int, T*, T*);                 \
  template void kl_backward<T>(const Mixture<T>&, Samples<T>, Posteriors<T>, int, const T*,       \
                               const T*, T*, T*, T*, T*, T*);                                     \
  template void log_prob<T>(const Mixture<T>&, Samples<T>, int, T*, T*, T*);                      \
  template void log_prob_backward<T>(const Mixture<T>&, Samples<T>, int, const T*, const T*,      \
                                     const T*, T*, T*, T*, T*);                                   \
  template void statistics<T>(const Mixture<T>&, Samples<T>, int, T*, T*, T*);                    \
  template void statistics<T, double>(const Mixture<T>&, Samples<T>, int, T, T, double*, double*, \
                                      double*, double*, double*, double*);                        \
  template void log_joint<T>(const Mixture<T>&, Samples<T>, int64_t, int, T*);                    \
  template void responsibilities<T>(const Mixture<T>&, Samples<T>, int64_t, int, T*);             \
  template void assign<T>(const Mixture<T>&, Samples<T>, int64_t, int, int64_t*, T*, T*);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm
