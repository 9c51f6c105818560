// l_ij and its log-sum-exp over components, for one instruction set. Part of mixture_kernels.cpp.
#pragma once

#include "mixture_kernels.h"
#include "simd.h"

// Sums that should stay in registers are passed by reference: only an inlined function keeps them.
#define VMM_INLINE inline __attribute__((always_inline))
#define VMM_INLINE_LAMBDA __attribute__((always_inline))

namespace vmm {
namespace {

using std::int64_t;

// Vectors side by side: with kRows rows at a time, as many sums as the registers hold.
constexpr int kGroup = VMM_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kVectorsPerChunk = 8;
constexpr int kBlock = 16;  // components between two corrections of the running maximum
// Rows of which squares are added up in one go: of hundreds, rounding would be felt. No less than
// kSmallDim, so that l has the same bits wherever it is computed.
constexpr int kSquares = 20;

template <class T>
constexpr int chunk_size() {
  return kVectorsPerChunk * Simd<T>::lanes;
}
template <class T>
constexpr int group_size() {
  return kGroup * Simd<T>::lanes;
}

// One component: views into a record.
template <class T>
struct Component {
  T offset;
  const T* center;
  const T* whitening;
  Component(const PackedMixture<T>& mixture, int64_t index) {
    const T* record = mixture.records + index * record_size(mixture.dim);
    offset = record[0];
    center = record + 1;
    whitening = record + 1 + mixture.dim;
  }
};

template <class T>
Vec<T> log_joint_of(const Component<T>& component, Vec<T> square) {
  return max<T>(component.offset - T(0.5) * square, broadcast<T>(kLowestLogJoint<T>));
}

// A matrix of one row per dimension and one column per lane of a chunk, [D][chunk].
template <class Pointer>
decltype(auto) lane(Pointer rows, int64_t r, int v) {
  constexpr int lanes = VMM_VECTOR_BYTES / sizeof(*rows);
  return at(rows + (r * kVectorsPerChunk + v) * lanes);
}

// The same for a group's own rows, [D][group].
template <class Pointer>
decltype(auto) group_lane(Pointer rows, int64_t r, int v) {
  constexpr int lanes = VMM_VECTOR_BYTES / sizeof(*rows);
  return at(rows + (r * kGroup + v) * lanes);
}

// y = W d for the rows first .. first + R - 1, whose packed numbers start at w.
template <int R, class T>
VMM_INLINE void multiply_rows(const T* w, int64_t first, const T* d, Vec<T> (&y)[R][kGroup]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) y[r][v] = Vec<T>{};
  for (int64_t t = 0; t < first; t++, w += R)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++) y[r][v] += w[r] * lane(d, t, v);
#pragma GCC unroll 4
  for (int t = 0; t < R; t++)
#pragma GCC unroll 4
    for (int r = t; r < R; r++, w++)
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++) y[r][v] += *w * lane(d, first + t, v);
}

template <int R, class T>
VMM_INLINE void add_squares(const T* w, int64_t first, const T* d, T* y_out, Vec<T>* square) {
  Vec<T> y[R][kGroup];
  multiply_rows<R>(w, first, d, y);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) {
      square[v] += y[r][v] * y[r][v];
      if (y_out) group_lane(y_out, first + r, v) = y[r][v];
    }
}

// l for one group of vectors of a chunk. z points at the group's lanes; d receives z - m there, and
// y [D][group], unless null, W (z - m).
template <class T>
void log_joint_group(const Component<T>& component, int64_t dim, const T* z, T* d, T* y,
                     Vec<T>* l) {
  for (int64_t r = 0; r < dim; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) lane(d, r, v) = lane(z, r, v) - component.center[r];
  Vec<T> square[kGroup] = {}, part[kGroup] = {};
  int64_t r = 0;
  for (; r + kRows <= dim; r += kRows) {
    add_squares<kRows>(component.whitening + packed_row(r), r, d, y, part);
    if ((r + kRows) % kSquares) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) {
      square[v] += part[v];
      part[v] = Vec<T>{};
    }
  }
  const T* w = component.whitening + packed_row(r);
  if (dim - r == 1) add_squares<1>(w, r, d, y, part);
  if (dim - r == 2) add_squares<2>(w, r, d, y, part);
  if (dim - r == 3) add_squares<3>(w, r, d, y, part);
#pragma GCC unroll 4
  for (int v = 0; v < kGroup; v++) l[v] = log_joint_of(component, square[v] + part[v]);
}

