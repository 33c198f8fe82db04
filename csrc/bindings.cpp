// The one list of native entry points. Each is called with tensors, the op's configuration, and the number of threads; it picks
// the kernels of the instruction set in use.

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "autoregressive.h"
#include "coupling.h"
#include "python_tensor.h"

namespace py = pybind11;

namespace flowkern {

#define FLOWKERN_DECLARE(isa)                                                                                          \
  namespace isa {                                                                                                      \
  int64_t affine_coupling_partials(const Affine&);                                                                     \
  void affine_coupling_forward(const Affine&, const Tensor& x, const Tensor& params, const Tensor& y,                  \
                               const Tensor& logabsdet, double* partial);                                              \
  void affine_coupling_backward(const Affine&, const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x,      \
                                const Tensor& params, const Tensor& dx, const Tensor& dparams);                        \
  void additive_coupling_forward(const Coupling&, const Tensor& x, const Tensor& shift, const Tensor& y);              \
  void plu_weight_forward(const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal, const Tensor& sign,    \
                          const Tensor& permutation, const Tensor& weight, int threads);                               \
  void plu_weight_backward(const Tensor& grad, const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal,   \
                           const Tensor& sign, const Tensor& permutation, const Tensor& dlower, const Tensor& dupper,  \
                           const Tensor& dlog_diagonal, int threads);                                                  \
  void invertible_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,                            \
                                 const Tensor& weight_inverse, const Tensor& known, const Tensor& y,                   \
                                 const Tensor& logabsdet, const Tensor& found, bool inverse, int threads);             \
  void invertible_linear_backward(const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x,                   \
                                  const Tensor& weight, const Tensor& bias, const Tensor& weight_inverse,              \
                                  const Tensor& dx, const Tensor& dweight, const Tensor& dbias, const Tensor& dknown,  \
                                  bool inverse, int threads);                                                          \
  void masked_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& reach,           \
                             const Tensor& rows, const Tensor& columns, const Tensor& y, int threads);                 \
  void masked_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,           \
                              const Tensor& reach, const Tensor& first, const Tensor& rows, const Tensor& columns,     \
                              const Tensor& dx, const Tensor& dweight, const Tensor& dbias, int threads);              \
  void autoregressive_inverse_forward(const Autoregressive* networks, int64_t count, const Tensor& z, const Tensor& x, \
                                      const Tensor& logabsdet, int threads);                                           \
  void autoregressive_inverse_backward(const Autoregressive&, const Tensor& grad, const Tensor& grad_log,              \
                                       const Tensor& x, const Tensor& z, const Tensor& dz, const Tensor* values,       \
                                       const Tensor* grads, int threads);                                              \
  void nearest_code_forward(const Tensor& x, const Tensor& codebook, const Tensor& index, const Tensor& sqdist,        \
                            const Tensor& looked, bool cosine, bool pairs, int threads);                               \
  void discretized_logistic_mixture(const Tensor& x, const Tensor& params, const Tensor& grad, const Tensor& log_prob, \
                                    const Tensor& gradient, int64_t levels, bool compat, int threads);                 \
  void gaussian_kl_forward(const Tensor& mean, const Tensor& log_scale, const Tensor& seed, int64_t offset,            \
                           const Tensor& z, const Tensor& kl, int threads);                                            \
  void gaussian_kl_backward(const Tensor& mean, const Tensor& log_scale, const Tensor& seed, int64_t offset,           \
                            const Tensor& grad, const Tensor& grad_kl, const Tensor& dmean, const Tensor& dlog_scale,  \
                            int threads);                                                                              \
  void dequantize(const Tensor& v, const Tensor& seed, int64_t offset, int64_t levels, double alpha, const Tensor& x,  \
                  const Tensor& logabsdet, int threads);                                                               \
  }                                                                                                                    \
  constexpr Kernels isa##_kernels = {#isa, isa::affine_coupling_partials, isa::affine_coupling_forward,                \
                                     isa::affine_coupling_backward, isa::additive_coupling_forward,                    \
                                     isa::plu_weight_forward,       isa::plu_weight_backward,                          \
                                     isa::invertible_linear_forward, isa::invertible_linear_backward,                  \
                                     isa::masked_linear_forward,    isa::masked_linear_backward,                       \
                                     isa::autoregressive_inverse_forward, isa::autoregressive_inverse_backward,        \
                                     isa::nearest_code_forward,     isa::discretized_logistic_mixture,                 \
                                     isa::gaussian_kl_forward,      isa::gaussian_kl_backward,                         \
                                     isa::dequantize};

