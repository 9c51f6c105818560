// Where a mixture's numbers and samples lie while the kernels work on them: components packed into
// records, samples in tiles of SIMD lanes, shared out among threads. Part of csrc/mixture.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "finite.h"
#include "mixture.h"
#include "mixture_kernels.h"
#include "parallel.h"

namespace vmm {
namespace {

using std::int64_t;

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

// Components whose parts of grad_z are added up in T: of very many, most would be below the
// rounding error of their sum.
constexpr int64_t kGradientBlock = 256;

// One value per sample of a chunk, on the stack: no kernel's chunk is wider than 8 vectors of 64
// bytes.
template <class T>
constexpr int kMaxChunk = 8 * 64 / sizeof(T);
template <class T>
struct Lanes {
  alignas(64) T data[kMaxChunk<T>];
};

// Threads for moving so many numbers one by one.
int threads_to_move(int threads, int64_t numbers) {
  return useful_threads(threads, 16.0 * static_cast<double>(numbers));
}

// A^T form: with P the reversal of coordinates, |A^T d| = |(P A^T P) (P d)| and P A^T P is lower
// triangular again. Only packing, unpacking and z's transposition into lanes know of it.
int64_t turned(bool transpose, int64_t dim, int64_t r) { return transpose ? dim - 1 - r : r; }

// The numbers of a matrix of the user's, [D, D], by the row and column that the kernels give them.
template <class T>
class Turned {
 public:
  Turned(T* matrix, bool transpose, int64_t dim)
      : origin_(transpose ? matrix + dim * dim - 1 : matrix),
        row_(transpose ? -1 : dim),
        column_(transpose ? -dim : 1) {}
  T& operator()(int64_t r, int64_t t) const { return origin_[r * row_ + t * column_]; }

 private:
  T* origin_;
  int64_t row_, column_;
};

template <class T>
class Packed {
 public:
  Packed(const Mixture<T>& mixture, int threads) : dim_(mixture.dim) {
    check_log_weights("offsets", mixture.offsets, mixture.num_centers);
    for (int64_t j = 0; j < mixture.num_centers; j++)
      if (mixture.offsets[j] != -std::numeric_limits<T>::infinity()) component_.push_back(j);
    const auto size = static_cast<int64_t>(component_.size());
    const int64_t length = record_size(dim_);
    records_ = make_buffer<T>(size * length);
    threads = threads_to_move(threads, size * length);
    std::vector<int64_t> bad(static_cast<std::size_t>(threads), kNone);
    parallel_ranges(size, threads, [&](int thread, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && bad[thread] == kNone; i++)
        if (!pack(mixture, component_[i], records_.get() + i * length)) bad[thread] = i;
    });
    const int64_t first = *std::min_element(bad.begin(), bad.end());
    if (first != kNone) refuse(first);
  }
  PackedMixture<T> view() const {
    return {records_.get(), component_.data(), static_cast<int64_t>(component_.size()), dim_};
  }

 private:
  // Returns whether all is finite.
  bool pack(const Mixture<T>& mixture, int64_t j, T* record) const {
    const int64_t D = dim_;
    const T* m = mixture.centers + j * D;
    const Turned<const T> A(mixture.whitening + j * D * D, mixture.transpose, D);
    T* out = record;
    *out++ = mixture.offsets[j];
    for (int64_t r = 0; r < D; r++) *out++ = m[turned(mixture.transpose, D, r)];
    for (int64_t first = 0; first < D; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, D - first);
      for (int64_t t = 0; t < first; t++)
        for (int64_t r = 0; r < rows; r++) *out++ = A(first + r, t);
      for (int64_t t = 0; t < rows; t++)
        for (int64_t r = t; r < rows; r++) *out++ = A(first + r, first + t);
    }
    return all_finite(record, record_size(D));
  }
  [[noreturn]] void refuse(int64_t i) const {
    const T* record = records_.get() + i * record_size(dim_);
    const char* name = all_finite(record + 1, dim_) ? "whitening" : "centers";
    throw std::invalid_argument(std::string(name) + " must be finite, but row " +
                                std::to_string(component_[static_cast<std::size_t>(i)]) +
                                " has a NaN or infinite value");
  }
  int64_t dim_;
  Buffer<T> records_;
  std::vector<int64_t> component_;
};

int threads_for(int threads, double pairs, int64_t dim) {
  return useful_threads(threads, pairs * (0.5 * dim * (dim + 3) + 20));
}

