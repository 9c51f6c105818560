// Python bindings of csrc/mixture.h, in the order of vmm_fast/operations.py: addresses of the
// tensors (after that of a scale whether it is of the full form), the sizes B, D, J and K, flags,
// threads, addresses of the results. vmm_fast/dispatch.py checks shapes, dtypes and devices before
// an address is taken.
#include "bind.h"
#include "instruction_set.h"
#include "mixture.h"

namespace py = pybind11;

namespace {

using std::int64_t;
using vmm::Address;
using vmm::pointer;

template <class T>
vmm::Mixture<T> mixture(Address centers, Address whitening, Address offsets, int64_t J, int64_t D,
                        bool transpose) {
  return {pointer<const T>(centers),
          pointer<const T>(whitening),
          pointer<const T>(offsets),
          J,
          D,
          transpose};
}

template <class T>
vmm::Samples<T> samples(Address z, int64_t B) {
  return {pointer<const T>(z), B};
}

// One function a dtype, told apart by its suffix.
template <class T>
void bind(py::module_& m, const std::string& suffix) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def(("mixture_log_prob" + suffix).c_str(),
        [](Address z, Address c, Address w, Address o, int64_t B, int64_t D, int64_t J, bool t,
           int threads, Address lse, Address expected, Address softmax) {
          vmm::log_prob<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B), threads, pointer<T>(lse),
                           pointer<T>(expected), pointer<T>(softmax));
        },
        nogil);
  m.def(("mixture_log_prob_backward" + suffix).c_str(),
        [](Address grad_lse, Address grad_expected, Address z, Address c, Address w, Address o,
           Address softmax, int64_t B, int64_t D, int64_t J, bool t, int threads, Address grad_z,
           Address grad_centers, Address grad_whitening, Address grad_offsets) {
          vmm::log_prob_backward<T>(
              mixture<T>(c, w, o, J, D, t), samples<T>(z, B), threads, pointer<const T>(softmax),
              pointer<const T>(grad_lse), pointer<const T>(grad_expected), pointer<T>(grad_z),
              pointer<T>(grad_centers), pointer<T>(grad_whitening), pointer<T>(grad_offsets));
        },
        nogil);
  m.def(("mixture_kl" + suffix).c_str(),
        [](Address z, Address c, Address w, Address o, Address scale, bool full_scale, int64_t B,
           int64_t D, int64_t J, bool t, int threads, Address kl, Address softmax) {
          vmm::kl<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B),
                     {pointer<const T>(scale), full_scale}, threads, pointer<T>(kl),
                     pointer<T>(softmax));
        },
        nogil);
  m.def(("mixture_kl_backward" + suffix).c_str(),
        [](Address grad_kl, Address z, Address c, Address w, Address o, Address scale,
           bool full_scale, Address softmax, int64_t B, int64_t D, int64_t J, bool t, int threads,
           Address grad_z, Address grad_centers, Address grad_whitening, Address grad_offsets,
           Address grad_scale) {
          vmm::kl_backward<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B),
                              {pointer<const T>(scale), full_scale}, threads,
                              pointer<const T>(softmax), pointer<const T>(grad_kl),
                              pointer<T>(grad_z), pointer<T>(grad_scale), pointer<T>(grad_centers),
                              pointer<T>(grad_whitening), pointer<T>(grad_offsets));
        },
        nogil);
  m.def(("mixture_statistics" + suffix).c_str(),
        [](Address z, Address c, Address w, Address o, int64_t B, int64_t D, int64_t J, bool t,
           int threads, Address N, Address s, Address M) {
          vmm::statistics<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B), threads, pointer<T>(N),
                             pointer<T>(s), pointer<T>(M));
        },
        nogil);
  m.def(("mixture_log_joint" + suffix).c_str(),
        [](Address z, Address c, Address w, Address o, int64_t B, int64_t D, int64_t J, int64_t K,
           bool t, int threads, Address out) {
          vmm::log_joint<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B), K, threads,
                            pointer<T>(out));
        },
        nogil);
  m.def(("mixture_responsibilities" + suffix).c_str(),
        [](Address z, Address c, Address w, Address o, int64_t B, int64_t D, int64_t J, int64_t K,
           bool t, int threads, Address out) {
          vmm::responsibilities<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B), K, threads,
                                   pointer<T>(out));
        },
        nogil);
  m.def(("mixture_assign" + suffix).c_str(),
        [](Address z, Address c, Address w, Address o, int64_t B, int64_t D, int64_t J, int64_t K,
           bool t, int threads, Address label, Address probability, Address entropy) {
          vmm::assign<T>(mixture<T>(c, w, o, J, D, t), samples<T>(z, B), K, threads,
                         pointer<int64_t>(label), pointer<T>(probability), pointer<T>(entropy));
        },
        nogil);
}

}  // namespace

void bind_mixture(py::module_& m) {
  bind<float>(m, "_float32");
  bind<double>(m, "_float64");
  m.def("instruction_set", [] { return vmm::name(vmm::current_instruction_set()); });
}
