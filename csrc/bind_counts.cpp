// Python bindings of csrc/counts.h, in the order of vmm_fast/operations.py: addresses of the
// tensors (0 is what a model lacks; after that of the inverse dispersion whether it is of genes in
// cells), the sizes B and G, threads, addresses of the results (0 is a gradient that is not
// wanted).
#include "bind.h"
#include "counts.h"

namespace py = pybind11;

namespace {

using std::int64_t;
using vmm::Address;
using vmm::pointer;

template <class T>
vmm::CountModel<T> model(int64_t cells, int64_t genes, Address counts, Address row_starts,
                         Address gene_indices, Address mean, Address inverse_dispersion,
                         bool dispersion_per_cell, Address dropout_logits, Address library_size) {
  return {cells,
          genes,
          pointer<const T>(counts),
          pointer<const int64_t>(row_starts),
          pointer<const int64_t>(gene_indices),
          pointer<const T>(mean),
          pointer<const T>(inverse_dispersion),
          dispersion_per_cell,
          pointer<const T>(dropout_logits),
          pointer<const T>(library_size)};
}

// One function a dtype, told apart by its suffix.
template <class T>
void bind(py::module_& m, const std::string& suffix) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def(("count_log_prob" + suffix).c_str(),
        [](Address x, Address starts, Address genes, Address mean, Address r, bool per_cell,
           Address l, Address n, int64_t B, int64_t G, int threads, Address log_prob) {
          vmm::count_log_prob<T>(model<T>(B, G, x, starts, genes, mean, r, per_cell, l, n), threads,
                                 pointer<T>(log_prob));
        },
        nogil);
  m.def(("count_log_prob_backward" + suffix).c_str(),
        [](Address grad, Address x, Address starts, Address genes, Address mean, Address r,
           bool per_cell, Address l, Address n, int64_t B, int64_t G, int threads,
           Address grad_mean, Address grad_r, Address grad_l, Address grad_n) {
          vmm::count_log_prob_backward<T>(model<T>(B, G, x, starts, genes, mean, r, per_cell, l, n),
                                          pointer<const T>(grad), threads, pointer<T>(grad_mean),
                                          pointer<T>(grad_r), pointer<T>(grad_l),
                                          pointer<T>(grad_n));
        },
        nogil);
}

}  // namespace

void bind_counts(py::module_& m) {
  bind<float>(m, "_float32");
  bind<double>(m, "_float64");
}