// The loop body(Index<0>), body(Index<1>), .., body(Index<N - 1>), unrolled whatever the compiler
// thinks of it: what indices select then has a register or an address of its own.
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class Body>
VMM_INLINE void unrolled(Body body) {
  if constexpr (I < N) {
    body(Index<I>{});
    unrolled<N, I + 1>(body);
  }
}

// The same for a dimension known to the compiler: d stays in registers while there are enough, and
// no loop is left. It pays where a register holds eight numbers or more; each size takes the
// compiler a second, so that double, which is rare, goes without.
template <class T>
constexpr int kSmallDim = VMM_VECTOR_BYTES >= 32 && sizeof(T) == 4 ? 20 : 0;
static_assert(kSmallDim<float> <= kSquares);
constexpr int kSmallGroup = 2;
template <int kDim, class T>
VMM_INLINE void log_joint_small(const Component<T>& component, const T* z, Vec<T>* l) {
  // What belongs to a component must be loaded where it is used, not hoisted out of the caller's
  // loop over groups: there are more numbers than registers.
  asm volatile("" ::: "memory");
  Vec<T> d[kDim][kSmallGroup], square[kSmallGroup] = {};
  unrolled<kDim>([&](auto r) VMM_INLINE_LAMBDA {
    unrolled<kSmallGroup>([&](auto v)
                              VMM_INLINE_LAMBDA { d[r][v] = lane(z, r, v) - component.center[r]; });
  });
  unrolled<(kDim + kRows - 1) / kRows>([&](auto block) VMM_INLINE_LAMBDA {
    constexpr int first = block.value * kRows;
    constexpr int rows = kDim - first < kRows ? kDim - first : kRows;
    Vec<T> y[rows][kSmallGroup] = {};
    unrolled<first + rows>([&](auto t) VMM_INLINE_LAMBDA {
      unrolled<rows>([&](auto r) VMM_INLINE_LAMBDA {
        if constexpr (t.value <= first + r.value) {
          const T w = component.whitening[packed_index(kDim, first + r.value, t.value)];
          unrolled<kSmallGroup>([&](auto v) VMM_INLINE_LAMBDA { y[r][v] += w * d[t][v]; });
        }
      });
    });
    unrolled<rows>([&](auto r) VMM_INLINE_LAMBDA {
      unrolled<kSmallGroup>([&](auto v) VMM_INLINE_LAMBDA { square[v] += y[r][v] * y[r][v]; });
    });
  });
  for (int v = 0; v < kSmallGroup; v++) l[v] = log_joint_of(component, square[v]);
}

// A sum with what it has in excess of the exact one (Kahan 1965): of a hundred thousand components
// most are each below its rounding error, but not all together.
template <class T>
struct KahanSum {
  Vec<T> value = {}, excess = {};

  void operator+=(Vec<T> x) {
    const Vec<T> y = x - excess, total = value + y;
    excess = (total - value) - y;
    value = total;
  }
  void operator*=(Vec<T> factor) {
    value *= factor;
    excess *= factor;
  }
};

// (max, sum of exp(l - max), sum of exp(l - max) (l - max)): associative, and the difference of
// log-sum-exp and expectation, the entropy, is had without cancellation.
template <class T>
struct OnlineSoftmax {
  Vec<T> max_ = broadcast<T>(kLowestLogJoint<T>);
  KahanSum<T> sum_, weighted_;

  // What has been added so far, seen from a maximum that is at least as high.
  void raise(Vec<T> top) {
    const Vec<T> gap = max_ - top;
    const Vec<T> scale = exp<T>(gap);
    weighted_ += sum_.value * gap;
    weighted_ *= scale;
    sum_ *= scale;
    max_ = top;
  }
  void add(Vec<T> l) {
    raise(max<T>(max_, l));
    const Vec<T> gap = l - max_;
    const Vec<T> e = exp<T>(gap);
    sum_ += e;
    weighted_ += e * gap;
  }
};

// A component's sums before their lanes are added up: one vector each, in whole squares.
template <class T>
int64_t squares(int64_t size) {
  constexpr int lanes = Simd<T>::lanes;
  return (size + lanes - 1) / lanes * lanes;
}
template <class T>
int64_t totals_size(int64_t dim) {
  return (squares<T>(statistics_size(dim)) + squares<T>(1 + dim)) * Simd<T>::lanes;
}

// Rows of z are filled up to whole vectors.
template <class T>
int64_t row_stride(int64_t dim) {
  constexpr int lanes = Simd<T>::lanes;
  return (dim + lanes - 1) / lanes * lanes;
}

constexpr int kFew = 64;  // samples that are looked at one by one, at a time
template <class T>
int64_t few_size(int64_t dim) {
  return (2 * dim + 2 * kFew + kRows + 2) * row_stride<T>(dim) + kRows * group_size<T>() +
         2 * kTile * chunk_size<T>();
}

