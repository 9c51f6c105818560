// Everything around the kernels: threads, CSR rows, and the sum over cells of a gene's gradient.
#include "counts.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "count_kernels.h"
#include "instruction_set.h"
#include "parallel.h"

namespace vmm {
namespace {

using std::int32_t;
using std::int64_t;

constexpr double kWorkAGene = 100;  // in multiply-adds
// A gene's gradient is summed over so many cells in T, and over these sums in double.
constexpr int64_t kCellsASum = 64;

// A cell's counts. Sparse ones are written into `scratch` [G], which is zero, and taken out again.
template <class T>
class Counts {
 public:
  Counts(const CountModel<T>& m, int64_t b, T* scratch) : m_(m), b_(b), scratch_(scratch) {
    if (scratch_) write(true);
  }
  ~Counts() {
    if (scratch_) write(false);
  }
  const T* get() const { return scratch_ ? scratch_ : m_.counts + b_ * m_.genes; }

 private:
  void write(bool values) const {
    for (int64_t i = m_.row_starts[b_]; i < m_.row_starts[b_ + 1]; i++) {
      T& count = scratch_[m_.gene_indices[i]];
      count = values ? count + m_.counts[i] : T(0);  // of a gene that occurs again: the sum
    }
  }
  const CountModel<T>& m_;
  const int64_t b_;
  T* const scratch_;
};

template <class T>
void check(const CountModel<T>& m) {
  if (!m.row_starts) return;
  bool good = m.row_starts[0] == 0;
  for (int64_t b = 0; b < m.cells; b++) good = good && m.row_starts[b] <= m.row_starts[b + 1];
  for (int64_t i = 0; good && i < m.row_starts[m.cells]; i++)
    good = m.gene_indices[i] >= 0 && m.gene_indices[i] < m.genes;
  if (!good)
    throw std::invalid_argument("counts' sparse indices must lie in its shape, row after row");
}

// What a thread writes to while it is at a cell.
template <class T>
struct Workspace {
  std::vector<int32_t> positions;
  std::vector<T> counts, mean, grad_mean;

  explicit Workspace(const CountModel<T>& m)
      : positions(2 * m.genes),
        counts(m.row_starts ? m.genes : 0),
        mean(m.library_size ? m.genes : 0),
        grad_mean(mean.size()) {}
};

// Runs body(thread, row, b, workspace) over all cells. body must not throw.
template <class T, class Body>
void for_each_cell(const CountModel<T>& m, int threads, Body body) {
  check(m);
  threads = useful_threads(threads, kWorkAGene * static_cast<double>(m.cells * m.genes));
  std::vector<Workspace<T>> workspaces(threads, Workspace<T>(m));
  const auto& kernel = current_kernels<CountKernels<T>>();
  parallel_ranges(m.cells, threads, [&](int thread, int64_t begin, int64_t end) {
    Workspace<T>& w = workspaces[thread];
    for (int64_t b = begin; b < end; b++) {
      const Counts<T> counts(m, b, m.row_starts ? w.counts.data() : nullptr);
      const int64_t at = b * m.genes, of_gene = m.dispersion_per_cell ? at : 0;
      const T* mean = m.mean + at;
      if (m.library_size) {
        kernel.softmax_mean(m.genes, mean, m.library_size[b], w.mean.data());
        mean = w.mean.data();
      }
      const CountRow<T> row{m.genes, counts.get(), mean,
                            m.inverse_dispersion ? m.inverse_dispersion + of_gene : nullptr,
                            m.dropout_logits ? m.dropout_logits + at : nullptr};
      body(thread, row, b, w);
    }
  });
}

// Sums of a gene's gradient over one thread's cells.
template <class T>
struct GeneSums {
  std::vector<T> recent;
  std::vector<double> total;
  int64_t cells = 0;

  explicit GeneSums(int64_t genes) : recent(genes), total(genes) {}
  void count_cell() {
    if (++cells % kCellsASum == 0) flush();
  }
  void flush() {
    for (std::size_t g = 0; g < total.size(); g++) {
      total[g] += recent[g];
      recent[g] = 0;
    }
  }
};

}  // namespace

template <class T>
void count_log_prob(const CountModel<T>& m, int threads, T* log_prob) {
  const auto& kernel = current_kernels<CountKernels<T>>();
  for_each_cell(m, threads, [&](int, const CountRow<T>& row, int64_t b, Workspace<T>& w) {
    log_prob[b] = kernel.log_prob(row, w.positions.data());
  });
}

template <class T>
void count_log_prob_backward(const CountModel<T>& m, const T* grad, int threads, T* grad_mean,
                             T* grad_inverse_dispersion, T* grad_dropout_logits,
                             T* grad_library_size) {
  const auto& kernel = current_kernels<CountKernels<T>>();
  const bool summed = grad_inverse_dispersion && !m.dispersion_per_cell;
  const bool of_mean = grad_mean || grad_library_size;
  std::vector<GeneSums<T>> sums(summed ? threads : 0, GeneSums<T>(m.genes));
  if (grad_inverse_dispersion && m.dispersion_per_cell)
    std::fill_n(grad_inverse_dispersion, m.cells * m.genes, T(0));
  for_each_cell(m, threads, [&](int thread, const CountRow<T>& row, int64_t b, Workspace<T>& w) {
    const int64_t at = b * m.genes;
    T* mean = grad_mean ? grad_mean + at : grad_library_size ? w.grad_mean.data() : nullptr;
    T* theta = summed                    ? sums[thread].recent.data()
               : grad_inverse_dispersion ? grad_inverse_dispersion + at
                                         : nullptr;
    T* logits = grad_dropout_logits ? grad_dropout_logits + at : nullptr;
    kernel.backward(row, grad[b], {mean, theta, logits}, w.positions.data());
    if (m.library_size && of_mean) {
      const T found = kernel.softmax_mean_backward(m.genes, row.mean, m.library_size[b], mean);
      if (grad_library_size) grad_library_size[b] = found;
    }
    if (summed) sums[thread].count_cell();
  });
  if (!summed) return;
  for (auto& sum : sums) sum.flush();
  for (int64_t g = 0; g < m.genes; g++) {
    double total = 0;
    for (const auto& sum : sums) total += sum.total[g];
    grad_inverse_dispersion[g] = static_cast<T>(total);
  }
}

#define VMM_INSTANTIATE(T)                                        \
  template void count_log_prob<T>(const CountModel<T>&, int, T*); \
  template void count_log_prob_backward<T>(const CountModel<T>&, const T*, int, T*, T*, T*, T*);
VMM_INSTANTIATE(float)
VMM_INSTANTIATE(double)

}  // namespace vmm
