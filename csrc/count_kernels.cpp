// A cell's counts are gone through twice. The first pass takes every gene for a zero, in vectors,
// and notes where others are; the second takes these, in vectors of their own: small counts in T,
// the rest in double. So neither pays for the other's functions.
//
// With u = mu / theta a zero has the log-probability t = -theta log(1 + u), under dropout
// log((1 + e^(t-l)) / (1 + e^-l)).
#include "count_kernels.h"

#include "simd.h"

namespace vmm {
namespace {

using std::int32_t;
using std::int64_t;

enum class Model { poisson, negative_binomial, zero_inflated };

constexpr int kSmall = 8;  // largest count whose probability is a product
constexpr double kLeast = 1e-15;
constexpr double kLogRoot2Pi = 0.91893853320467274178;

// --- vectors ---

template <class T>
Vec<T> load(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
void store(Vec<T> x, T* p) {
  __builtin_memcpy(p, &x, sizeof x);
}

template <class T>
T sum_of_lanes(Vec<T> x) {
  T sum = 0;
  for (int lane = 0; lane < Simd<T>::lanes; lane++) sum += x[lane];
  return sum;
}

template <class T>
bool any(Vec<T> x, T above) {
  T greatest = x[0];
  for (int lane = 1; lane < Simd<T>::lanes; lane++)
    greatest = greatest < x[lane] ? x[lane] : greatest;
  return greatest > above;
}

template <class T>
Vec<T> absolute(Vec<T> x) {
  return x < 0 ? -x : x;
}

// log(1 + u) for u >= 0.
template <class T>
Vec<T> log_one_plus(Vec<T> u) {
  const Vec<T> w = u + 1;
  return log_of_sum<T, true>(w, u - (w - 1));
}

// log(1 + u) - u / (1 + u) for u >= 0, given both; a small u's by its series, the sum over k of
// (-u)^k (k - 1) / k.
template <class T>
Vec<T> log_excess(Vec<T> u, Vec<T> log1p, Vec<T> share) {
  constexpr int terms = sizeof(T) == 4 ? 6 : 13;
  Vec<T> p = broadcast<T>(0);
  for (int k = terms + 1; k >= 2; k--) p = p * u + T(k % 2 ? 1 - k : k - 1) / T(k);
  return u < T(0.0625) ? u * u * p : log1p - share;
}

// --- one gene in a lane ---

template <class T>
struct Genes {
  Vec<T> x, mu, theta, l;

  // Comparisons lose a NaN in l; arithmetic keeps one in the others.
  Vec<T> marked(Vec<T> result) const { return l == l ? result : l; }
};

template <class T>
struct Derivatives {
  Vec<T> mu, theta, l;
};

template <class T>
Vec<T> at_least(Vec<T> x) {
  return x < T(kLeast) ? broadcast<T>(T(kLeast)) : x;  // a NaN stays
}

// The sum of log(1 + d) for many d from -1/2 to 1: of small ones by their series, of the others as
// one logarithm of their product.
template <class T>
class SumOfLogs {
 public:
  void add(Vec<T> d) {
    constexpr int terms = sizeof(T) == 4 ? 6 : 13;
    Vec<T> p = broadcast<T>(0);
    for (int k = terms; k >= 1; k--) p = p * d + T(k % 2 ? 1 : -1) / T(k);
    const auto is_small = absolute<T>(d) < T(0.0625);
    sum_ += is_small ? d * p : Vec<T>{};
    product_ *= is_small ? broadcast<T>(1) : d + 1;
    if (++factors_ == 64) flush();  // 2^64 is far from overflowing
  }
  Vec<T> sum() {
    flush();
    return sum_;
  }

 private:
  void flush() {
    sum_ += log<T>(product_);
    product_ = broadcast<T>(1);
    factors_ = 0;
  }
  Vec<T> product_ = broadcast<T>(1), sum_{};
  int factors_ = 0;
};

// log(1 + u), t and, for zero inflation, e^-|a| and e^-|a + t| of a zero, with a = -l: of the
// larger of 1 and e^(t-l), and of 1 and e^-l, the logarithms leave together max(t, -max(a, 0)).
template <class T, bool inflated>
struct Zero {
  Vec<T> u, log1p, t, a, e, f;

  explicit Zero(const Genes<T>& g) : u(g.mu / g.theta), log1p(log_one_plus<T>(u)) {
    t = -g.theta * log1p;
    if (!inflated) return;
    a = -g.l;
    e = exp<T>(-absolute<T>(a + t));
    f = exp<T>(-absolute<T>(a));
  }
};

// log p(0) where the counts are 0, else 0; log((1 + e) / (1 + f)) of it goes to `logs`.
template <class T, Model model>
Vec<T> zero(const Genes<T>& g, SumOfLogs<T>* logs) {
  const auto is_zero = g.x == 0;
  if (model == Model::poisson) return is_zero ? -g.mu : Vec<T>{};
  const Zero<T, model == Model::zero_inflated> z(g);
  if (model == Model::negative_binomial) return is_zero ? z.t : Vec<T>{};
  logs->add(is_zero ? (z.e - z.f) / (z.f + 1) : Vec<T>{});
  const Vec<T> below = z.a > 0 ? -z.a : Vec<T>{};
  return is_zero ? g.marked(max<T>(z.t, below)) + (z.t - z.t) : Vec<T>{};
}

// Derivatives of log p(0).
template <class T, Model model>
Derivatives<T> zero_derivatives(const Genes<T>& g) {
  Derivatives<T> d{};
  if (model == Model::poisson) {
    d.mu = broadcast<T>(-1);
    return d;
  }
  const Zero<T, model == Model::zero_inflated> z(g);
  Vec<T> weight = broadcast<T>(1);
  if (model == Model::zero_inflated) {
    const Vec<T> one_e = z.e + 1, one_f = z.f + 1, over = 1 / (one_e * one_f);
    const Vec<T> over_e = over * one_f, over_f = over * one_e;
    weight = g.marked(z.a + z.t > 0 ? over_e : z.e * over_e);
    d.l = (z.a > 0 ? over_f : z.f * over_f) - weight;
  }
  const Vec<T> w = 1 / (1 + z.u);
  d.mu = -weight * w;
  d.theta = -weight * log_excess<T>(z.u, z.log1p, z.u * w);
  return d;
}

// What dropout adds to a positive count's log p, log(1 - pi) = -log(1 + e^l).
template <class T, bool derive>
Vec<T> kept(const Genes<T>& g, Derivatives<T>* d) {
  const Vec<T> e = exp<T>(-absolute<T>(g.l));
  if (derive) {
    const Vec<T> over = 1 / (1 + e);
    d->l = g.marked(g.l > 0 ? -over : -e * over);
    return Vec<T>{};
  }
  return g.marked((g.l > 0 ? -g.l : broadcast<T>(0)) - log_one_plus<T>(e));
}

// log p(x) for whole x from 1 to kSmall.
template <class T, Model model, bool derive>
Vec<T> small(const Genes<T>& g, Derivatives<T>* d) {
  constexpr bool poisson = model == Model::poisson;
  // Factors (theta + k) q / (k + 1), or mu / (k + 1), are neither large nor small two at a time.
  const Vec<T> r = poisson ? g.mu : g.theta + g.mu, q = poisson ? g.mu : g.mu / r;
  Vec<T> result = Vec<T>{}, digammas = Vec<T>{};
  for (int k = 0; k < kSmall; k += 2) {
    if (k && !any<T>(g.x, T(k))) break;
    const Vec<T> first = poisson ? broadcast<T>(1) : g.theta + T(k);
    const Vec<T> second = poisson ? first : first + 1;
    if (derive) {
      const auto both = g.x > T(k + 1);
      const Vec<T> over = both ? first * second : first;
      const Vec<T> terms = (both ? first + second : broadcast<T>(1)) / over;
      digammas += g.x > T(k) ? terms : Vec<T>{};
    } else {
      const Vec<T> one = first * q * (T(1) / (k + 1)), two = second * q * (T(1) / (k + 2));
      const Vec<T> p = g.x > T(k + 1) ? one * two : one;
      result += g.x > T(k) ? log<T>(p) : Vec<T>{};
    }
  }
  if (poisson) {
    if (derive) d->mu = g.x / g.mu - 1;
    return result - g.mu;
  }
  const Vec<T> u = g.mu / g.theta, log1p = log_one_plus<T>(u);
  if (derive) {
    d->mu = g.theta / r * (g.x / g.mu - 1);
    d->theta = digammas - g.x / r - log_excess<T>(u, log1p, g.mu / r);
  }
  result -= g.theta * log1p;
  if (model == Model::zero_inflated) result += kept<T, derive>(g, d);
  return result;
}

// --- other counts, in double ---

using Vd = Vec<double>;

// What Stirling's series of log Gamma(w) and its derivative have behind (w - 1/2) log w - w + log
// sqrt(2 pi) and log w, for w >= 8 (DLMF 5.11.1, 5.11.2).
Vd stirling(Vd w) {
  const Vd v = 1 / w, vv = v * v;
  constexpr double c[] = {-3617.0 / 122400, 1.0 / 156,  -691.0 / 360360, 1.0 / 1188,
                          -1.0 / 1680,      1.0 / 1260, -1.0 / 360,      1.0 / 12};
  Vd p = broadcast<double>(c[0]);
  for (int k = 1; k < 8; k++) p = p * vv + c[k];
  return p * v;
}

Vd stirling_derivative(Vd w) {
  const Vd v = 1 / w, vv = v * v;
  constexpr double c[] = {3617.0 / 8160, -1.0 / 12,  691.0 / 32760, -1.0 / 132,
                          1.0 / 240,     -1.0 / 252, 1.0 / 120,     -1.0 / 12};
  Vd p = broadcast<double>(c[0]);
  for (int k = 1; k < 8; k++) p = p * vv + c[k];
  return p * vv - 0.5 * v;
}

// v (v + 1) .. (v + 7)
Vd rising(Vd v) {
  Vd product = v;
  for (int k = 1; k < kSmall; k++) product *= v + double(k);
  return product;
}

// 1 / v + 1 / (v + 1) + .. + 1 / (v + 7), by one division.
Vd reciprocals(Vd v) {
  Vd sum = broadcast(1.0), product = v;
  for (int k = 1; k < kSmall; k++) {
    const Vd next = v + double(k);
    sum = sum * next + product;
    product *= next;
  }
  return sum / product;
}

// log p(x) for any x > 0. Gamma(x + theta) / Gamma(theta) comes as a ratio, which keeps its digits
// where theta is much larger than x.
template <Model model, bool derive>
Vd large(const Genes<double>& g, Derivatives<double>* d) {
  const Vd x = g.x, mu = g.mu, theta = g.theta, w = x + (1.0 + kSmall);
  Vd result{};
  if (!derive) {
    const Vd log_gamma = (w - 0.5) * log<double>(w) - w + kLogRoot2Pi + stirling(w);
    result = log<double>(rising(x + 1)) - log_gamma;  // -log x!
  }
  if (model == Model::poisson) {
    if (derive)
      d->mu = x / mu - 1;
    else
      result += x * log<double>(mu) - mu;
  } else {
    const Vd r = theta + mu, u = mu / theta, log1p = log_one_plus<double>(u);
    const Vd s = theta + double(kSmall), y = x + s, log_ratio = log_one_plus<double>(x / s);
    if (derive) {
      const Vd digammas = log_ratio + stirling_derivative(y) - stirling_derivative(s) +
                          reciprocals(theta) - reciprocals(theta + x);
      d->mu = theta / r * (x / mu - 1);
      d->theta = digammas - x / r - log_excess<double>(u, log1p, mu / r);
    } else {
      result += x * log<double>(y * (mu / r)) - x + (s - 0.5) * log_ratio;
      result += stirling(y) - stirling(s);
      result += log<double>(rising(theta) / rising(theta + x)) - theta * log1p;
    }
    if (model == Model::zero_inflated) result += kept<double, derive>(g, d);
  }
  const Vd nan = broadcast(__builtin_nan(""));
  const auto outside = !(x >= 0);  // a NaN as well
  if (derive) {
    d->mu = outside ? nan : d->mu;
    d->theta = outside ? nan : d->theta;
    d->l = outside ? nan : d->l;
  }
  return outside ? nan : result;
}

// --- a cell ---

// Where the counts are that the first pass is not for.
struct Positions {
  int32_t *small, *large;
  int num_small = 0, num_large = 0;

  template <class T>
  Positions(const CountRow<T>& row, int32_t* memory) : small(memory), large(memory + row.genes) {
    add(row.counts, add_vectors(row.counts, row.genes), row.genes);
  }

 private:
  template <class T>
  void add(const T* counts, int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++) {
      const T x = counts[g];
      const bool is_small = x > 0 && x <= kSmall && x == T(int(x));
      small[num_small] = large[num_large] = static_cast<int32_t>(g);
      num_small += is_small;
      num_large += x != 0 && !is_small;
    }
  }

  // Returns how many counts it has been through: vectors can do with an instruction of some sets
  // what else is one count after the other.
  template <class T>
  int64_t add_vectors(const T*, int64_t) {
    return 0;
  }
#if VMM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  int64_t add_vectors(const float* counts, int64_t genes) {
    const __m512 zero = _mm512_setzero_ps(), most = _mm512_set1_ps(kSmall);
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i sixteen = _mm512_set1_epi32(16);
    int64_t g = 0;
    for (; g + 16 <= genes; g += 16, lane = _mm512_add_epi32(lane, sixteen)) {
      const __m512 x = _mm512_loadu_ps(counts + g);
      const __mmask16 above = _mm512_cmp_ps_mask(x, zero, _CMP_NEQ_UQ);  // a NaN as well
      const __mmask16 in_range =
          _mm512_cmp_ps_mask(x, zero, _CMP_GT_OQ) & _mm512_cmp_ps_mask(x, most, _CMP_LE_OQ);
      const __m512i whole = _mm512_maskz_cvttps_epi32(in_range, x);
      const __mmask16 is_small = _mm512_mask_cmp_ps_mask(
          in_range, x, _mm512_maskz_cvtepi32_ps(in_range, whole), _CMP_EQ_OQ);
      // Whole vectors are written: there is room for them, as g lanes at most are behind.
      _mm512_storeu_si512(small + num_small, _mm512_maskz_compress_epi32(is_small, lane));
      num_small += __builtin_popcount(is_small);
      if (const unsigned rest = above & ~is_small) {
        _mm512_storeu_si512(large + num_large, _mm512_maskz_compress_epi32(rest, lane));
        num_large += __builtin_popcount(rest);
      }
    }
    return g;
  }
#endif
};

// A row, [first, first + count) of it; lanes behind that hold counts that are not 0.
template <class T, Model model>
Genes<T> neighbours(const CountRow<T>& row, int64_t first, int64_t count) {
  Genes<T> g{broadcast<T>(1), broadcast<T>(1), broadcast<T>(1), broadcast<T>(0)};
  const auto read = [=](const T* from, Vec<T>& into) {
    if (count >= Simd<T>::lanes)
      into = load(from + first);
    else
      __builtin_memcpy(&into, from + first, count * sizeof(T));
  };
  read(row.counts, g.x);
  read(row.mean, g.mu);
  if (model != Model::poisson) read(row.inverse_dispersion, g.theta);
  if (model == Model::zero_inflated) read(row.dropout_logits, g.l);
  g.mu = at_least<T>(g.mu);
  g.theta = at_least<T>(g.theta);
  return g;
}

template <class U, Model model, class T>
Genes<U> gathered(const CountRow<T>& row, const int32_t* positions, int count) {
  Genes<U> g{broadcast<U>(1), broadcast<U>(1), broadcast<U>(1), broadcast<U>(0)};
  for (int lane = 0; lane < count; lane++) {
    const int32_t p = positions[lane];
    g.x[lane] = row.counts[p];
    g.mu[lane] = row.mean[p];
    if (model != Model::poisson) g.theta[lane] = row.inverse_dispersion[p];
    if (model == Model::zero_inflated) g.l[lane] = row.dropout_logits[p];
  }
  g.mu = at_least<U>(g.mu);
  g.theta = at_least<U>(g.theta);
  return g;
}

template <class T, Model model>
T log_prob(const CountRow<T>& row, int32_t* memory) {
  constexpr int lanes = Simd<T>::lanes, wide = Simd<double>::lanes;
  const Positions positions(row, memory);
  Vec<T> sum{};
  SumOfLogs<T> logs;
  for (int64_t first = 0; first < row.genes; first += lanes) {
    const int64_t count = row.genes - first < lanes ? row.genes - first : lanes;
    const Genes<T> g = neighbours<T, model>(row, first, count);
    sum += zero<T, model>(g, &logs);
  }
  if (model == Model::zero_inflated) sum += logs.sum();
  for (int first = 0; first < positions.num_small; first += lanes) {
    const int left = positions.num_small - first, count = left < lanes ? left : lanes;
    const Genes<T> g = gathered<T, model>(row, positions.small + first, count);
    Vec<T> found = small<T, model, false>(g, nullptr);
    for (int lane = count; lane < lanes; lane++) found[lane] = 0;
    sum += found;
  }
  double rest = 0;
  for (int first = 0; first < positions.num_large; first += wide) {
    const int left = positions.num_large - first, count = left < wide ? left : wide;
    const Genes<double> g = gathered<double, model>(row, positions.large + first, count);
    const Vd found = large<model, false>(g, nullptr);
    for (int lane = 0; lane < count; lane++) rest += found[lane];
  }
  return static_cast<T>(sum_of_lanes<T>(sum) + rest);
}

template <class U, class T>
void put(const Derivatives<U>& d, T grad, const CountRow<T>& row, const CountGradients<T>& out,
         const int32_t* positions, int count) {
  for (int lane = 0; lane < count; lane++) {
    const int32_t p = positions[lane];
    // A mean or inverse dispersion that was raised to the least has no gradient.
    if (out.mean) out.mean[p] = row.mean[p] < T(kLeast) ? 0 : grad * T(d.mu[lane]);
    if (out.inverse_dispersion && !(row.inverse_dispersion[p] < T(kLeast)))
      out.inverse_dispersion[p] += grad * T(d.theta[lane]);
    if (out.dropout_logits) out.dropout_logits[p] = grad * T(d.l[lane]);
  }
}

template <class T, Model model>
void backward(const CountRow<T>& row, T grad, const CountGradients<T>& out, int32_t* memory) {
  constexpr int lanes = Simd<T>::lanes, wide = Simd<double>::lanes;
  const Positions positions(row, memory);
  for (int64_t first = 0; first < row.genes; first += lanes) {
    const int64_t count = row.genes - first < lanes ? row.genes - first : lanes;
    const Genes<T> g = neighbours<T, model>(row, first, count);
    Derivatives<T> d = zero_derivatives<T, model>(g);
    const auto is_zero = g.x == 0;
    const Vec<T> none{};
    const auto mu_counts = (g.mu > T(kLeast)) | (g.mu != g.mu);
    const auto theta_counts = is_zero & ((g.theta > T(kLeast)) | (g.theta != g.theta));
    d.mu = mu_counts ? grad * d.mu : none;
    d.theta = theta_counts ? grad * d.theta : none;
    d.l *= grad;
    const auto write = [=](Vec<T> from, T* to) {
      if (count == lanes)
        store<T>(from, to + first);
      else
        __builtin_memcpy(to + first, &from, count * sizeof(T));
    };
    if (out.mean) write(d.mu, out.mean);
    if (out.dropout_logits) write(d.l, out.dropout_logits);
    if (out.inverse_dispersion) {
      Vec<T> before{};
      __builtin_memcpy(&before, out.inverse_dispersion + first, count * sizeof(T));
      write(before + d.theta, out.inverse_dispersion);
    }
  }
  for (int first = 0; first < positions.num_small; first += lanes) {
    const int left = positions.num_small - first, count = left < lanes ? left : lanes;
    const Genes<T> g = gathered<T, model>(row, positions.small + first, count);
    Derivatives<T> d{};
    small<T, model, true>(g, &d);
    put<T, T>(d, grad, row, out, positions.small + first, count);
  }
  for (int first = 0; first < positions.num_large; first += wide) {
    const int left = positions.num_large - first, count = left < wide ? left : wide;
    const Genes<double> g = gathered<double, model>(row, positions.large + first, count);
    Derivatives<double> d{};
    large<model, true>(g, &d);
    put<double, T>(d, grad, row, out, positions.large + first, count);
  }
}

// --- a mean that comes as logits ---

// Calls body(load, store) for every vector of a row; the last one's missing lanes are loaded
// as `beyond`, and not stored.
template <class T, class Body>
void for_each_vector(int64_t genes, Body body) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t first = 0; first < genes; first += lanes) {
    const int64_t count = genes - first < lanes ? genes - first : lanes;
    body(
        [=](const T* from, T beyond) {
          if (count == lanes) return load(from + first);
          Vec<T> x = broadcast<T>(beyond);
          __builtin_memcpy(&x, from + first, count * sizeof(T));
          return x;
        },
        [=](Vec<T> from, T* to) {
          if (count == lanes)
            store<T>(from, to + first);
          else
            __builtin_memcpy(to + first, &from, count * sizeof(T));
        });
  }
}