struct Kernels {
  const char* isa;
  int64_t (*affine_coupling_partials)(const Affine&);
  void (*affine_coupling_forward)(const Affine&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double*);
  void (*affine_coupling_backward)(const Affine&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&);
  void (*additive_coupling_forward)(const Coupling&, const Tensor&, const Tensor&, const Tensor&);
  void (*plu_weight_forward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int);
  void (*plu_weight_backward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const Tensor&, int);
  void (*invertible_linear_forward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, bool, int);
  void (*invertible_linear_backward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, int);
  void (*masked_linear_forward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, int);
  void (*masked_linear_backward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int);
  void (*autoregressive_inverse_forward)(const Autoregressive*, int64_t, const Tensor&, const Tensor&, const Tensor&, int);
  void (*autoregressive_inverse_backward)(const Autoregressive&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor*, const Tensor*, int);
  void (*nearest_code_forward)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool, int);
  void (*discretized_logistic_mixture)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool,
                                       int);
  void (*gaussian_kl_forward)(const Tensor&, const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, int);
  void (*gaussian_kl_backward)(const Tensor&, const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, int);
  void (*dequantize)(const Tensor&, const Tensor&, int64_t, int64_t, double, const Tensor&, const Tensor&, int);
};

FLOWKERN_DECLARE(baseline)
#ifdef FLOWKERN_X86
FLOWKERN_DECLARE(avx2)
FLOWKERN_DECLARE(avx512)
#endif

// The variants that this processor can run, the best one first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#ifdef FLOWKERN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512_kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels);
#endif
  found.push_back(&baseline_kernels);
  return found;
}

const Kernels* in_use = nullptr;

