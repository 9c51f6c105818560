// The whitened mixture's kernels, for one instruction set: the build compiles this file once per
// set, with VMM_ISA its name and VMM_VECTOR_BYTES the width of its registers.
//
//   l_ij = c_j - 1/2 |W_j (z_i - m_j)|^2,    W_j lower triangular
//
// Samples lie in SIMD lanes, so that a component's numbers are broadcast and no lane is ever idle
// for a small D. Subtracting before whitening keeps the precision of centres far from the origin.
// Matrices are walked in blocks of kRows rows times kGroup vectors, whose sums stay in registers.
// The log-sum-exp is accumulated online over blocks of components (Milakov & Gimelshein 2018) and
// the backward pass recomputes l, so that nothing of size B x J is needed. Where few samples of a
// component have a weight other than 0, which is the rule for clusters that are far apart, its sums
// are over those alone.
#include "mixture_kernels.h"

#include "mixture_log_prob.h"

namespace vmm {
namespace {

// The rows first .. first + R - 1 of W^T y.
template <int R, class T>
VMM_INLINE void multiply_columns(const T* whitening, int64_t dim, int64_t first, const T* y,
                                 Vec<T> (&x)[R][kGroup]) {
#pragma GCC unroll 4
  for (int t = 0; t < R; t++)
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) x[t][v] = Vec<T>{};
  const T* w = whitening + packed_row(first) + first * R;
#pragma GCC unroll 4
  for (int t = 0; t < R; t++)
#pragma GCC unroll 4
    for (int r = t; r < R; r++, w++)
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++) x[t][v] += *w * group_lane(y, first + r, v);
  int64_t r = first + R;
  for (; r + kRows <= dim; r += kRows) {
    w = whitening + packed_row(r) + first * kRows;
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int t = 0; t < R; t++)
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; v++) x[t][v] += w[t * kRows + i] * group_lane(y, r + i, v);
  }
  const int rest = static_cast<int>(dim - r);
  w = whitening + packed_row(r) + first * rest;
  for (int i = 0; i < rest; i++)
#pragma GCC unroll 4
    for (int t = 0; t < R; t++)
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++) x[t][v] += w[t * rest + i] * group_lane(y, r + i, v);
}

template <int R, class T>
VMM_INLINE void subtract_columns(const T* whitening, int64_t dim, int64_t first, const T* y,
                                 const T* weight, T* grad_z) {
  Vec<T> x[R][kGroup];
  multiply_columns<R>(whitening, dim, first, y, x);
#pragma GCC unroll 4
  for (int v = 0; v < kGroup; v++) {
    const Vec<T> w = at(weight + v * Simd<T>::lanes);
    // A far-off component's y may be infinite; its weight of 0 must win.
#pragma GCC unroll 4
    for (int t = 0; t < R; t++) lane(grad_z, first + t, v) -= w != 0 ? w * x[t][v] : w;
  }
}

// grad_z -= w W^T y for one group of vectors.
template <class T>
void subtract_gradient(const T* whitening, int64_t dim, const T* y, const T* weight, T* grad_z) {
  int64_t r = 0;
  for (; r + kRows <= dim; r += kRows)
    subtract_columns<kRows>(whitening, dim, r, y, weight, grad_z);
  if (dim - r == 1) subtract_columns<1>(whitening, dim, r, y, weight, grad_z);
  if (dim - r == 2) subtract_columns<2>(whitening, dim, r, y, weight, grad_z);
  if (dim - r == 3) subtract_columns<3>(whitening, dim, r, y, weight, grad_z);
}

// Adds the sums over a chunk of u_r d_t to sums, where rows r and columns t are blocks of R and C;
// a block on the diagonal has its lower triangle alone.
template <int R, int C, bool kDiagonal, class T>
VMM_INLINE void add_products(const T* u, const T* d, int vectors, int64_t row, int64_t column,
                             T* sums) {
  Vec<T> total[R][C] = {};
  for (int v = 0; v < vectors; v++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int t = 0; t < (kDiagonal ? r + 1 : C); t++)
        total[r][t] += lane(u, row + r, v) * lane(d, column + t, v);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < (kDiagonal ? r + 1 : C); t++) {
      const int64_t index = (row + r) * (row + r + 1) / 2 + column + t;
      at(sums + index * Simd<T>::lanes) += total[r][t];
    }
}

