// The loops over components of the empirical-Bayes step (empirical_bayes.h), for one instruction
// set: the build compiles this file once per set, with VMM_ISA its name and VMM_VECTOR_BYTES the
// width of its registers. Components lie in SIMD lanes, so that a small D leaves none idle.
//
// Everything lives in an unnamed namespace and no standard template is instantiated: the linker
// must never pick one instruction set's copy of a shared inline function for another's.
#include "empirical_bayes_kernels.h"

#include <float.h>
#include <math.h>

#include "simd.h"
#include "triangular.h"

namespace vmm::empirical_bayes {
namespace {

using std::int64_t;
using V = Vec<double>;

constexpr int kLanes = Simd<double>::lanes;

// --- softplus, as in torch the identity above 20; NaN stays NaN ---

constexpr double kSoftplusLinear = 20;

V bounded_exp(V x) { return exp<double>(min<double>(x, broadcast(kSoftplusLinear))); }

// log(1 + e^x), with full relative precision where e^x is small: the rounding error of u = 1 + e^x
// cancels in log(u) / (u - 1) (Kahan; HP-15C Advanced Functions Handbook, 1982).
V softplus(V x) {
  const V e = bounded_exp(x), u = e + 1, rounded = u - 1;
  const V value = rounded == 0 ? e : log<double>(u) * e / rounded;
  return x <= kSoftplusLinear ? value : x;
}

V softplus_slope(V x) {
  const V e = bounded_exp(x);
  return x > kSoftplusLinear ? broadcast(1.0) : e / (e + 1);
}

// x + log(1 - e^-x) for x > 0, by the same device; 1 - e^-x is 1 above 40.
V inverse_softplus(V x) {
  const V u = exp<double>(-min<double>(x, broadcast(40.0))), y = log<double>(u);
  const V rest = u == 1 ? x : (u - 1) * min<double>(x, broadcast(40.0)) / y;
  return x + log<double>(rest);
}

// --- from memory to lanes and back; the last component fills up the lanes that are left ---

struct Lanes {
  int64_t first;  // index of lane 0 in the array
  int64_t step;   // from a lane to the next
  int count;

  int64_t index(int lane) const { return first + step * (lane < count ? lane : count - 1); }
  Lanes next() const { return {first + 1, step, count}; }
};

template <class S>
V load(const S* array, int64_t size, Lanes lanes, int64_t i) {
  V x{};
  for (int lane = 0; lane < kLanes; lane++)
    x[lane] = static_cast<double>(array[lanes.index(lane) * size + i]);
  return x;
}

template <class S>
void store(V x, S* array, int64_t size, Lanes lanes, int64_t i) {
  for (int lane = 0; lane < lanes.count; lane++)
    array[lanes.index(lane) * size + i] = static_cast<S>(x[lane]);
}

template <class S>
void load_vector(const S* array, int64_t D, Lanes lanes, V* out) {
  for (int64_t r = 0; r < D; r++) out[r] = load(array, D, lanes, r);
}

template <class S>
void load_lower(const S* array, int64_t D, Lanes lanes, V* out) {
  for (int64_t r = 0; r < D; r++)
    for (int64_t t = 0; t <= r; t++) out[r * D + t] = load(array, D * D, lanes, r * D + t);
}

template <class S>
void store_lower(const V* x, int64_t D, Lanes lanes, S* array) {
  for (int64_t r = 0; r < D; r++)
    for (int64_t t = 0; t < D; t++)
      store(t <= r ? x[r * D + t] : V{}, array, D * D, lanes, r * D + t);
}

// L from its unconstrained form, whose diagonal [D] is kept.
template <class T>
void load_precision(const Parameters<T>& p, Lanes components, V* L, V* raw_diagonal) {
  const int64_t D = p.dim;
  load_lower(p.raw_precision, D, components, L);
  for (int64_t r = 0; r < D; r++) {
    raw_diagonal[r] = L[r * D + r];
    L[r * D + r] = softplus(raw_diagonal[r]);
  }
}

class Scratch {
 public:
  Scratch(double* memory, int64_t dim) : next_(reinterpret_cast<V*>(memory)), dim_(dim) {}
  V* vector() { return take(dim_); }
  V* matrix() { return take(dim_ * dim_); }