void use_isa(const std::string& name) {
  std::string known;
  for (const Kernels* k : runnable()) {
    if (name == k->isa) {
      in_use = k;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw py::value_error("FLOWKERN_ISA: this machine does not run '" + name + "'; expected one of " + known);
}

bool forked = false;

bool in_forked_child() { return forked; }

// Large outputs on huge pages: fewer page faults at their first touch. Advice only; memory that is small, or already
// touched, is left as it is.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  int64_t bytes = t.dtype == Dtype::float64 ? 8 : t.dtype == Dtype::float32 ? 4 : 2;
  for (int i = 0; i < t.dims; ++i) bytes *= t.size[i];
  if (bytes < int64_t(4 * huge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data) + huge - 1) & ~(huge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data) + uintptr_t(bytes)) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

// The kernels go where tables say that come as tensors, and so hold whatever their owner wrote: they are looked at first.
[[noreturn]] void refuse(const char* name, const std::string& expected, int64_t got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

// Raises ValueError unless there are `count` numbers, one after the other in memory, from 0 to `end` - 1.
const int32_t* check_table(const char* name, const Tensor& t, int64_t count, int64_t end) {
  if (t.dims != 1 || t.dtype != Dtype::int32) throw py::value_error(std::string(name) + ": expected one dimension of int32");
  if (t.size[0] != count) refuse(name, std::to_string(count) + " numbers", t.size[0]);
  if (count > 1 && t.stride[0] != 1) refuse(name, "stride 1", t.stride[0]);
  const int32_t* numbers = reinterpret_cast<const int32_t*>(t.data);
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) outside |= (numbers[i] < 0) | (numbers[i] >= end);
  for (int64_t i = 0; outside; ++i)
    if (numbers[i] < 0 || numbers[i] >= end) refuse(name, "numbers from 0 to " + std::to_string(end - 1), numbers[i]);
  return numbers;
}

// Raises ValueError for tables that no degrees have, as the top of flowkern/ops/_masked_linear.py defines them. `first`, `rows`
// and `columns` may be absent.
void check_degrees(const Tensor& x, const Tensor& weight, const Tensor& reach, const Tensor& first, const Tensor& rows,
                   const Tensor& columns) {
  const int64_t outputs = weight.size[0], inputs = weight.size[1];
  if (x.size[1] != inputs) refuse("x", std::to_string(inputs) + " columns, as weight has", x.size[1]);
  const int32_t* ends = check_table("reach", reach, outputs, inputs + 1);
  bool falls = false;
  for (int64_t r = 1; r < outputs; ++r) falls |= ends[r] < ends[r - 1];
  if (falls) throw py::value_error("reach: expected numbers that never fall, as those of sorted outputs");
  if (rows.data) check_table("rows", rows, outputs, outputs);
  if (columns.data) check_table("columns", columns, inputs, inputs);
  if (!first.data) return;
  const int32_t* begins = check_table("first", first, inputs, outputs + 1);
  for (int64_t c = 0; c < inputs; ++c) {
    const int64_t r = begins[c];
    if ((r > 0 && ends[r - 1] > c) || (r < outputs && ends[r] <= c)) refuse("first", "the first row of reach that sees a column", r);
  }
}

// The channel numbers of a mask, from each channel's rank among the transformed ones (-1 = kept). `per_channel`: the numbers
// in params for each transformed element; ValueError for a rank that needs others than there are.
struct MaskIndex {
  std::vector<int32_t> moved, kept;

  MaskIndex(const Tensor& rank, Coupling& c, const Tensor& params, int64_t per_channel) {
    if (!rank.data) return;
    if (rank.dims != 1 || rank.dtype != Dtype::int32) throw py::value_error("rank: expected one dimension of int32");
    if (rank.size[0] != c.channels) refuse("rank", std::to_string(c.channels) + " channels", rank.size[0]);
    for (int64_t i = 0; i < rank.size[0]; ++i) {
      const int32_t r = reinterpret_cast<const int32_t*>(rank.data)[i * rank.stride[0]];
      (r < 0 ? kept : moved).push_back(int32_t(i));
    }
    c.moved = moved.data();
    c.kept = kept.data();
    c.moved_count = int64_t(moved.size());
    int64_t given = 1;
    for (int i = 0; i < params.dims; ++i) given *= params.size[i];
    if (given != per_channel * c.batch * c.moved_count * c.height * c.width)
      refuse("rank", "as many transformed channels as there are parameters for", c.moved_count);
  }
};

void describe(Coupling& c, const Tensor& x, int split, bool inverse, int threads) {
  c.batch = x.size[0];
  c.channels = x.size[1];
  c.height = x.dims >= 4 ? x.size[2] : 1;
  c.width = x.dims >= 4 ? x.size[3] : 1;
  c.split = static_cast<Split>(split);
  c.inverse = inverse;
  c.threads = threads;
}

Affine affine(const Tensor& x, int split, int scale, double a, double b, int layout, bool shift_first, bool inverse, int threads) {
  Affine c;
  describe(c, x, split, inverse, threads);
  c.scale = scale;
  c.a = a;
  c.b = b;
  c.layout = layout;
  c.shift_first = shift_first;
  return c;
}

void affine_coupling_forward(const Tensor& x, const Tensor& params, const Tensor& y, const Tensor& logabsdet, const Tensor& rank,
                             int split, int scale, double a, double b, int layout, bool shift_first, bool inverse, int threads) {
  Affine c = affine(x, split, scale, a, b, layout, shift_first, inverse, threads);
  const MaskIndex mask(rank, c, params, 2);
  std::vector<double> partial(size_t(in_use->affine_coupling_partials(c)));
  py::gil_scoped_release release;
  advise_huge_pages(y);
  in_use->affine_coupling_forward(c, x, params, y, logabsdet, partial.data());
}

void affine_coupling_backward(const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x, const Tensor& params,
                              const Tensor& dx, const Tensor& dparams, const Tensor& rank, int split, int scale, double a, double b,
                              int layout, bool shift_first, bool inverse, int threads) {
  Affine c = affine(x, split, scale, a, b, layout, shift_first, inverse, threads);
  const MaskIndex mask(rank, c, params, 2);
  py::gil_scoped_release release;
  advise_huge_pages(dx);
  advise_huge_pages(dparams);
  in_use->affine_coupling_backward(c, grad, grad_logabsdet, x, params, dx, dparams);
}

void additive_coupling_forward(const Tensor& x, const Tensor& shift, const Tensor& y, const Tensor& rank, int split, bool inverse,
                               int threads) {
  Coupling c;
  describe(c, x, split, inverse, threads);
  const MaskIndex mask(rank, c, shift, 1);
  py::gil_scoped_release release;
  advise_huge_pages(y);
  in_use->additive_coupling_forward(c, x, shift, y);
}

// Raises ValueError unless the permutation names a row of the matrix for each of its rows.
void check_permutation(const Tensor& permutation, int64_t count) {
  if (permutation.dims != 1 || permutation.dtype != Dtype::int64)
    throw py::value_error("permutation: expected one dimension of int64");
  if (permutation.size[0] != count) refuse("permutation", std::to_string(count) + " rows", permutation.size[0]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = reinterpret_cast<const int64_t*>(permutation.data)[i * permutation.stride[0]];
    if (row < 0 || row >= count) refuse("permutation", "row numbers under " + std::to_string(count), row);
  }
}

void plu_weight_forward(const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal, const Tensor& sign,
                        const Tensor& permutation, const Tensor& weight, int threads) {
  check_permutation(permutation, lower.size[0]);
  py::gil_scoped_release release;
  in_use->plu_weight_forward(lower, upper, log_diagonal, sign, permutation, weight, threads);
}

void plu_weight_backward(const Tensor& grad, const Tensor& lower, const Tensor& upper, const Tensor& log_diagonal,
                         const Tensor& sign, const Tensor& permutation, const Tensor& dlower, const Tensor& dupper,
                         const Tensor& dlog_diagonal, int threads) {
  check_permutation(permutation, lower.size[0]);
  py::gil_scoped_release release;
  in_use->plu_weight_backward(grad, lower, upper, log_diagonal, sign, permutation, dlower, dupper, dlog_diagonal, threads);
}

void invertible_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& weight_inverse,
                               const Tensor& known, const Tensor& y, const Tensor& logabsdet, const Tensor& found, bool inverse,
                               int threads) {
  py::gil_scoped_release release;
  advise_huge_pages(y);
  in_use->invertible_linear_forward(x, weight, bias, weight_inverse, known, y, logabsdet, found, inverse, threads);
}