template <int R, class T>
void add_product_rows(const T* u, const T* d, int vectors, int64_t row, T* sums) {
  for (int64_t column = 0; column < row; column += kRows)
    add_products<R, kRows, false>(u, d, vectors, row, column, sums);
  add_products<R, R, true>(u, d, vectors, row, row, sums);
}

// Adds the sums over a chunk of w and w d to sums [1 + D][lanes]; w d goes to u unless that is
// null.
template <class T>
void add_moments(int64_t dim, const T* weight, const T* d, int vectors, T* u, T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  for (int v = 0; v < vectors; v++) at(sums) += at(weight + v * lanes);
  sums += lanes;
  for (int64_t r = 0; r < dim; r++, sums += lanes) {
    Vec<T> total{};
    for (int v = 0; v < vectors; v++) {
      const Vec<T> product = at(weight + v * lanes) * lane(d, r, v);
      if (u) lane(u, r, v) = product;
      total += product;
    }
    at(sums) += total;
  }
}

// Adds the sums over a chunk of w, u and the lower triangle of u d^T, where u = w d, to sums
// [statistics_size][lanes].
template <class T>
void add_statistics(int64_t dim, const T* weight, const T* d, int vectors, T* u, T* sums) {
  add_moments(dim, weight, d, vectors, u, sums);
  sums += (1 + dim) * Simd<T>::lanes;
  int64_t r = 0;
  for (; r + kRows <= dim; r += kRows) add_product_rows<kRows>(u, d, vectors, r, sums);
  if (dim - r == 1) add_product_rows<1>(u, d, vectors, r, sums);
  if (dim - r == 2) add_product_rows<2>(u, d, vectors, r, sums);
  if (dim - r == 3) add_product_rows<3>(u, d, vectors, r, sums);
}

// Adds up the lanes of totals [size][lanes], which is filled up to whole squares, into out.
template <class T>
void add_lanes(const T* totals, int64_t size, double* out) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t i = 0; i < size; i += lanes) {
    const Vec<T> total = sums<T>(totals + i * lanes);
    for (int lane = 0; lane < lanes && i + lane < size; lane++) out[i + lane] += total[lane];
  }
}

// --- samples of which few have a weight: their dimensions lie in lanes instead ---

// What add_few needs besides the component.
template <class T>
struct Few {
  Few(int64_t dim, T* scratch)
      : stride(row_stride<T>(dim)),
        whitening(scratch),
        transposed(whitening + dim * stride),
        center(transposed + dim * stride),
        unused(center + stride),
        d(unused + stride),
        u(d + kFew * stride),
        y(u + kFew * stride),
        block(y + kRows * stride),
        weight(block + kRows * group_size<T>()),
        slope(weight + kTile * chunk_size<T>()) {}

  int64_t stride;
  T *whitening, *transposed;  // [D][stride]: W and W^T
  T *center, *unused;         // [stride]: m, and a row to be written to
  T *d, *u;                   // [kFew][stride]: d and w d
  T* y;                       // [kRows][stride]: W u
  T* block;                   // [kRows][group]
  T *weight, *slope;          // [count], of the samples
  int sample[kTile * chunk_size<T>()];
  int count = 0;
};

template <class T>
void unpack_whitening(const T* packed, int64_t dim, Few<T>& few) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t stride = few.stride;
  for (int64_t i = 0; i < dim * stride; i += lanes)
    at(few.whitening + i) = at(few.transposed + i) = Vec<T>{};
  for (int64_t first = 0; first < dim; first += kRows) {
    const int64_t end = dim - first < kRows ? dim : first + kRows;
    for (int64_t t = 0; t < end; t++)
      for (int64_t r = t < first ? first : t; r < end; r++)
        few.whitening[r * stride + t] = few.transposed[t * stride + r] = *packed++;
  }
}