template <class T>
int64_t scratch_size(int64_t dim) {
  const int64_t forward = (dim + 2 * kTile) * chunk_size<T>() + kBlock * group_size<T>();
  const int64_t backward = (2 * dim + 2) * chunk_size<T>() + dim * group_size<T>() +
                           totals_size<T>(dim) + few_size<T>(dim);
  return forward > backward ? forward : backward;
}

// The number of lanes of chunk k that hold samples, rounded up to groups.
template <class T>
int lanes_in_use(int count, int k) {
  const int left = count - k * chunk_size<T>();
  return left >= chunk_size<T>() ? chunk_size<T>()
                                 : (left + group_size<T>() - 1) / group_size<T>() * group_size<T>();
}

// kDim is the dimension if it is small, else 0.
template <int kDim, class T>
void log_prob_sized(const PackedMixture<T>& mixture, const T* z, int count, Softmax<T> out,
                    T* log_joint, int64_t stride, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int chunk = chunk_size<T>();
  const int64_t dim = kDim ? kDim : mixture.dim;
  const int chunks = (count + chunk - 1) / chunk;
  T* d = scratch;
  T* sum_excess = d + dim * chunk;
  T* weighted_excess = sum_excess + kTile * chunk;
  T* block = weighted_excess + kTile * chunk;
  for (int64_t begin = 0; begin < mixture.size; begin += kBlock) {
    const int size =
        static_cast<int>(mixture.size - begin < kBlock ? mixture.size - begin : kBlock);
    for (int k = 0; k < chunks; k++)
      for (int first = 0; first < lanes_in_use<T>(count, k); first += group_size<T>()) {
        const int sample = k * chunk + first;
        T* l = log_joint ? log_joint + begin * stride + sample : block;
        const int64_t l_stride = log_joint ? stride : group_size<T>();
        OnlineSoftmax<T> softmax[kGroup];
        Vec<T> top[kGroup];
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; v++) {
          const int i = sample + v * lanes;
          if (begin)
            softmax[v] = {at(out.max + i),
                          {at(out.log_sum + i), at(sum_excess + i)},
                          {at(out.gap + i), at(weighted_excess + i)}};
          top[v] = softmax[v].max_;
        }
        for (int j = 0; j < size; j++) {
          Vec<T> l_j[kGroup];
          const Component<T> component(mixture, begin + j);
          const T* z_k = z + k * dim * chunk + first;
          if constexpr (kDim > 0)
            for (int v = 0; v < kGroup; v += kSmallGroup)
              log_joint_small<kDim>(component, z_k + v * lanes, l_j + v);
          else
            log_joint_group<T>(component, dim, z_k, d, nullptr, l_j);
          for (int v = 0; v < kGroup; v++) {
            at(l + j * l_stride + v * lanes) = l_j[v];
            top[v] = max<T>(top[v], l_j[v]);
          }
        }
        Vec<T> sum[kGroup] = {}, weighted[kGroup] = {};
        for (int j = 0; j < size; j++)
#pragma GCC unroll 4
          for (int v = 0; v < kGroup; v++) {
            const Vec<T> gap = at(l + j * l_stride + v * lanes) - top[v];
            const Vec<T> e = exp<T>(gap);
            sum[v] += e;
            weighted[v] += e * gap;
          }
        const bool last = begin + size == mixture.size;
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; v++) {
          const int i = sample + v * lanes;
          softmax[v].raise(top[v]);
          softmax[v].sum_ += sum[v];
          softmax[v].weighted_ += weighted[v];
          const Vec<T> total = softmax[v].sum_.value, weighted_total = softmax[v].weighted_.value;
          at(out.max + i) = top[v];
          at(out.log_sum + i) = last ? log<T>(total) : total;
          at(out.gap + i) = last ? weighted_total / total : weighted_total;
          at(sum_excess + i) = softmax[v].sum_.excess;
          at(weighted_excess + i) = softmax[v].weighted_.excess;
        }
      }
  }
}

template <int kDim, class T>
void log_prob(const PackedMixture<T>& mixture, const T* z, int count, Softmax<T> out, T* log_joint,
              int64_t stride, T* scratch) {
  if constexpr (kDim > 0) {
    if (mixture.dim != kDim)
      return log_prob<kDim - 1>(mixture, z, count, out, log_joint, stride, scratch);
  }
  log_prob_sized<kDim>(mixture, z, count, out, log_joint, stride, scratch);
}

}  // namespace
}  // namespace vmm
