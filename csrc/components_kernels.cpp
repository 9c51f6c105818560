// The kernels that build a whitened mixture (components.h), for one instruction set: the build
// compiles this file once per set, with VMM_ISA its name and VMM_VECTOR_BYTES the width of its
// registers.
//
// Components lie in SIMD lanes, so that a small D leaves none idle and a Cholesky factorisation is
// as wide as the registers. Coordinates are reversed and matrices transposed at the border,
//
//   l = F L^T F,   q = F s^T F,   w = F A^T F       (F reverses the order of coordinates),
//
// which keeps all three lower triangular and turns U into an ordinary lower Cholesky factor:
//
//   marginal   y = l q^T,   I + y y^T = u u^T,   w = u^-1 l
//   expected   w = l, and the offset loses 1/2 tr(Lambda S) = 1/2 |y|^2
//   no Lambda^-1   w = q^-1
//
// Everything lives in an unnamed namespace and no standard template is instantiated: the linker
// must never pick one instruction set's copy of a shared inline function for another's.
#include "components_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "simd.h"

namespace vmm {
namespace {

using std::int64_t;

using V = Vec<double>;
constexpr int kLanes = Simd<double>::lanes;

// Products are summed in square blocks of this many rows, in registers (32 with AVX-512, else 16).
constexpr int kBlock = VMM_VECTOR_BYTES == 64 ? 4 : 3;

// --- matrices, one in each lane ---

// Outside its triangle a lower or upper matrix holds zeros.
enum class Shape { full, lower, upper, symmetric };

struct Matrix {
  V* data;
  int64_t dim, row_stride, column_stride;
  Shape shape;

  V& operator()(int64_t r, int64_t t) const { return data[r * row_stride + t * column_stride]; }
  Matrix transposed() const {
    Shape flipped = shape;
    if (shape == Shape::lower) flipped = Shape::upper;
    if (shape == Shape::upper) flipped = Shape::lower;
    return {data, dim, column_stride, row_stride, flipped};
  }
};

// Hands out matrices and vectors of scratch memory.
class Scratch {
 public:
  Scratch(double* memory, int64_t dim) : next_(reinterpret_cast<V*>(memory)), dim_(dim) {}

  V* vector() { return take(dim_); }
  Matrix matrix(Shape shape) { return {take(dim_ * stride(dim_)), dim_, stride(dim_), 1, shape}; }

  static int64_t size(int64_t dim) {
    return kLanes * (kVectors * dim + kMatrices * dim * stride(dim));
  }

 private:
  // As many as the hungriest kernel takes, backward_marginal() or backward_expected().
  static constexpr int kVectors = 2, kMatrices = 13;

  // An odd stride spreads a column over all sets of the cache.
  static int64_t stride(int64_t dim) { return dim | 1; }
  V* take(int64_t count) {
    V* taken = next_;
    next_ += count;
    return taken;
  }

  V* next_;
  int64_t dim_;
};

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls body(Size<min(size, Max)>), so that a block's loops have constant bounds.
template <int Max, class Body>
void with_size(int64_t size, Body body) {
  if constexpr (Max == 1) {
    body(Size<1>{});
  } else {
    if (size >= Max)
      body(Size<Max>{});
    else
      with_size<Max - 1>(size, body);
  }
}

// Calls body(i) for i in [begin, end), unrolled: a block stays in registers only where every index
// into it is known to the compiler.
template <class Body>
inline void unrolled(int begin, int end, Body body) {
#pragma GCC unroll 4
  for (int i = begin; i < end; i++) body(i);
}

template <int R, int C>
struct Block {
  V sum[R][C];

  // The block of x y at (r, t), with the inner index in [begin, end).
  Block(const Matrix& x, const Matrix& y, int64_t r, int64_t t, int64_t begin, int64_t end) {
    each([&](int i, int j) { sum[i][j] = V{}; });
    const V *left = &x(r, begin), *right = &y(begin, t);
    for (int64_t k = begin; k < end; k++) {
      each([&](int i, int j) { sum[i][j] += left[i * x.row_stride] * right[j * y.column_stride]; });
      left += x.column_stride;
      right += y.row_stride;
    }
  }