// Adds the sums over samples of u_r d_t for kRows rows r and the columns of V vectors.
template <int V, class T>
VMM_INLINE void add_outer_products(const T* u, const T* d, int count, int64_t stride, T* block) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> total[kRows][V] = {};
  for (int i = 0; i < count; i++, u += stride, d += stride)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) total[r][v] += u[r] * at(d + v * lanes);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) at(block + (r * V + v) * lanes) = total[r][v];
}

// x[i] <- u[i] A, or less that, for kRows samples i and the columns of V vectors of A [D][stride].
template <int V, bool kSubtract, class T>
VMM_INLINE void multiply_samples(const T* u, const T* A, int64_t dim, int64_t stride,
                                 T* const (&x)[kRows]) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> total[kRows][V] = {};
  for (int64_t r = 0; r < dim; r++, A += stride)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) total[i][v] += u[i * stride + r] * at(A + v * lanes);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      Vec<T>& out = at(x[i] + v * lanes);
      out = kSubtract ? out - total[i][v] : total[i][v];
    }
}

// Calls body(Index<V>, first) for groups of V = kGroup vectors, and for what is left one by one.
template <class T, class Body>
VMM_INLINE void for_each_columns(int64_t size, Body body) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t t = 0;
  for (; t + kGroup * lanes <= size; t += kGroup * lanes) body(Index<kGroup>{}, t);
  if constexpr (kGroup > 2)
    for (; t + 2 * lanes <= size; t += 2 * lanes) body(Index<2>{}, t);
  for (; t < size; t += lanes) body(Index<1>{}, t);
}

// Adds the samples of `few` to the sums, and subtracts w W^T W d from their rows of grad.
template <class T>
void add_few(const Component<T>& component, int64_t dim, const T* rows, Few<T>& few, bool slopes,
             double* sums, T* grad) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t stride = few.stride;
  if (few.count == 0) return;
  for (int64_t t = 0; t < stride; t++) few.center[t] = t < dim ? component.center[t] : T(0);
  if (grad) unpack_whitening(component.whitening, dim, few);
  for (int begin = 0; begin < few.count; begin += kFew) {
    const int count = few.count - begin < kFew ? few.count - begin : kFew;
    const T *weight = few.weight + begin, *slope = few.slope + begin;
    for (int i = 0; i < count; i++) {
      const T* z = rows + few.sample[begin + i] * stride;
      for (int64_t t = 0; t < stride; t += lanes) {
        const Vec<T> d = at(z + t) - at(few.center + t);
        at(few.d + i * stride + t) = d;
        at(few.u + i * stride + t) = weight[i] * d;
      }
      sums[0] += weight[i];
    }
    double* s = sums + 1;
    for (int64_t t = 0; t < stride; t += lanes) {
      Vec<T> total{};
      for (int i = 0; i < count; i++) total += at(few.u + i * stride + t);
      for (int64_t k = 0; k < lanes && t + k < dim; k++) s[t + k] += total[k];
    }
    if (slopes) {
      double* out = sums + statistics_size(dim);
      for (int i = 0; i < count; i++) out[0] += slope[i];
      for (int64_t t = 0; t < stride; t += lanes) {
        Vec<T> total{};
        for (int i = 0; i < count; i++) total += slope[i] * at(few.d + i * stride + t);
        for (int64_t k = 0; k < lanes && t + k < dim; k++) out[1 + t + k] += total[k];
      }
    }
    double* M = s + dim;
    for (int64_t first = 0; first < dim; first += kRows) {
      const int64_t end = dim - first < kRows ? dim : first + kRows;
      for_each_columns<T>((end + lanes - 1) / lanes * lanes, [&](auto V, int64_t t) {
        constexpr int width = V.value * lanes;
        add_outer_products<V.value>(few.u + first, few.d + t, count, stride, few.block);
        for (int64_t r = first; r < end; r++) {
          double* out = M + r * (r + 1) / 2 + t;
          const T* total = few.block + (r - first) * width;
          const int64_t columns = r + 1 - t < width ? r + 1 - t : width;
          for (int64_t k = 0; k < columns; k++) out[k] += total[k];
        }
      });
    }
    if (!grad) continue;
    for (int i = count; i % kRows; i++)
      for (int64_t t = 0; t < stride; t++) few.u[i * stride + t] = 0;
    for (int i = 0; i < count; i += kRows) {
      T *x[kRows], *y[kRows];
      for (int k = 0; k < kRows; k++) {
        x[k] = i + k < count ? grad + few.sample[begin + i + k] * stride : few.unused;
        y[k] = few.y + k * stride;
      }
      for_each_columns<T>(stride, [&](auto V, int64_t t) {
        T* const y_t[kRows] = {y[0] + t, y[1] + t, y[2] + t, y[3] + t};
        multiply_samples<V.value, false>(few.u + i * stride, few.transposed + t, dim, stride, y_t);
      });
      for_each_columns<T>(stride, [&](auto V, int64_t t) {
        T* const x_t[kRows] = {x[0] + t, x[1] + t, x[2] + t, x[3] + t};
        multiply_samples<V.value, true>(few.y, few.whitening + t, dim, stride, x_t);
      });
    }
  }
}