  // As many as the hungriest kernel takes, gradients().
  static int64_t size(int64_t dim) { return kLanes * (5 * dim * dim + 5 * dim); }

 private:
  V* take(int64_t count) {
    V* taken = next_;
    next_ += count;
    return taken;
  }
  V* next_;
  int64_t dim_;
};

template <class T>
void precision_cholesky(const Parameters<T>& p, int64_t first, int count, T* L_out,
                        double* memory) {
  Scratch scratch(memory, p.dim);
  V *L = scratch.matrix(), *raw_diagonal = scratch.vector();
  load_precision(p, {first, 1, count}, L, raw_diagonal);
  store_lower(L, p.dim, {0, 1, count}, L_out);
}

template <class T>
void expected(const Parameters<T>& p, int64_t first, int count, double* L_out, double* log_det,
              double* condition, double* half_trace, double* memory) {
  const int64_t K = p.per_component, D = p.dim;
  const Lanes components{first, 1, count}, outputs{0, 1, count};
  Scratch scratch(memory, D);
  V *L = scratch.matrix(), *scale = scratch.matrix(), *row = scratch.vector();
  load_precision(p, components, L, row);
  V smallest = L[0], largest = L[0], total = V{}, squares = V{};
  for (int64_t r = 0; r < D; r++) {
    const V diagonal = L[r * D + r];
    total += log<double>(diagonal);
    // Not min(): a NaN must come through.
    smallest = diagonal > smallest ? smallest : diagonal;
    largest = largest > diagonal ? largest : diagonal;
    for (int64_t t = 0; t <= r; t++) squares += L[r * D + t] * L[r * D + t];
  }
  const auto sound = (smallest >= DBL_MIN) & (largest <= DBL_MAX);
  store_lower(L, D, outputs, L_out);
  store(sound ? total : broadcast(double(NAN)), log_det, 1, outputs, 0);
  store(sqrt(squares) / smallest, condition, 1, outputs, 0);

  Lanes centers{first * K, K, count}, out{0, K, count};
  for (int64_t k = 0; k < K; k++, centers = centers.next(), out = out.next()) {
    V trace = V{};
    if (p.scale && p.full_scale) {
      load_lower(p.scale, D, centers, scale);
      for (int64_t t = 0; t < D; t++) {  // row t of s^T L
        for (int64_t u = 0; u < D; u++) row[u] = V{};
        for (int64_t r = t; r < D; r++)
          for (int64_t u = 0; u <= r; u++) row[u] += scale[r * D + t] * L[r * D + u];
        for (int64_t u = 0; u < D; u++) trace += row[u] * row[u];
      }
    } else if (p.scale) {
      load_vector(p.scale, D, centers, scale);
      for (int64_t r = 0; r < D; r++)
        for (int64_t u = 0; u <= r; u++) {
          const V x = scale[r] * L[r * D + u];
          trace += x * x;
        }
    }
    store(0.5 * trace, half_trace, 1, out, 0);
  }
}

template <class T>
void gradients(const Parameters<T>& p, int64_t first, int count, const Weighted& weighted,
               const Gradients<T>& out, double* log_prior, double* memory) {
  const int64_t K = p.per_component, D = p.dim;
  const double data = weighted.data_weight, prior = weighted.prior_weight,
               inverse_v = 1 / weighted.wishart_scale;
  const Sums& sums = weighted.sums;
  const Lanes components{first, 1, count};
  Scratch scratch(memory, D);
  V *L = scratch.matrix(), *Lambda = scratch.matrix(), *second = scratch.matrix(),
    *scale = scratch.matrix(), *product = scratch.matrix();
  V *raw_diagonal = scratch.vector(), *m = scratch.vector(), *moment = scratch.vector(),
    *whitened = scratch.vector(), *diagonal = scratch.vector();
  load_precision(p, components, L, raw_diagonal);
  V mass = V{}, squares = V{}, norm = V{};
  for (int64_t r = 0; r < D; r++) {
    diagonal[r] = V{};  // of Lambda
    for (int64_t t = 0; t <= r; t++) {
      second[r * D + t] = Lambda[r * D + t] = V{};
      diagonal[r] += L[r * D + t] * L[r * D + t];
    }
    norm += diagonal[r];
  }
  if (out.scale && p.full_scale) triangular::add_gram(broadcast(1.0), L, D, Lambda);

  Lanes centers{first * K, K, count};
  for (int64_t k = 0; k < K; k++, centers = centers.next()) {
    const V N = load(sums.N, 1, centers, 0);
    mass += N;
    load_vector(p.centers, D, centers, m);
    for (int64_t r = 0; r < D; r++) squares += m[r] * m[r];
    if (out.centers) {
      load_vector(sums.s, D, centers, moment);
      triangular::times_transposed(L, moment, D, whitened);
      triangular::times(L, whitened, D, moment);
      for (int64_t r = 0; r < D; r++)
        store(prior * m[r] - data * moment[r], out.centers, D, centers, r);
    }
    if (p.scale && p.full_scale) {
      load_lower(p.scale, D, centers, scale);
      for (int64_t r = 0; r < D; r++)
        for (int64_t t = 0; t <= r; t++) squares += scale[r * D + t] * scale[r * D + t];
      if (out.scale) {
        triangular::tril_times(Lambda, scale, D, product);
        for (int64_t r = 0; r < D; r++)
          for (int64_t t = 0; t <= r; t++)
            product[r * D + t] = data * N * product[r * D + t] + prior * scale[r * D + t];
        store_lower(product, D, centers, out.scale);
      }
      if (out.raw_precision) triangular::add_gram(N, scale, D, second);
    } else if (p.scale) {
      load_vector(p.scale, D, centers, scale);
      for (int64_t r = 0; r < D; r++) {
        squares += scale[r] * scale[r];
        second[r * D + r] += N * scale[r] * scale[r];
        if (out.scale) store((data * N * diagonal[r] + prior) * scale[r], out.scale, D, centers, r);
      }
    }
    if (out.raw_precision)
      for (int64_t r = 0; r < D; r++)
        for (int64_t t = 0; t <= r; t++)
          second[r * D + t] += load(sums.M, D * D, centers, r * D + t);
  }
  store(-0.5 * (inverse_v * norm + squares), log_prior, 1, {0, 1, count}, 0);
  if (!out.raw_precision) return;
  triangular::tril_times(second, L, D, product);
  for (int64_t r = 0; r < D; r++) {
    for (int64_t t = 0; t <= r; t++)
      product[r * D + t] = data * product[r * D + t] + prior * inverse_v * L[r * D + t];
    V& x = product[r * D + r];
    x -= (data * mass + prior) / L[r * D + r];
    x *= softplus_slope(raw_diagonal[r]);
  }
  store_lower(product, D, components, out.raw_precision);
}

// (N Lambda + I)^-1 Lambda (N m + s), the mode under N(0, I); or the mean; an empty one stays.
// `shift` [D] receives the way from the new centers to the old.
template <class T>
void maximise_centers(const Parameters<T>& p, Lanes components, const Weighted& weighted,
                      bool map_prior, V* shift, Scratch scratch) {
  const int64_t D = p.dim;
  V *L = scratch.matrix(), *system = scratch.matrix(), *old = scratch.vector(),
    *center = scratch.vector(), *whitened = scratch.vector();
  const V N = weighted.data_weight * load(weighted.sums.N, 1, components, 0);
  load_vector(p.centers, D, components, old);
  load_vector(weighted.sums.s, D, components, center);
  for (int64_t r = 0; r < D; r++) center[r] = N * old[r] + weighted.data_weight * center[r];
  if (map_prior) {
    load_precision(p, components, L, whitened);
    triangular::times_transposed(L, center, D, whitened);
    triangular::times(L, whitened, D, center);
    for (int64_t r = 0; r < D; r++)
      for (int64_t t = 0; t <= r; t++) system[r * D + t] = broadcast(r == t ? 1.0 : 0.0);
    triangular::add_gram(N, L, D, system);
    triangular::factorise(system, D, whitened, sqrt);
    triangular::solve(system, D, center);
  } else {
    for (int64_t r = 0; r < D; r++) center[r] = N > 0 ? center[r] / N : old[r];
  }
  for (int64_t r = 0; r < D; r++) {
    shift[r] = old[r] - center[r];
    store(center[r], p.centers, D, components, r);
  }
}

template <class T>
void maximise_precision(const Parameters<T>& p, Lanes components, const Weighted& weighted,
                        bool map_prior, const V* shift, Scratch scratch) {
  const int64_t K = p.per_component, D = p.dim;
  const double factor = weighted.data_weight;
  const Sums& sums = weighted.sums;
  V *scatter = scratch.matrix(), *scale = scratch.matrix(), *moment = scratch.vector(),
    *pivots = scratch.vector();
  const double ridge = map_prior ? 1 / weighted.wishart_scale : 0;
  V mass = broadcast(map_prior ? 1.0 : 0.0);
  for (int64_t r = 0; r < D; r++)
    for (int64_t t = 0; t <= r; t++) scatter[r * D + t] = broadcast(r == t ? ridge : 0.0);
  Lanes centers{components.first * K, K, components.count};
  for (int64_t k = 0; k < K; k++, centers = centers.next()) {
    const V N = factor * load(sums.N, 1, centers, 0);
    mass += N;
    for (int64_t r = 0; r < D; r++)
      for (int64_t t = 0; t <= r; t++)
        scatter[r * D + t] += factor * load(sums.M, D * D, centers, r * D + t);
    if (shift) {
      load_vector(sums.s, D, centers, moment);
      for (int64_t r = 0; r < D; r++)
        for (int64_t t = 0; t <= r; t++)
          scatter[r * D + t] +=
              factor * (moment[r] * shift[t] + shift[r] * moment[t]) + N * shift[r] * shift[t];
    }
    if (p.scale && p.full_scale) {
      load_lower(p.scale, D, centers, scale);
      triangular::add_gram(N, scale, D, scatter);
    } else if (p.scale) {
      load_vector(p.scale, D, centers, scale);
      for (int64_t r = 0; r < D; r++) scatter[r * D + r] += N * scale[r] * scale[r];
    }
  }
  V largest = V{};
  for (int64_t r = 0; r < D; r++) largest = max<double>(largest, scatter[r * D + r]);
  triangular::factorise(scatter, D, pivots, sqrt);
  // Without the prior, a pivot that is rounding noise of the points' dtype, of some operations, is
  // no evidence of a spread.
  const V least = map_prior ? V{} : largest * (16 * (sizeof(T) == 4 ? FLT_EPSILON : DBL_EPSILON));
  V *inverse = scale, *raw = scatter;
  triangular::invert(scatter, D, inverse);  // scatter = F^T F, so that L is F^-1, scaled
  const V weight = sqrt(mass);
  auto sound = weight == weight;
  for (int64_t r = 0; r < D; r++) {
    sound &= pivots[r] > least;
    for (int64_t t = 0; t <= r; t++) {
      const V x = weight * inverse[r * D + t];
      raw[r * D + t] = t < r ? x : inverse_softplus(x);
      // What a T cannot hold is no maximiser either.
      sound &= max<double>(raw[r * D + t], -raw[r * D + t]) <= (sizeof(T) == 4 ? FLT_MAX : DBL_MAX);
      if (t == r) sound &= x > 0;
    }
  }
  for (int lane = 0; lane < components.count; lane++) {
    if (!sound[lane]) continue;
    T* out = p.raw_precision + (components.first + lane) * D * D;
    for (int64_t r = 0; r < D; r++)
      for (int64_t t = 0; t < D; t++)
        out[r * D + t] = static_cast<T>(t <= r ? raw[r * D + t][lane] : 0);
  }
}

template <class T>
void maximise(const Parameters<T>& p, int64_t first, int count, const Weighted& weighted,
              bool map_prior, Learnt learnt, double* memory) {
  const Lanes components{first, 1, count};
  Scratch scratch(memory, p.dim);
  V* shift = learnt.centers ? scratch.vector() : nullptr;
  if (shift) maximise_centers(p, components, weighted, map_prior, shift, scratch);
  if (learnt.precision) maximise_precision(p, components, weighted, map_prior, shift, scratch);
}

template <class T>
constexpr Kernels<T> kKernels = {kLanes,      Scratch::size, precision_cholesky<T>,
                                 expected<T>, gradients<T>,  maximise<T>};

}  // namespace

template <class T>
const Kernels<T>& Kernels<T>::VMM_ISA() {
  return kKernels<T>;
}
template const Kernels<float>& Kernels<float>::VMM_ISA();
template const Kernels<double>& Kernels<double>::VMM_ISA();

}  // namespace vmm::empirical_bayes