  // sum = x - sum
  void subtract_from(const Matrix& x, int64_t r, int64_t t) {
    each([&](int i, int j) { sum[i][j] = x(r + i, t + j) - sum[i][j]; });
  }

  // Blocks lie on a triangle's diagonal or wholly within it: for_blocks() goes no further.
  void store(const Matrix& out, int64_t r, int64_t t) const {
    const bool on_diagonal = r == t;
    if (out.shape == Shape::full || (out.shape != Shape::symmetric && !on_diagonal)) {
      each([&](int i, int j) { out(r + i, t + j) = sum[i][j]; });
    } else if (out.shape == Shape::symmetric) {
      each([&](int i, int j) {
        if (!on_diagonal || i >= j) out(r + i, t + j) = out(t + j, r + i) = sum[i][j];
      });
    } else {
      const bool lower = out.shape == Shape::lower;
      each([&](int i, int j) { out(r + i, t + j) = (lower ? i >= j : i <= j) ? sum[i][j] : V{}; });
    }
  }

  // sum = sum f^-T with f the lower-triangular block at (t, t), its diagonal inverted.
  void solve(const Matrix& f, int64_t t) {
    unrolled(0, C, [&](int j) {
      unrolled(0, j, [&](int k) {
        unrolled(0, R, [&](int i) { sum[i][j] -= sum[i][k] * f(t + j, t + k); });
      });
      unrolled(0, R, [&](int i) { sum[i][j] *= f(t + j, t + j); });
    });
  }

  // The lower Cholesky factor of a block on the diagonal, its diagonal inverted.
  void cholesky() {
    unrolled(0, C, [&](int j) {
      sum[j][j] = 1 / sqrt(sum[j][j]);
      unrolled(j + 1, R, [&](int i) { sum[i][j] *= sum[j][j]; });
      unrolled(j + 1, C,
               [&](int k) { unrolled(k, R, [&](int i) { sum[i][k] -= sum[i][j] * sum[k][j]; }); });
    });
  }

