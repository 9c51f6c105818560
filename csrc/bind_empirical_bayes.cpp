// Python bindings of csrc/empirical_bayes.h and csrc/adam.h. Arguments are addresses and sizes:
// vmm_fast/inference/empirical_bayes.py and gradient.py check shapes, dtypes and devices first.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "adam.h"
#include "bind.h"
#include "empirical_bayes.h"

namespace py = pybind11;

namespace {

using std::int64_t;
using vmm::Address;
using vmm::pointer;
namespace eb = vmm::empirical_bayes;

eb::Sums sums(Address N, Address s, Address M) {
  return {pointer<double>(N), pointer<double>(s), pointer<double>(M)};
}

// One set of functions a dtype, told apart by their suffix. 0 is the address of what is absent.
template <class T>
void bind(py::module_& m, const std::string& suffix) {
  using Parameters = eb::Parameters<T>;
  const py::call_guard<py::gil_scoped_release> nogil;
  py::class_<Parameters>(m, ("MixtureParameters" + suffix).c_str())
      .def(py::init([](Address centers, Address scale, bool full_scale, Address raw_precision,
                       Address logits, Address raw_alpha, int64_t C, int64_t K, int64_t D) {
        return Parameters{pointer<T>(centers),
                          pointer<const T>(scale),
                          full_scale,
                          pointer<T>(raw_precision),
                          pointer<T>(logits),
                          pointer<T>(raw_alpha),
                          C,
                          K,
                          D};
      }));
  m.def(("constrained" + suffix).c_str(),
        [](const Parameters& parameters, int threads, Address precision_cholesky,
           Address log_weights) {
          eb::constrained<T>(parameters, threads, pointer<T>(precision_cholesky),
                             pointer<T>(log_weights));
        },
        nogil);
  m.def(("map_gradients" + suffix).c_str(),
        [](const Parameters& parameters, Address z, int64_t B, const eb::ParameterPriors& priors,
           bool responsibility_gradient, double prior_weight, int threads, Address centers,
           Address scale, Address raw_precision, Address logits, Address raw_alpha, Address N,
           Address s, Address M) {
          const eb::Sums batch = sums(N, s, M);
          return eb::map_gradients<T>(
              parameters, {pointer<const T>(z), B}, priors, responsibility_gradient, prior_weight,
              threads,
              {pointer<T>(centers), pointer<T>(scale), pointer<T>(raw_precision),
               pointer<T>(logits), pointer<T>(raw_alpha)},
              N ? &batch : nullptr);
        },
        nogil);
  m.def(("mixture_sums" + suffix).c_str(),
        [](const Parameters& parameters, Address z, Address weights, int64_t B, int threads,
           Address N, Address s, Address M) {
          return eb::statistics<T>(parameters, {pointer<const T>(z), B, pointer<const T>(weights)},
                                   threads, sums(N, s, M));
        },
        nogil);
  m.def(("maximise" + suffix).c_str(),
        [](const Parameters& parameters, Address N, Address s, Address M,
           const eb::ParameterPriors& priors, const eb::Learnt& learnt, int threads) {
          eb::maximise<T>(parameters, sums(N, s, M), 1.0, priors, learnt, threads);
        },
        nogil);
  m.def(("online_step" + suffix).c_str(),
        [](const Parameters& parameters, Address N, Address s, Address M, double count, double rate,
           double data_size, bool free_centers, const eb::ParameterPriors& priors,
           const eb::Learnt& learnt, int threads, Address running_N, Address running_s,
           Address running_M, Address running_centers, Address running_steps) {
          eb::online_step<T>(parameters, sums(N, s, M), count, rate, data_size, free_centers,
                             priors, learnt, threads,
                             {sums(running_N, running_s, running_M),
                              pointer<double>(running_centers), pointer<int64_t>(running_steps)});
        },
        nogil);
  // A parameter is its rate, its size and the addresses of gradient, values, moments and step count.
  m.def(("adam_step" + suffix).c_str(),
        [](double beta1, double beta2, double epsilon, int threads,
           const std::vector<std::pair<double, std::array<Address, 6>>>& given) {
          std::vector<vmm::AdamParameter<T>> parameters;
          for (const auto& [rate, addresses] : given) {
            const auto& [size, gradient, parameter, first_moment, second_moment, steps] = addresses;
            parameters.push_back({rate, static_cast<int64_t>(size), pointer<const T>(gradient),
                                  pointer<T>(parameter), pointer<T>(first_moment),
                                  pointer<T>(second_moment), pointer<float>(steps)});
          }
          return vmm::adam_step<T>({beta1, beta2, epsilon}, parameters, threads);
        },
        nogil);
}

}  // namespace

void bind_empirical_bayes(py::module_& m) {
  py::enum_<eb::Weights>(m, "Weights")
      .value("dirichlet", eb::Weights::dirichlet)
      .value("stick_breaking", eb::Weights::stick_breaking);
  py::enum_<eb::MapPrior>(m, "MapPrior")
      .value("none", eb::MapPrior::none)
      .value("fixed", eb::MapPrior::fixed)
      .value("learnt", eb::MapPrior::learnt);
  py::class_<eb::ParameterPriors>(m, "ParameterPriors")
      .def(py::init([](eb::MapPrior map_prior, eb::Weights weights, double discount) {
        return eb::ParameterPriors{map_prior, weights, discount};
      }));
  py::class_<eb::Learnt>(m, "Learnt")
      .def(py::init([](bool centers, bool precision, bool weights, bool concentration) {
        return eb::Learnt{centers, precision, weights, concentration};
      }));
  m.def("maximise_concentration", [](Address counts, int64_t C, double start) {
    return eb::maximise_concentration(pointer<const double>(counts), C, start);
  });
  bind<float>(m, "_float32");
  bind<double>(m, "_float64");
}