void invertible_linear_backward(const Tensor& grad, const Tensor& grad_logabsdet, const Tensor& x, const Tensor& weight,
                                const Tensor& bias, const Tensor& weight_inverse, const Tensor& dx, const Tensor& dweight,
                                const Tensor& dbias, const Tensor& dknown, bool inverse, int threads) {
  py::gil_scoped_release release;
  advise_huge_pages(dx);
  in_use->invertible_linear_backward(grad, grad_logabsdet, x, weight, bias, weight_inverse, dx, dweight, dbias, dknown, inverse,
                                     threads);
}

void masked_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& reach, const Tensor& rows,
                           const Tensor& columns, const Tensor& y, int threads) {
  check_degrees(x, weight, reach, Tensor(), rows, columns);
  py::gil_scoped_release release;
  advise_huge_pages(y);
  in_use->masked_linear_forward(x, weight, bias, reach, rows, columns, y, threads);
}

void masked_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& reach,
                            const Tensor& first, const Tensor& rows, const Tensor& columns, const Tensor& dx, const Tensor& dweight,
                            const Tensor& dbias, int threads) {
  check_degrees(x, weight, reach, first, rows, columns);
  py::gil_scoped_release release;
  advise_huge_pages(dx);
  advise_huge_pages(dweight);
  in_use->masked_linear_backward(grad, x, weight, bias, reach, first, rows, columns, dx, dweight, dbias, threads);
}

std::vector<Tensor> tensors(const py::list& given) {
  std::vector<Tensor> found;
  for (const auto& tensor : given) found.push_back(tensor.cast<Tensor>());
  return found;
}

// A chain of networks, each (weights and biases, context or None, table, a, b).
struct Chain {
  std::vector<std::vector<Tensor>> tensors;
  std::vector<Autoregressive> networks;

  explicit Chain(const py::list& given) {
    tensors.reserve(given.size());
    for (const auto& item : given) {
      const py::tuple parts = py::reinterpret_borrow<py::tuple>(item);
      tensors.push_back(flowkern::tensors(parts[0]));
      Autoregressive network;
      network.tensors = tensors.back().data();
      network.context = parts[1].cast<Tensor>();
      network.table = reinterpret_cast<const int32_t*>(parts[2].cast<Tensor>().data);
      network.a = parts[3].cast<double>();
      network.b = parts[4].cast<double>();
      networks.push_back(network);
    }
  }
};

void autoregressive_inverse_forward(const py::list& given, const Tensor& z, const Tensor& x, const Tensor& logabsdet,
                                    int threads) {
  const Chain chain(given);
  py::gil_scoped_release release;
  in_use->autoregressive_inverse_forward(chain.networks.data(), int64_t(chain.networks.size()), z, x, logabsdet, threads);
}