// Cuts samples into tiles of `chunks` chunks and moves them into lanes and back.
template <class T>
class Tiles {
 public:
  Tiles(const Mixture<T>& mixture, Samples<T> samples, int chunk, int chunks)
      : mixture_(mixture), samples_(samples), chunk_(chunk), size_(chunk * chunks) {}

  int size() const { return size_; }
  int64_t number() const { return (samples_.count + size_ - 1) / size_; }
  int64_t first(int64_t k) const { return k * size_; }
  int count(int64_t k) const {
    return static_cast<int>(std::min<int64_t>(size_, samples_.count - first(k)));
  }

  // Returns the first row that is not finite, else kNone.
  int64_t load(int64_t k, T* lanes) const {
    const int64_t D = mixture_.dim;
    const T* z = samples_.z + first(k) * D;
    for (int begin = 0; begin < count(k); begin += chunk_, lanes += D * chunk_, z += chunk_ * D) {
      const int n = std::min(chunk_, count(k) - begin);
      for (int64_t r = 0; r < D; r++) {
        T* row = lanes + r * chunk_;
        const int64_t source = turned(mixture_.transpose, D, r);
        for (int i = 0; i < n; i++) row[i] = z[i * D + source];
        for (int i = n; i < chunk_; i++) row[i] = row[n - 1];
      }
      if (all_finite(lanes, D * chunk_)) continue;
      for (int i = 0; i < n; i++)
        if (!all_finite(z + i * D, D)) return first(k) + begin + i;
    }
    return kNone;
  }

  // The tile by rows, [count][stride], filled up with zeros.
  void load_rows(int64_t k, int64_t stride, T* rows) const {
    const int64_t D = mixture_.dim;
    const T* z = samples_.z + first(k) * D;
    for (int i = 0; i < count(k); i++, rows += stride, z += D) {
      for (int64_t r = 0; r < D; r++) rows[r] = z[turned(mixture_.transpose, D, r)];
      std::fill(rows + D, rows + stride, T(0));
    }
  }

  // The way back: rows of `target` [B, D] from the sum of a tile in lanes and one by rows.
  void store(int64_t k, const double* lanes, const double* rows, int64_t stride, T* target) const {
    const int64_t D = mixture_.dim;
    target += first(k) * D;
    for (int begin = 0; begin < count(k); begin += chunk_, lanes += D * chunk_)
      for (int i = 0; i < std::min(chunk_, count(k) - begin); i++, target += D, rows += stride)
        for (int64_t r = 0; r < D; r++)
          target[turned(mixture_.transpose, D, r)] =
              static_cast<T>(lanes[r * chunk_ + i] + rows[r]);
  }

  // Fills [size] with this tile's part of a [B] array; the filling is `rest`, as is all for null.
  void gather(int64_t k, const T* values, T rest, T* lanes) const {
    T* end = values ? std::copy_n(values + first(k), count(k), lanes) : lanes;
    std::fill(end, lanes + size_, rest);
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
  int chunk_, size_;
};

// So many chunks a tile that every thread has a tile.
int tile_chunks(int64_t count, int chunk, int threads, int limit) {
  const int64_t per_thread = (count + int64_t{chunk} * threads - 1) / (int64_t{chunk} * threads);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(limit, per_thread)));
}

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

// The frame of the forward operations: body(thread, k, z in lanes, scratch) for each tile k; it
// returns the first row whose density overflowed, or kNone.
template <class T, class Body>
void for_each_tile(const Tiles<T>& tiles, const Mixture<T>& mixture, const Kernels<T>& kernel,
                   int threads, Body body) {
  Faults faults(threads);
  // Allocated here: an exception must not leave a parallel region.
  const int64_t z_size = mixture.dim * tiles.size(),
                scratch_size = kernel.scratch_size(mixture.dim);
  const auto z = make_buffer<T>(threads * z_size), scratch = make_buffer<T>(threads * scratch_size);
  parallel_ranges(tiles.number(), threads, [&](int thread, int64_t begin, int64_t end) {
    T* z_k = z.get() + thread * z_size;
    for (int64_t k = begin; k < end; k++) {
      const int64_t bad = tiles.load(k, z_k);
      faults.not_finite[thread] = std::min(faults.not_finite[thread], bad);
      if (bad != kNone) return;
      const int64_t far = body(thread, k, z_k, scratch.get() + thread * scratch_size);
      faults.overflow[thread] = std::min(faults.overflow[thread], far);
    }
  });
  faults.raise();
}

}  // namespace
}  // namespace vmm
