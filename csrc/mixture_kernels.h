// The interface between csrc/mixture.cpp and the kernels, whose source (mixture_kernels.cpp) is
// compiled once per instruction set.
//
// Samples are processed in chunks of `chunk`, one per SIMD lane: a chunk of z is [D][chunk], a
// value per sample is [chunk]. A last, partial chunk is filled up with copies of its last sample. A
// tile is a few consecutive chunks with `count` samples in all. Components are the outer loop over
// a tile, so that a component's numbers stay in the cache.
#pragma once

#include <cstdint>

namespace vmm {

// The components with a finite offset, each one record
//   offset, m_0 .. m_{D-1}, W's lower triangle
// so that l_ij = offset_j - 1/2 |W_j (z_i - m_j)|^2. The triangle lies in blocks of kRows rows, by
// columns within a block, which is the order in which W is multiplied.
template <class T>
struct PackedMixture {
  const T* records;
  const std::int64_t* component;  // [size] index j of each record among all J components
  std::int64_t size;
  std::int64_t dim;
};

// Length of a record, and of a component's sums. Internal linkage, here and below: this header is
// compiled once per instruction set and the linker must not mix the copies.
static inline std::int64_t record_size(std::int64_t dim) { return 1 + dim + dim * (dim + 1) / 2; }

constexpr int kRows = 4;

// Where the block that begins with row r starts, and where W_rt lies (t <= r).
static constexpr std::int64_t packed_row(std::int64_t r) { return r * (r + 1) / 2; }
static constexpr std::int64_t packed_index(std::int64_t dim, std::int64_t r, std::int64_t t) {
  const std::int64_t first = r / kRows * kRows;
  const std::int64_t rows = dim - first < kRows ? dim - first : kRows;
  if (t < first) return packed_row(first) + t * rows + r - first;
  const std::int64_t column = t - first;  // has column rows less than the first
  return packed_row(first) + t * rows - column * (column - 1) / 2 + r - t;
}

// Sums over samples of one component's pair weights w and d = z - m: N, s [D], and M's lower
// triangle [D (D + 1) / 2] by rows, in float64: a tile's sums are added to the running ones once
// per tile.
static inline std::int64_t statistics_size(std::int64_t dim) { return record_size(dim); }

// Length of its sums where `slopes` are wanted as well, for grad_lse = 1 and grad_expected = 0
// alone: behind N, s and M lie N and s once more with the weights q_j (1 + l_j - expected), which
// are the gradient of expected.
static inline std::int64_t sums_length(std::int64_t dim, bool slopes) {
  return statistics_size(dim) + (slopes ? 1 + dim : 0);
}

// What the online log-sum-exp of a tile leaves, [chunks * chunk] each:
//   lse = max + log_sum,   expected = max + gap
// Kept apart, since adding them rounds to the magnitude of max: exp(l - lse) would lose in float32
// what exp((l - max) - log_sum) keeps.
template <class T>
struct Softmax {
  T* max;
  T* log_sum;
  T* gap;
};

// What a tile's sums are of. The tile lies in lanes (z) and by rows; l is recomputed unless
// log_joint [size][stride], of which the tile is some columns, has it.
template <class T>
struct WeightedTile {
  const T* z;
  const T* rows;
  int count;
  Softmax<T> softmax;
  const T *grad_lse, *grad_expected;
  const T* log_joint;
  std::int64_t stride;
};

// Where they are added to: sums [size][sums_length]; grad_z, laid out as z is, and grad_rows, as
// rows is, whose sum is the gradient of z, unless null.
template <class T>
struct TileSums {
  double* sums;
  bool slopes;
  T *grad_z, *grad_rows;
};

// Chunks of a tile, at most: enough that adding up the lanes of a component's sums costs little
// next to filling them, few enough that z and its gradient stay in the second-level cache at the
// usual dimensions.
constexpr int kTile = 8;

template <class T>
struct Kernels {
  int chunk;

  // Number of T that `scratch` must hold, for every function below but gradients.
  std::int64_t (*scratch_size)(std::int64_t dim);

  // Numbers from one row to the next where a tile of samples lies by rows, [tile][row_stride].
  std::int64_t (*row_stride)(std::int64_t dim);

  // Over a tile: lse = log sum_j exp l_j and expected = sum_j q_j l_j, q = softmax(l). l itself
  // goes to log_joint [size][stride], of which a tile is some columns, unless that is null.
  void (*log_prob)(const PackedMixture<T>&, const T* z, int count, Softmax<T>, T* log_joint,
                   std::int64_t stride, T* scratch);

  // Adds a tile to the sums of records [begin, end), with the weights
  //   w_j = exp(l_j - lse) (grad_lse + grad_expected (1 + l_j - expected))
  // and -sum_j w_j W_j^T W_j (z - m_j) to the gradient of z, for which l must be recomputed.
  void (*backward)(const PackedMixture<T>&, std::int64_t begin, std::int64_t end,
                   const WeightedTile<T>&, const TileSums<T>&, T* scratch);

  // The mixture's gradients from one record's statistics: center [D] = W^T W s and the lower
  // triangle of whitening [D, gradients_stride(D)] = -W M, in aligned memory. scratch holds D
  // (stride + 1).
  std::int64_t (*gradients_stride)(std::int64_t dim);
  void (*gradients)(const PackedMixture<T>&, std::int64_t index, const double* statistics,
                    double* center, double* whitening, double* scratch);

  // Over one chunk: groups of `group` consecutive components count as one: l_g = log sum_{j in g}
  // exp l_j. out is [count, groups] by rows, already holding the value of pruned groups.
  void (*log_joint)(const PackedMixture<T>&, std::int64_t group, std::int64_t groups, const T* z,
                    int count, T* out, T* scratch);
  void (*responsibilities)(const PackedMixture<T>&, std::int64_t group, std::int64_t groups,
                           const T* z, Softmax<T>, int count, T* out, T* scratch);

  // The group of the highest l_g (the first among equals), its probability, and the entropy in nats
  // of the probabilities of all groups; max tells the caller of an overflow.
  void (*assign)(const PackedMixture<T>&, std::int64_t group, const T* z, std::int64_t* label,
                 T* probability, T* entropy, T* max, T* scratch);

  // As compiled for each instruction set.
  static const Kernels& baseline();
  static const Kernels& avx2();
  static const Kernels& avx512();
};

// The value below which l_j is cut off, so that differences and sums of them stay finite. A max at
// this bound means that every l_j overflowed.
template <class T>
constexpr T kLowestLogJoint = sizeof(T) == 4 ? T(-1e30) : T(-1e290);

}  // namespace vmm
