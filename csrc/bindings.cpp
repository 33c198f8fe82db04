// Python's side of the native kernels: each entry of csrc/kernels.h is bound once, and calls the kernel of the instruction set in
// use.

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "python_tensor.h"

namespace py = pybind11;

namespace flowkern {

#define FLOWKERN_POINTER(name, ...) void (*name)(__VA_ARGS__);
struct Kernels {
  const char* isa;
  FLOWKERN_ENTRIES(FLOWKERN_POINTER)
};

#define FLOWKERN_DECLARATION(name, ...) void name(__VA_ARGS__);
#define FLOWKERN_ADDRESS(name, ...) , name
#define FLOWKERN_VARIANT(isa)                                         \
  namespace isa {                                                     \
  FLOWKERN_ENTRIES(FLOWKERN_DECLARATION)                              \
  constexpr Kernels kernels{#isa FLOWKERN_ENTRIES(FLOWKERN_ADDRESS)}; \
  }

FLOWKERN_VARIANT(baseline)
#ifdef FLOWKERN_X86
FLOWKERN_VARIANT(avx2)
FLOWKERN_VARIANT(avx512)
#endif

// The variants that this processor can run, the best one first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#ifdef FLOWKERN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
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
void advise_huge_pages(const Output& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  int64_t bytes = t.dtype == Dtype::float64 || t.dtype == Dtype::int64 ? 8 : t.dtype == Dtype::float32 ? 4 : 2;
  for (int i = 0; i < t.dims; ++i) bytes *= t.size[i];
  if (bytes < int64_t(4 * huge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data) + huge - 1) & ~(huge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data) + uintptr_t(bytes)) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

template <class T>
void advise_huge_pages(const T&) {}

// What Python calls: the entry of the instruction set in use, without the interpreter's lock.
template <class... Arguments>
auto entry(void (*Kernels::*kernel)(Arguments...)) {
  return [kernel](Arguments... arguments) {
    const py::gil_scoped_release release;
    (advise_huge_pages(arguments), ...);
    (in_use->*kernel)(arguments...);
  };
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

void autoregressive_inverse(const py::list& given, In z, Out x, Out logabsdet, int threads) {
  const Chain chain(given);
  entry(&Kernels::autoregressive_inverse)(chain.networks.data(), int64_t(chain.networks.size()), z, x, logabsdet, threads);
}

// `given` is a chain of one; `values` and `grads` hold a tensor for each of its linear layers, or nothing.
void autoregressive_inverse_backward(const py::list& given, In grad, In grad_log, In x, Out z, Out dz, const py::list& values,
                                     const py::list& grads, int threads) {
  const Chain chain(given);
  const std::vector<Tensor> seen = tensors(values), left = tensors(grads);
  entry(&Kernels::autoregressive_inverse_backward)(chain.networks[0], grad, grad_log, x, z, dz, seen.empty() ? nullptr : seen.data(),
                                                   left.empty() ? nullptr : left.data(), threads);
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
#define FLOWKERN_BIND(name, ...) m.def(#name, entry(&Kernels::name));
  FLOWKERN_PLAIN_ENTRIES(FLOWKERN_BIND)
  m.def("autoregressive_inverse", autoregressive_inverse);
  m.def("autoregressive_inverse_backward", autoregressive_inverse_backward);
}