// `given` is a chain of one; `values` and `grads` hold a tensor for each of its linear layers, or nothing.
void autoregressive_inverse_backward(const py::list& given, const Tensor& grad, const Tensor& grad_log, const Tensor& x,
                                     const Tensor& z, const Tensor& dz, const py::list& values, const py::list& grads,
                                     int threads) {
  const Chain chain(given);
  const std::vector<Tensor> seen = tensors(values), left = tensors(grads);
  py::gil_scoped_release release;
  in_use->autoregressive_inverse_backward(chain.networks[0], grad, grad_log, x, z, dz, seen.empty() ? nullptr : seen.data(),
                                          left.empty() ? nullptr : left.data(), threads);
}

void nearest_code_forward(const Tensor& x, const Tensor& codebook, const Tensor& index, const Tensor& sqdist,
                          const Tensor& looked, bool cosine, bool pairs, int threads) {
  py::gil_scoped_release release;
  in_use->nearest_code_forward(x, codebook, index, sqdist, looked, cosine, pairs, threads);
}

void discretized_logistic_mixture(const Tensor& x, const Tensor& params, const Tensor& grad, const Tensor& log_prob,
                                  const Tensor& gradient, int64_t levels, bool compat, int threads) {
  py::gil_scoped_release release;
  if (gradient.data) advise_huge_pages(gradient);
  in_use->discretized_logistic_mixture(x, params, grad, log_prob, gradient, levels, compat, threads);
}

void gaussian_kl_forward(const Tensor& mean, const Tensor& log_scale, const Tensor& seed, int64_t offset, const Tensor& z,
                         const Tensor& kl, int threads) {
  py::gil_scoped_release release;
  advise_huge_pages(z);
  in_use->gaussian_kl_forward(mean, log_scale, seed, offset, z, kl, threads);
}

void gaussian_kl_backward(const Tensor& mean, const Tensor& log_scale, const Tensor& seed, int64_t offset, const Tensor& grad,
                          const Tensor& grad_kl, const Tensor& dmean, const Tensor& dlog_scale, int threads) {
  py::gil_scoped_release release;
  advise_huge_pages(dmean);
  advise_huge_pages(dlog_scale);
  in_use->gaussian_kl_backward(mean, log_scale, seed, offset, grad, grad_kl, dmean, dlog_scale, threads);
}

void dequantize(const Tensor& v, const Tensor& seed, int64_t offset, int64_t levels, double alpha, const Tensor& x,
                const Tensor& logabsdet, int threads) {
  py::gil_scoped_release release;
  advise_huge_pages(x);
  in_use->dequantize(v, seed, offset, levels, alpha, x, logabsdet, threads);
}

}  // namespace flowkern

// A plain C function: pybind11's own take as long as all of its work.
PyObject* plain(PyObject*, PyObject* arguments) {
  try {
    return PyBool_FromLong(flowkern::is_plain(arguments));
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

PyMethodDef plain_method = {"plain", plain, METH_O, "Whether kernels may read every tensor in a tuple of arguments: its memory is its value."};

PYBIND11_MODULE(_native, m) {
  using namespace flowkern;
  Torch::get();
  in_use = runnable().front();
  m.attr("plain") = py::reinterpret_steal<py::object>(PyCFunction_New(&plain_method, nullptr));
#ifndef _WIN32
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  m.doc() = "CPU kernels of flowkern; call them through flowkern.ops.";
  m.def("isa", [] { return in_use->isa; }, "The instruction set in use.");
  m.def("isas", [] {
    py::list names;
    for (const Kernels* k : runnable()) names.append(k->isa);
    return names;
  }, "The instruction sets that this processor runs, the best one first.");
  m.def("use_isa", use_isa, "Switch to another of isas().");
  m.def("openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  }, "Whether the kernels use threads.");
  m.def("affine_coupling_forward", affine_coupling_forward);
  m.def("affine_coupling_backward", affine_coupling_backward);
  m.def("additive_coupling_forward", additive_coupling_forward);
  m.def("invertible_linear_forward", invertible_linear_forward);
  m.def("invertible_linear_backward", invertible_linear_backward);
  m.def("masked_linear_forward", masked_linear_forward);
  m.def("masked_linear_backward", masked_linear_backward);
  m.def("plu_weight_forward", plu_weight_forward);
  m.def("plu_weight_backward", plu_weight_backward);
  m.def("autoregressive_inverse_forward", autoregressive_inverse_forward);
  m.def("autoregressive_inverse_backward", autoregressive_inverse_backward);
  m.def("nearest_code_forward", nearest_code_forward);
  m.def("discretized_logistic_mixture", discretized_logistic_mixture);
  m.def("gaussian_kl_forward", gaussian_kl_forward);
  m.def("gaussian_kl_backward", gaussian_kl_backward);
  m.def("dequantize", dequantize);
}