template <class T>
void backward(const PackedMixture<T>& mixture, int64_t begin, int64_t end,
              const WeightedTile<T>& tile, const TileSums<T>& out, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int chunk = chunk_size<T>();
  const int64_t dim = mixture.dim;
  const int chunks = (tile.count + chunk - 1) / chunk;
  T* d = scratch;
  T* u = d + dim * chunk;
  T* weight = u + dim * chunk;
  T* slope = weight + chunk;
  T* y = slope + chunk;
  T* totals = y + dim * group_size<T>();
  T* slope_totals = totals + squares<T>(statistics_size(dim)) * lanes;
  Few<T> few(dim, totals + totals_size<T>(dim));
  // Whether few samples have a weight, as was so in the chunk before.
  bool are_few = true;
  for (int64_t j = begin; j < end; j++) {
    const Component<T> component(mixture, j);
    bool untouched = true;
    few.count = 0;
    for (int k = 0; k < chunks; k++) {
      const T* z_k = tile.z + k * dim * chunk;
      const int in_use = lanes_in_use<T>(tile.count, k);
      typename Simd<T>::IntVec with_weight{};
      for (int first = 0; first < in_use; first += group_size<T>()) {
        Vec<T> l[kGroup];
        if (!tile.log_joint)
          log_joint_group<T>(component, dim, z_k + first, d + first, are_few ? nullptr : y, l);
        else
#pragma GCC unroll 4
          for (int v = 0; v < kGroup; v++)
            l[v] = at(tile.log_joint + j * tile.stride + k * chunk + first + v * lanes);
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; v++) {
          const int i = first + v * lanes, sample = k * chunk + i;
          const Vec<T> below = l[v] - at(tile.softmax.max + sample);
          const Vec<T> p = exp<T>(below - at(tile.softmax.log_sum + sample));
          const Vec<T> slope_i = 1 + below - at(tile.softmax.gap + sample);
          const Vec<T> w =
              p * (at(tile.grad_lse + sample) + at(tile.grad_expected + sample) * slope_i);
          at(weight + i) = w;
          if (out.slopes) at(slope + i) = w != 0 ? p * slope_i : w;
          with_weight -= w != 0;
        }
        if (out.grad_z && !are_few)
          subtract_gradient(component.whitening, dim, y, weight + first,
                            out.grad_z + k * dim * chunk + first);
      }
      int number = 0;  // a far-off component's weights are all exactly 0
      for (int i = 0; i < lanes; i++) number += static_cast<int>(with_weight[i]);
      if (number && are_few) {
        for (int i = 0; i < in_use; i++) {
          few.sample[few.count] = k * chunk + i;
          few.weight[few.count] = weight[i];
          if (out.slopes) few.slope[few.count] = slope[i];
          few.count += weight[i] != 0;
        }
      } else if (number) {
        if (untouched)
          for (int64_t i = 0; i < totals_size<T>(dim); i += lanes) at(totals + i) = Vec<T>{};
        untouched = false;
        if (tile.log_joint)
          for (int64_t r = 0; r < dim; r++)
            for (int v = 0; v < in_use / lanes; v++)
              lane(d, r, v) = lane(z_k, r, v) - component.center[r];
        add_statistics(dim, weight, d, in_use / lanes, u, totals);
        if (out.slopes) add_moments<T>(dim, slope, d, in_use / lanes, nullptr, slope_totals);
      }
      are_few = 2 * number < in_use;
    }
    double* sums = out.sums + j * sums_length(dim, out.slopes);
    add_few(component, dim, tile.rows, few, out.slopes, sums, out.grad_rows);
    if (untouched) continue;
    add_lanes(totals, statistics_size(dim), sums);
    if (out.slopes) add_lanes(slope_totals, 1 + dim, sums + statistics_size(dim));
  }
}