 private:
  template <class Body>
  static void each(Body body) {
    unrolled(0, R, [&](int i) { unrolled(0, C, [&](int j) { body(i, j); }); });
  }
};

// Calls body(rows, columns, r, t) for the blocks of a matrix' triangle, by columns: rows and
// columns are Size<..>.
template <class Body>
void for_blocks(const Matrix& matrix, Body body) {
  const int64_t dim = matrix.dim;
  const bool lower = matrix.shape == Shape::lower || matrix.shape == Shape::symmetric;
  const bool upper = matrix.shape == Shape::upper;
  for (int64_t t = 0; t < dim; t += kBlock)
    with_size<kBlock>(dim - t, [&](auto columns) {
      const int64_t end = upper ? t + columns.value : dim;
      for (int64_t r = lower ? t : 0; r < end; r += kBlock)
        with_size<kBlock>(dim - r, [&](auto rows) { body(rows, columns, r, t); });
    });
}

// out = x y, or the triangle that out has.
void multiply(const Matrix& x, const Matrix& y, const Matrix& out) {
  for_blocks(out, [&](auto rows, auto columns, int64_t r, int64_t t) {
    int64_t begin = 0, end = x.dim;
    if (x.shape == Shape::upper) begin = r;
    if (y.shape == Shape::lower && t > begin) begin = t;
    if (x.shape == Shape::lower) end = r + rows.value;
    if (y.shape == Shape::upper && t + columns.value < end) end = t + columns.value;
    Block<rows.value, columns.value>(x, y, r, t, begin, end).store(out, r, t);
  });
}

// The symmetric a becomes its lower Cholesky factor with an inverted diagonal. [in place]
Matrix cholesky(const Matrix& a) {
  const Matrix f{a.data, a.dim, a.row_stride, a.column_stride, Shape::lower};
  for_blocks(f, [&](auto rows, auto columns, int64_t r, int64_t t) {
    Block<rows.value, columns.value> block(f, f.transposed(), r, t, 0, t);
    block.subtract_from(f, r, t);
    if constexpr (rows.value == columns.value) {
      if (r == t)
        block.cholesky();
      else
        block.solve(f, t);
    } else {
      block.solve(f, t);
    }
    block.store(f, r, t);
  });
  return f;
}

// x = x f^-T, or the triangle that x has, for a lower f with an inverted diagonal. [in place]
void solve(const Matrix& f, const Matrix& x) {
  for_blocks(x, [&](auto rows, auto columns, int64_t r, int64_t t) {
    const int64_t begin = x.shape == Shape::upper ? r : 0;
    Block<rows.value, columns.value> block(x, f.transposed(), r, t, begin, t);
    block.subtract_from(x, r, t);
    block.solve(f, t);
    block.store(x, r, t);
  });
}

void invert_diagonal(const Matrix& x) {
  for (int64_t r = 0; r < x.dim; r++) x(r, r) = 1 / x(r, r);
}

void set_identity(const Matrix& x) {
  for (int64_t r = 0; r < x.dim; r++)
    for (int64_t t = 0; t < x.dim; t++) x(r, t) = broadcast(r == t ? 1.0 : 0.0);
}

// |x|^2 of a full or lower x
V squared_norm(const Matrix& x) {
  V total{};
  for (int64_t r = 0; r < x.dim; r++) {
    V row{};
    for (int64_t t = 0; t < (x.shape == Shape::lower ? r + 1 : x.dim); t++)
      row += x(r, t) * x(r, t);
    total += row;
  }
  return total;
}

// --- between row-major memory and lanes ---

// Where each lane's numbers lie. Lanes beyond the last center repeat it.
template <class T>
struct Lanes {
  const T* start[kLanes];

  template <class Index>
  Lanes(const T* base, int64_t size, int count, Index index) {
    for (int i = 0; i < kLanes; i++) start[i] = base + index(i < count ? i : count - 1) * size;
  }
  Lanes(const T* base, int64_t size, int count)
      : Lanes(base, size, count, [](int i) { return i; }) {}

  V operator[](int64_t element) const {
    typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
    Narrow x{};
    for (int i = 0; i < kLanes; i++) x[i] = start[i][element];
    return __builtin_convertvector(x, V);
  }
};

// F x^T F of each lane's lower triangle x [D, D].
template <class T>
Matrix load_turned(const Lanes<T>& x, Scratch& scratch) {
  const Matrix out = scratch.matrix(Shape::lower);
  const int64_t last = out.dim - 1;
  for (int64_t r = 0; r <= last; r++) {
    for (int64_t t = 0; t <= r; t++) out(last - t, last - r) = x[r * out.dim + t];
    for (int64_t t = r + 1; t <= last; t++) out(last - t, last - r) = V{};
  }
  return out;
}

// The lower triangles of factor F x^T F, to out [count, D, D].
template <class T>
void store_turned(const Matrix& x, V factor, int count, T* out) {
  const int64_t dim = x.dim, last = dim - 1;
  memset(out, 0, count * dim * dim * sizeof(T));
  for (int64_t r = 0; r < dim; r++)
    for (int64_t t = 0; t <= r; t++) {
      const V value = factor * x(last - t, last - r);
      for (int i = 0; i < count; i++) out[(i * dim + r) * dim + t] = static_cast<T>(value[i]);
    }
}

// q, or the diagonal of it where s is diagonal.
struct Scale {
  Matrix matrix;
  V* diagonal;  // [D], or null
};

// The inputs of up to kLanes centers.
template <class T>
struct Centers {
  const Components<T>& components;
  int64_t first;
  int count;

