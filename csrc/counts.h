// Log-likelihoods of cells' counts, on raw row-major pointers: with counts x [B, G], means mu
// [B, G], inverse dispersions theta and the logits l [B, G] of a dropout to zero,
//
//   Poisson            x log mu - mu - log x!
//   negative binomial  log Gamma(x + theta) / (Gamma(theta) x!) + theta log theta / (theta + mu)
//                      + x log mu / (theta + mu)
//   zero-inflated      log((1 - pi) NB(x) + pi [x = 0]),  pi = sigmoid(l)
//
// summed over genes (Grun et al. 2014; Lopez et al. 2018). Zeros need no log-gamma, nor do whole
// counts up to 8, for which Gamma(x + theta) / (Gamma(theta) x!) is a product; others are computed
// in double. Means and inverse dispersions below 1e-15 count as 1e-15, without a gradient; a
// negative count or a NaN gives NaN. A mean may be given by logits a and library sizes n, mu = n
// softmax(a); then nothing of size [B, G] is stored. The same input gives the same bits at one
// thread count.
#pragma once

#include <cstdint>

namespace vmm {

template <class T>
struct CountModel {
  std::int64_t cells, genes;         // B, G
  const T* counts;                   // [B, G], or the values of a CSR matrix
  const std::int64_t* row_starts;    // [B + 1]; null: counts are dense
  const std::int64_t* gene_indices;  // of the values
  const T* mean;                     // [B, G], or its logits
  const T* inverse_dispersion;       // [G] or [B, G]; null: Poisson
  bool dispersion_per_cell;          // [B, G]
  const T* dropout_logits;           // [B, G]; null: not zero-inflated
  const T* library_size;             // [B]; null: mean is no logits
};

// log_prob [B].
template <class T>
void count_log_prob(const CountModel<T>&, int threads, T* log_prob);

// Gradients of sum_b grad_b log_prob_b, each null where it is not asked for, in the shapes of mean,
// inverse_dispersion, dropout_logits and library_size.
template <class T>
void count_log_prob_backward(const CountModel<T>&, const T* grad, int threads, T* grad_mean,
                             T* grad_inverse_dispersion, T* grad_dropout_logits,
                             T* grad_library_size);

}  // namespace vmm
