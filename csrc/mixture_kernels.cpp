// The whitened mixture's kernels, for one instruction set: the build compiles this file once per
// set, with VMM_ISA its name and VMM_VECTOR_BYTES the width of its registers.
//
//   l_ij = c_j - 1/2 |W_j (z_i - m_j)|^2,    W_j lower triangular
//
// Samples lie in SIMD lanes, so that a component's numbers are broadcast and no lane is ever idle
// for a small D. Subtracting before whitening keeps the precision of centres far from the origin.
// The log-sum-exp is accumulated online (Milakov & Gimelshein 2018) and the backward pass
// recomputes l, so that nothing of size B x J exists.
//
// Everything lives in an unnamed namespace and no standard template is instantiated: the linker
// must never pick one instruction set's copy of a shared inline function for another's.
#include "mixture_kernels.h"

#include <math.h>

#define VMM_CONCAT_(a, b) a##b
#define VMM_CONCAT(a, b) VMM_CONCAT_(a, b)

namespace vmm {
namespace {

using std::int64_t;

template <class T>
struct Scalar;
template <>
struct Scalar<float> {
  using Int = std::int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float exp_lowest = -87.f;
};
template <>
struct Scalar<double> {
  using Int = std::int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_lowest = -708.0;
};

template <class T>
struct Simd {
  using Int = typename Scalar<T>::Int;
  typedef T Vec __attribute__((vector_size(VMM_VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(VMM_VECTOR_BYTES)));
  static constexpr int lanes = VMM_VECTOR_BYTES / sizeof(T);
};

constexpr int kGroup = 4;  // vectors in flight: hides the latency of a multiply-add
constexpr int kVectorsPerChunk = 8;

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
T sum(Vec<T> x) {
  T total = 0;
  for (int i = 0; i < Simd<T>::lanes; i++) total += x[i];
  return total;
}

// exp(r) for |r| <= log(2) / 2; coefficients of Moshier's Cephes library.
Vec<float> exp_reduced(Vec<float> r) {
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.f;
}
Vec<double> exp_reduced(Vec<double> r) {
  Vec<double> rr = r * r;
  Vec<double> p = (rr * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * rr + 1.0;
  p = p * r;
  Vec<double> q = (rr * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * rr;
  q = (q + 2.27265548208155028766e-1) * rr + 2.0;
  return 2.0 * p / (q - p) + 1.0;
}

// exp(x) for x up to a few; exactly 0 below Scalar<T>::exp_lowest.
template <class T>
Vec<T> exp(Vec<T> x) {
  using S = Scalar<T>;
  using IntVec = typename Simd<T>::IntVec;
  constexpr T log2e = T(1.44269504088896340736);
  constexpr T ln2_high = sizeof(T) == 4 ? T(0.693359375) : T(6.93145751953125e-1);
  constexpr T ln2_low = sizeof(T) == 4 ? T(-2.12194440e-4) : T(1.42860682030941723212e-6);
  const auto negligible = x < S::exp_lowest;
  x = max<T>(x, broadcast<T>(S::exp_lowest));
  const Vec<T> shifted = x * log2e + S::round_magic;
  const Vec<T> n = shifted - S::round_magic;
  const Vec<T> r = (x - n * ln2_high) - n * ln2_low;
  const Vec<T> p = exp_reduced(r);
  const IntVec exponent = (IntVec)shifted - (IntVec)broadcast<T>(S::round_magic);
  const Vec<T> result = (Vec<T>)((IntVec)p + (exponent << S::mantissa_bits));
  return negligible ? Vec<T>{} : result;
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

// The vector at an address, which must be aligned to it.
inline const Vec<float>& at(const float* p) { return *reinterpret_cast<const Vec<float>*>(p); }
inline const Vec<double>& at(const double* p) { return *reinterpret_cast<const Vec<double>*>(p); }
inline Vec<float>& at(float* p) { return *reinterpret_cast<Vec<float>*>(p); }
inline Vec<double>& at(double* p) { return *reinterpret_cast<Vec<double>*>(p); }

template <class T>
constexpr int chunk_size() {
  return kVectorsPerChunk * Simd<T>::lanes;
}
template <class T>
constexpr int group_size() {
  return kGroup * Simd<T>::lanes;
}

// l for one group of kGroup vectors. z points at the group's lanes of a chunk [D][chunk]; d (and y,
// unless null) receive z - m and W (z - m) with the same stride.
template <class T>
void log_joint_group(const Component<T>& component, int64_t dim, const T* z, T* d, T* y,
                     Vec<T>* l) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int stride = chunk_size<T>();
  Vec<T> square[kGroup] = {};
  const T* w = component.whitening;
  for (int64_t r = 0; r < dim; r++) {
    const T center = component.center[r];
    Vec<T> row[kGroup] = {};
    for (int v = 0; v < kGroup; v++)
      at(d + r * stride + v * lanes) = at(z + r * stride + v * lanes) - center;
    for (int64_t t = 0; t <= r; t++, w++) {
      const T a = *w;
      for (int v = 0; v < kGroup; v++) row[v] += a * at(d + t * stride + v * lanes);
    }
    for (int v = 0; v < kGroup; v++) square[v] += row[v] * row[v];
    if (y)
      for (int v = 0; v < kGroup; v++) at(y + r * stride + v * lanes) = row[v];
  }
  for (int v = 0; v < kGroup; v++)
    l[v] = max<T>(component.offset - T(0.5) * square[v], broadcast<T>(kLowestLogJoint<T>));
}

// (max, sum of exp(l - max), sum of exp(l - max) (l - max)): associative, and the difference of
// log-sum-exp and expectation, the entropy, is had without cancellation.
template <class T>
struct OnlineSoftmax {
  Vec<T> max_ = broadcast<T>(kLowestLogJoint<T>), sum_ = {}, weighted_ = {};
  void add(Vec<T> l) {
    const Vec<T> top = max<T>(max_, l);
    const Vec<T> gap = max_ - l;  // one exp: of the smaller one
    const Vec<T> e = exp<T>(gap > 0 ? -gap : gap);
    const auto newer = l > max_;
    const Vec<T> scale = newer ? e : broadcast<T>(1);
    const Vec<T> weight = newer ? broadcast<T>(1) : e;
    // A negligible old part must not meet an infinite gap: scale is exactly 0 then.
    weighted_ = (weighted_ + sum_ * (max_ - top)) * scale + weight * (l - top);
    sum_ = sum_ * scale + weight;
    max_ = top;
  }
  Vec<T> log_sum() const {
    Vec<T> out = sum_;
    for (int i = 0; i < Simd<T>::lanes; i++) out[i] = ::log(out[i]);
    return out;
  }
};

template <class T>
int64_t scratch_size(int64_t dim) {
  return (2 * dim + 1) * chunk_size<T>();
}

template <class T>
void log_prob(const PackedMixture<T>& mixture, const T* z, Softmax<T> out, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  for (int first = 0; first < chunk_size<T>(); first += group_size<T>()) {
    OnlineSoftmax<T> softmax[kGroup];
    Vec<T> l[kGroup];
    for (int64_t j = 0; j < mixture.size; j++) {
      log_joint_group<T>(Component<T>(mixture, j), mixture.dim, z + first, scratch, nullptr, l);
      for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
    }
    for (int v = 0; v < kGroup; v++) {
      const int i = first + v * lanes;
      at(out.max + i) = softmax[v].max_;
      at(out.log_sum + i) = softmax[v].log_sum();
      at(out.gap + i) = softmax[v].weighted_ / softmax[v].sum_;
    }
  }
}

template <class T>
T dot(const T* a, const T* b) {
  Vec<T> total{};
  for (int v = 0; v < chunk_size<T>(); v += Simd<T>::lanes) total += at(a + v) * at(b + v);
  return sum<T>(total);
}

template <class T>
void backward(const PackedMixture<T>& mixture, int64_t begin, int64_t end, const T* z,
              Softmax<T> softmax, const T* grad_lse, const T* grad_expected, double* statistics,
              T* grad_z, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int chunk = chunk_size<T>();
  const int64_t dim = mixture.dim;
  T* d = scratch;
  T* y = d + dim * chunk;
  T* weight = y + dim * chunk;
  for (int64_t j = begin; j < end; j++) {
    const Component<T> component(mixture, j);
    bool negligible = true;
    for (int first = 0; first < chunk; first += group_size<T>()) {
      Vec<T> l[kGroup];
      log_joint_group<T>(component, dim, z + first, d + first, y + first, l);
      for (int v = 0; v < kGroup; v++) {
        const int i = first + v * lanes;
        const Vec<T> below = l[v] - at(softmax.max + i);
        const Vec<T> p = exp<T>(below - at(softmax.log_sum + i));
        const Vec<T> w =
            p * (at(grad_lse + i) + at(grad_expected + i) * (1 + below - at(softmax.gap + i)));
        at(weight + i) = w;
        const auto nonzero = w != 0;
        for (int k = 0; k < lanes; k++) negligible &= !nonzero[k];
      }
    }
    if (negligible) continue;  // a far-off component: all its weights are exactly 0

    for (int64_t r = 0; r < dim; r++)
      for (int v = 0; v < chunk; v += lanes) {
        // A far-off component's y may be infinite; its weight of 0 must win.
        const Vec<T> w = at(weight + v);
        at(y + r * chunk + v) = w != 0 ? at(y + r * chunk + v) * w : w;
      }
    if (grad_z)
      for (int first = 0; first < chunk; first += group_size<T>())
        for (int64_t t = 0; t < dim; t++) {
          Vec<T> total[kGroup] = {};
          for (int64_t r = t; r < dim; r++) {
            const T a = component.whitening[r * (r + 1) / 2 + t];
            for (int v = 0; v < kGroup; v++) total[v] += a * at(y + r * chunk + first + v * lanes);
          }
          for (int v = 0; v < kGroup; v++) at(grad_z + t * chunk + first + v * lanes) -= total[v];
        }

    double* out = statistics + j * statistics_size(dim);
    Vec<T> mass{};
    for (int v = 0; v < chunk; v += lanes) mass += at(weight + v);
    *out++ += sum<T>(mass);
    for (int64_t r = 0; r < dim; r++) *out++ += dot(weight, d + r * chunk);
    T* weighted = y;
    for (int64_t r = 0; r < dim; r++) {
      for (int v = 0; v < chunk; v += lanes)
        at(weighted + v) = at(weight + v) * at(d + r * chunk + v);
      for (int64_t t = 0; t <= r; t++) *out++ += dot(weighted, d + t * chunk);
    }
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
  for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
  for (int64_t j = begin + 1; j < end; j++) {
    log_joint_group<T>(Component<T>(mixture, j), mixture.dim, z, scratch, nullptr, l);
    for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
  }
  for (int v = 0; v < kGroup; v++) l[v] = softmax[v].max_ + softmax[v].log_sum();
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
      for (int v = 0; v < kGroup; v++)
        for (int k = 0; k < lanes; k++)
          if (begin == 0 || l[v][k] > softmax[v].max_[k]) label[first + v * lanes + k] = g;
      for (int v = 0; v < kGroup; v++) softmax[v].add(l[v]);
    });
    for (int v = 0; v < kGroup; v++) {
      const int i = first + v * lanes;
      const Vec<T> log_sum = softmax[v].log_sum();
      at(max + i) = softmax[v].max_;
      at(probability + i) = 1 / softmax[v].sum_;
      // Rounding may leave a tiny negative number where one group has all the probability.
      at(entropy + i) = vmm::max<T>(log_sum - softmax[v].weighted_ / softmax[v].sum_, Vec<T>{});
    }
  }
}

template <class T>
constexpr Kernels<T> kernels = {chunk_size<T>(), scratch_size<T>,     log_prob<T>, backward<T>,
                                log_joint<T>,    responsibilities<T>, assign<T>};

}  // namespace

const Kernels<float>& VMM_CONCAT(kernels_f32_, VMM_ISA)() { return kernels<float>; }
const Kernels<double>& VMM_CONCAT(kernels_f64_, VMM_ISA)() { return kernels<double>; }

}  // namespace vmm