template <class T>
void softmax_mean(int64_t genes, const T* logits, T library_size, T* mean) {
  const T lowest = -T(__builtin_inf());
  Vec<T> greatest = broadcast<T>(lowest);
  for_each_vector<T>(
      genes, [&](auto load_from, auto) { greatest = max<T>(greatest, load_from(logits, lowest)); });
  T top = greatest[0];
  for (int lane = 1; lane < Simd<T>::lanes; lane++)
    top = top < greatest[lane] ? greatest[lane] : top;
  Vec<T> sum{};
  for_each_vector<T>(genes, [&](auto load_from, auto store_to) {
    const Vec<T> l = load_from(logits, lowest) - top;
    const Vec<T> e = l == l ? exp<T>(l) : l;  // exp loses a NaN
    sum += e;
    store_to(e, mean);
  });
  const T factor = library_size / sum_of_lanes<T>(sum);
  for_each_vector<T>(
      genes, [&](auto load_from, auto store_to) { store_to(factor * load_from(mean, 0), mean); });
}

template <class T>
T softmax_mean_backward(int64_t genes, const T* mean, T library_size, T* grad) {
  Vec<T> sum{};
  for_each_vector<T>(genes,
                     [&](auto load_from, auto) { sum += load_from(mean, 0) * load_from(grad, 0); });
  // A library size of 0 makes means of 0, which have no gradient.
  const T grad_library_size = library_size == 0 ? 0 : sum_of_lanes<T>(sum) / library_size;
  for_each_vector<T>(genes, [&](auto load_from, auto store_to) {
    store_to(load_from(mean, 0) * (load_from(grad, 0) - grad_library_size), grad);
  });
  return grad_library_size;
}

template <class T>
T any_log_prob(const CountRow<T>& row, int32_t* positions) {
  if (!row.inverse_dispersion) return log_prob<T, Model::poisson>(row, positions);
  if (!row.dropout_logits) return log_prob<T, Model::negative_binomial>(row, positions);
  return log_prob<T, Model::zero_inflated>(row, positions);
}

template <class T>
void any_backward(const CountRow<T>& row, T grad, const CountGradients<T>& out,
                  int32_t* positions) {
  if (!row.inverse_dispersion)
    backward<T, Model::poisson>(row, grad, out, positions);
  else if (!row.dropout_logits)
    backward<T, Model::negative_binomial>(row, grad, out, positions);
  else
    backward<T, Model::zero_inflated>(row, grad, out, positions);
}

template <class T>
constexpr CountKernels<T> kernels = {any_log_prob<T>, any_backward<T>, softmax_mean<T>,
                                     softmax_mean_backward<T>};

}  // namespace

template <class T>
const CountKernels<T>& CountKernels<T>::VMM_ISA() {
  return kernels<T>;
}
template const CountKernels<float>& CountKernels<float>::VMM_ISA();
template const CountKernels<double>& CountKernels<double>::VMM_ISA();

}  // namespace vmm