// out[0 .. V) -= sum_u w[u] M[u] for vectors that lie side by side in rows of M.
template <int V>
VMM_INLINE void subtract_product(const double* w, int64_t count, const double* M, int64_t stride,
                                 double* out) {
  constexpr int lanes = Simd<double>::lanes;
  Vec<double> total[V] = {};
  for (int64_t u = 0; u < count; u++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) total[v] -= w[u] * at(M + u * stride + v * lanes);
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) at(out + v * lanes) = total[v];
}

int64_t gradients_stride(int64_t dim) {
  constexpr int lanes = Simd<double>::lanes;
  return (dim + lanes - 1) / lanes * lanes;
}

template <class T>
void gradients(const PackedMixture<T>& mixture, int64_t index, const double* statistics,
               double* center, double* whitening, double* scratch) {
  constexpr int lanes = Simd<double>::lanes;
  const Component<T> component(mixture, index);
  const int64_t dim = mixture.dim, stride = gradients_stride(dim);
  const double* s = statistics + 1;
  const double* packed_M = s + dim;
  double *M = scratch, *w = M + dim * stride;
  for (int64_t r = 0; r < dim; r++) {
    for (int64_t t = 0; t <= r; t++) M[r * stride + t] = M[t * stride + r] = *packed_M++;
    for (int64_t t = dim; t < stride; t++) M[r * stride + t] = 0;
    center[r] = 0;
  }
  for (int64_t r = 0; r < dim; r++) {
    const int64_t first = r / kRows * kRows;
    const int64_t rows = dim - first < kRows ? dim - first : kRows;
    const T* block = component.whitening + packed_row(first);
    for (int64_t t = 0; t < first; t++) w[t] = block[t * rows + r - first];
    for (int64_t t = first; t <= r; t++) w[t] = component.whitening[packed_index(dim, r, t)];
    double y = 0;
    for (int64_t t = 0; t <= r; t++) y += w[t] * s[t];
    for (int64_t t = 0; t <= r; t++) center[t] += w[t] * y;
    double* out = whitening + r * stride;
    int64_t t = 0;
    for (; r + 1 - t > 3 * lanes; t += 4 * lanes)
      subtract_product<4>(w, r + 1, M + t, stride, out + t);
    for (; r + 1 - t > 0; t += lanes) subtract_product<1>(w, r + 1, M + t, stride, out + t);
  }
}

// Calls visit(g, begin, end) for every run [begin, end) of records that belong to one group.
template <class T, class Visit>
void for_each_group(const PackedMixture<T>& mixture, int64_t group, Visit visit) {
  for (int64_t begin = 0, end = 0; begin < mixture.size; begin = end) {
    const int64_t g = mixture.component[begin] / group;
    while (end < mixture.size && mixture.component[end] / group == g) end++;
    visit(g, begin, end);
  }
}