  Matrix load_l(Scratch& scratch) const {
    const int64_t size = components.dim * components.dim;
    const int64_t K = components.num_centers / components.num_components;
    return load_turned(Lanes<T>(components.precision_cholesky, size, count,
                                [&](int i) { return (first + i) / K; }),
                       scratch);
  }

  Scale load_q(Scratch& scratch) const {
    const int64_t dim = components.dim, size = components.full_scale ? dim * dim : dim;
    const Lanes<T> s(components.scale + first * size, size, count);
    if (components.full_scale) return {load_turned(s, scratch), nullptr};
    V* diagonal = scratch.vector();
    for (int64_t r = 0; r < dim; r++) diagonal[dim - 1 - r] = s[r];
    return {{}, diagonal};
  }

  void store_diagonal(const V* x, T* out) const {
    const int64_t dim = components.dim;
    for (int64_t r = 0; r < dim; r++)
      for (int i = 0; i < count; i++) out[i * dim + r] = static_cast<T>(x[dim - 1 - r][i]);
  }

  // F x^T F of x [count, D, D].
  Matrix load(const T* x, Scratch& scratch) const {
    return load_turned(Lanes<T>(x, components.dim * components.dim, count), scratch);
  }
};

// --- forward ---

// y = l q^T
Matrix scaled(const Matrix& l, const Scale& q, Scratch& scratch) {
  const Matrix y = scratch.matrix(q.diagonal ? Shape::lower : Shape::full);
  if (q.diagonal) {
    for (int64_t r = 0; r < y.dim; r++)
      for (int64_t t = 0; t < y.dim; t++) y(r, t) = l(r, t) * q.diagonal[t];
  } else {
    multiply(l, q.matrix.transposed(), y);
  }
  return y;
}

// u of u u^T = I + y y^T, its diagonal inverted.
Matrix marginal_factor(const Matrix& y, Scratch& scratch) {
  const Matrix u = scratch.matrix(Shape::lower);
  multiply(y, y.transposed(), u);
  for (int64_t r = 0; r < u.dim; r++) u(r, r) += 1;
  cholesky(u);
  return u;
}

// w = q^-1
Matrix inverse(const Scale& q, Scratch& scratch) {
  const Matrix w = scratch.matrix(Shape::lower);
  set_identity(w);
  if (q.diagonal) {
    for (int64_t r = 0; r < w.dim; r++) w(r, r) = 1 / q.diagonal[r];
  } else {
    invert_diagonal(q.matrix);
    solve(q.matrix, w.transposed());
  }
  return w;
}

// A product of positive numbers, its exponent kept apart: it does not overflow, and its logarithm
// takes the place of one for each factor.
class Product {
  using IntVec = Simd<double>::IntVec;

 public:
  void multiply(V x) {
    const IntVec bits = (IntVec)(mantissa_ * x);
    exponent_ += (bits >> 52) - 1023;
    mantissa_ = (V)((bits & ((int64_t{1} << 52) - 1)) | (IntVec)broadcast(1.0));
  }
  double log(int lane) const { return ::log(mantissa_[lane]) + exponent_[lane] * M_LN2; }