// l_g for one group of components and one group of vectors.
template <class T>
void grouped_log_joint(const PackedMixture<T>& mixture, int64_t begin, int64_t end, const T* z,
                       T* scratch, Vec<T>* l) {
  log_joint_group<T>(Component<T>(mixture, begin), mixture.dim, z, scratch, nullptr, l);
  if (end - begin == 1) return;
  OnlineSoftmax<T> softmax[kGroup];
#pragma GCC unroll 4
  for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
  for (int64_t j = begin + 1; j < end; j++) {
    log_joint_group<T>(Component<T>(mixture, j), mixture.dim, z, scratch, nullptr, l);
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kGroup; v++) l[v] = softmax[v].max_ + log<T>(softmax[v].sum_.value);
}

template <class T>
void log_joint(const PackedMixture<T>& mixture, int64_t group, int64_t groups, const T* z,
               int count, T* out, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  for_each_group(mixture, group, [&](int64_t g, int64_t begin, int64_t end) {
    for (int first = 0; first < count; first += group_size<T>()) {
      Vec<T> l[kGroup];
      grouped_log_joint(mixture, begin, end, z + first, scratch, l);
      for (int i = 0; i < group_size<T>() && first + i < count; i++)
        out[(first + i) * groups + g] = l[i / lanes][i % lanes];
    }
  });
}

template <class T>
void responsibilities(const PackedMixture<T>& mixture, int64_t group, int64_t groups, const T* z,
                      Softmax<T> softmax, int count, T* out, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  for_each_group(mixture, group, [&](int64_t g, int64_t begin, int64_t end) {
    for (int first = 0; first < count; first += group_size<T>()) {
      Vec<T> p[kGroup] = {};
      for (int64_t j = begin; j < end; j++) {
        Vec<T> l[kGroup];
        log_joint_group<T>(Component<T>(mixture, j), mixture.dim, z + first, scratch, nullptr, l);
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; v++) {
          const int i = first + v * lanes;
          p[v] += exp<T>((l[v] - at(softmax.max + i)) - at(softmax.log_sum + i));
        }
      }
      for (int i = 0; i < group_size<T>() && first + i < count; i++)
        out[(first + i) * groups + g] = p[i / lanes][i % lanes];
    }
  });
}

template <class T>
void assign(const PackedMixture<T>& mixture, int64_t group, const T* z, int64_t* label,
            T* probability, T* entropy, T* max, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  for (int first = 0; first < chunk_size<T>(); first += group_size<T>()) {
    OnlineSoftmax<T> softmax[kGroup];
    for_each_group(mixture, group, [&](int64_t g, int64_t begin, int64_t end) {
      Vec<T> l[kGroup];
      grouped_log_joint(mixture, begin, end, z + first, scratch, l);
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++)
        for (int k = 0; k < lanes; k++)
          if (begin == 0 || l[v][k] > softmax[v].max_[k]) label[first + v * lanes + k] = g;
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
    });
#pragma GCC unroll 4
    for (int v = 0; v < kGroup; v++) {
      const int i = first + v * lanes;
      const Vec<T> total = softmax[v].sum_.value;
      at(max + i) = softmax[v].max_;
      at(probability + i) = 1 / total;
      // Rounding may leave a tiny negative number where one group has all the probability.
      at(entropy + i) = vmm::max<T>(log<T>(total) - softmax[v].weighted_.value / total, Vec<T>{});
    }
  }
}

template <class T>
constexpr Kernels<T> kernels = {
    chunk_size<T>(),  scratch_size<T>, row_stride<T>, log_prob<kSmallDim<T>, T>, backward<T>,
    gradients_stride, gradients<T>,    log_joint<T>,  responsibilities<T>,       assign<T>};

}  // namespace

template <class T>
const Kernels<T>& Kernels<T>::VMM_ISA() {
  return kernels<T>;
}
template const Kernels<float>& Kernels<float>::VMM_ISA();
template const Kernels<double>& Kernels<double>::VMM_ISA();

}  // namespace vmm