 private:
  V mantissa_ = broadcast(1.0);  // in [1, 2)
  IntVec exponent_ = {};
};

template <class T>
void forward(const Components<T>& components, int64_t first, int count, T* whitening,
             double* log_density, double* condition, double* memory) {
  Scratch scratch(memory, components.dim);
  const Centers<T> centers{components, first, count};
  Matrix w;
  V squares{};  // tr(Lambda S)
  if (!components.precision_cholesky) {
    w = inverse(centers.load_q(scratch), scratch);
  } else {
    w = centers.load_l(scratch);
    if (components.scale) {
      const Matrix y = scaled(w, centers.load_q(scratch), scratch);
      if (components.expected)
        squares = squared_norm(y);
      else
        solve(marginal_factor(y, scratch), w.transposed());
    }
  }
  store_turned(w, broadcast(1.0), count, whitening);

  Product determinant;
  V smallest = w(0, 0);
  for (int64_t r = 0; r < w.dim; r++) {
    determinant.multiply(w(r, r));
    smallest = min<double>(smallest, w(r, r));
  }
  const V norm = squared_norm(w);
  for (int i = 0; i < count; i++) {
    const bool good = smallest[i] >= DBL_MIN && norm[i] <= DBL_MAX && squares[i] <= DBL_MAX;
    log_density[i] = good ? determinant.log(i) - 0.5 * squares[i] : NAN;
    condition[i] = ::sqrt(norm[i]) / smallest[i];
  }
}

// --- backward ---
//
// With b = F grad_A^T F, g = grad_offset, and tril(.) the lower triangle with its diagonal:
//
//   marginal   M = tril(b w^T) + g I, made symmetric,   grad_q = -tril(q w^T M w),
//              grad_l = tril(u^-T M u^-1 l^-T)
//   expected   grad_q = -g tril(q l^T l),   grad_l = b + g (diag(1 / l_rr) - tril(l q^T q))
//   no Lambda^-1   grad_q = -tril(w^T b w^T) - g diag(w)
//
// The marginal one follows from d(w^T w) = -w^T w dSigma w^T w, so that no Cholesky factorisation
// is differentiated: gradients of q need neither l nor u.

// v M v^T for an upper v and a symmetric M; with diagonal_only, the diagonal of it alone.
Matrix congruence(const Matrix& v, const Matrix& M, bool diagonal_only, Scratch& scratch) {
  const Matrix vM = scratch.matrix(diagonal_only ? Shape::upper : Shape::full);
  const Matrix out = scratch.matrix(Shape::symmetric);
  multiply(v, M, vM);
  if (diagonal_only) {
    for (int64_t r = 0; r < v.dim; r++) {
      out(r, r) = V{};
      for (int64_t t = r; t < v.dim; t++) out(r, r) += vM(r, t) * v(r, t);
    }
  } else {
    multiply(vM, v.transposed(), out);
  }
  return out;
}

// -g tril(q H), or its diagonal.
template <class T>
void store_scale_gradient(const Scale& q, const Matrix& H, V g, const Centers<T>& centers,
                          T* grad_scale, Scratch& scratch) {
  if (q.diagonal) {
    V* grad_q = scratch.vector();
    for (int64_t r = 0; r < H.dim; r++) grad_q[r] = -g * q.diagonal[r] * H(r, r);
    centers.store_diagonal(grad_q, grad_scale);
  } else {
    const Matrix product = scratch.matrix(Shape::lower);
    multiply(q.matrix, H, product);
    store_turned(product, -g, centers.count, grad_scale);
  }
}

template <class T>
void backward_marginal(const Centers<T>& centers, const T* whitening, const T* grad_whitening, V g,
                       T* grad_scale, double* grad_precision, Scratch& scratch) {
  const Matrix w = centers.load(whitening, scratch), b = centers.load(grad_whitening, scratch);
  const Scale q = centers.load_q(scratch);
  const Matrix M = scratch.matrix(Shape::symmetric);
  multiply(b, w.transposed(), M);
  for (int64_t r = 0; r < M.dim; r++) M(r, r) += g;

  if (grad_precision) {
    const Matrix l = centers.load_l(scratch);
    const Matrix u = marginal_factor(scaled(l, q, scratch), scratch);
    const Matrix u_inverse = scratch.matrix(Shape::lower);
    set_identity(u_inverse);
    solve(u, u_inverse.transposed());
    Matrix grad_l = congruence(u_inverse.transposed(), M, false, scratch);
    grad_l.shape = Shape::lower;
    invert_diagonal(l);
    solve(l, grad_l);
    store_turned(grad_l, broadcast(1.0), centers.count, grad_precision);
  }
  if (grad_scale) {
    const Matrix H = congruence(w.transposed(), M, q.diagonal, scratch);
    store_scale_gradient(q, H, broadcast(1.0), centers, grad_scale, scratch);
  }
}

// S' = q^T q
Matrix scale_square(const Scale& q, Scratch& scratch) {
  const Matrix out = scratch.matrix(Shape::symmetric);
  if (q.diagonal) {
    for (int64_t r = 0; r < out.dim; r++)
      for (int64_t t = 0; t < out.dim; t++)
        out(r, t) = r == t ? q.diagonal[r] * q.diagonal[r] : V{};
  } else {
    multiply(q.matrix.transposed(), q.matrix, out);
  }
  return out;
}

template <class T>
void backward_expected(const Centers<T>& centers, const T* grad_whitening, V g, T* grad_scale,
                       double* grad_precision, Scratch& scratch) {
  const Matrix l = centers.load_l(scratch);
  const Scale q = centers.components.scale ? centers.load_q(scratch) : Scale{};
  if (grad_precision) {
    const Matrix grad_l = centers.load(grad_whitening, scratch);
    for (int64_t r = 0; r < l.dim; r++) grad_l(r, r) += g / l(r, r);
    if (centers.components.scale) {
      const Matrix product = scratch.matrix(Shape::lower);
      multiply(l, scale_square(q, scratch), product);
      for (int64_t r = 0; r < l.dim; r++)
        for (int64_t t = 0; t <= r; t++) grad_l(r, t) -= g * product(r, t);
    }
    store_turned(grad_l, broadcast(1.0), centers.count, grad_precision);
  }
  if (grad_scale) {
    const Matrix H = scratch.matrix(Shape::symmetric);
    multiply(l.transposed(), l, H);
    store_scale_gradient(q, H, g, centers, grad_scale, scratch);
  }
}

template <class T>
void backward_without_precision(const Centers<T>& centers, const T* whitening,
                                const T* grad_whitening, V g, T* grad_scale, Scratch& scratch) {
  const Matrix w = centers.load(whitening, scratch), b = centers.load(grad_whitening, scratch);
  if (!centers.components.full_scale) {
    V* grad_q = scratch.vector();
    for (int64_t r = 0; r < w.dim; r++) grad_q[r] = -(b(r, r) * w(r, r) + g) * w(r, r);
    centers.store_diagonal(grad_q, grad_scale);
  } else {
    const Matrix wb = scratch.matrix(Shape::lower), product = scratch.matrix(Shape::lower);
    multiply(w.transposed(), b, wb);
    multiply(wb, w.transposed(), product);
    for (int64_t r = 0; r < w.dim; r++) product(r, r) += g * w(r, r);
    store_turned(product, broadcast(-1.0), centers.count, grad_scale);
  }
}

template <class T>
void backward(const Components<T>& components, int64_t first, int count, const T* whitening,
              const T* grad_whitening, const T* grad_offsets, T* grad_scale, double* grad_precision,
              double* memory) {
  Scratch scratch(memory, components.dim);
  const Centers<T> centers{components, first, count};
  const V g = Lanes<T>(grad_offsets, 1, count)[0];
  if (!components.precision_cholesky)
    backward_without_precision(centers, whitening, grad_whitening, g, grad_scale, scratch);
  else if (components.expected || !components.scale)
    backward_expected(centers, grad_whitening, g, grad_scale, grad_precision, scratch);
  else
    backward_marginal(centers, whitening, grad_whitening, g, grad_scale, grad_precision, scratch);
}

template <class T>
constexpr ComponentsKernels<T> kernels = {kLanes, Scratch::size, forward<T>, backward<T>};

}  // namespace

template <class T>
const ComponentsKernels<T>& ComponentsKernels<T>::VMM_ISA() {
  return kernels<T>;
}
template const ComponentsKernels<float>& ComponentsKernels<float>::VMM_ISA();
template const ComponentsKernels<double>& ComponentsKernels<double>::VMM_ISA();

}  // namespace vmm
