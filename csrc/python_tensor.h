// Tensors as Python hands them over: by DLPack's C exchange API, which the type torch.Tensor carries. No torch header is
// involved, and a tensor costs nanoseconds where its Python attributes would cost half a microsecond.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "tensor.h"

namespace flowkern {

namespace dlpack {  // what is used of DLPack 1.x, as its specification lays it out in memory

enum : uint8_t { signed_integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };

struct DType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct View {
  void* data;
  int32_t device_type, device_id, ndim;
  DType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeAPI {
  uint32_t major, minor;
  ExchangeAPI* older;
  void *allocate, *to_managed, *from_managed;
  int (*view)(void* object, View* out);  // owns nothing; returns 0, or sets a Python error
  void* current_stream;
};

}  // namespace dlpack

// What the extension knows of torch.
class Torch {
 public:
  static const Torch& get() {
    static const Torch torch;  // never destroyed before the interpreter is: it holds borrowed references
    return torch;
  }

  bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_)) != 0; }

  // Whether the type is torch's own. Others, whose memory may mean anything, are left to what they override.
  bool is_exactly_tensor(PyObject* object) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_ || type == parameter_;
  }

  bool is_negative(PyObject* object) const { return says(is_neg_, object); }

  // Zeros without memory, whose address is none, or a view's offset from none.
  bool is_unwritten(PyObject* object, const dlpack::View& view) const {
    return !view.data || (reinterpret_cast<uintptr_t>(view.data) >> 32 == 0 && says(is_zerotensor_, object));
  }

  // False, without an error, where there is no memory to look at.
  bool view(PyObject* object, dlpack::View& out) const {
    if (api_->view(object, &out) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  Torch() {
    namespace py = pybind11;
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor"), capsule = tensor.attr("__dlpack_c_exchange_api__");
    api_ = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api_ && api_->major > 1) api_ = api_->older;
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!api_ || !api_->view) throw py::import_error("torch.Tensor has no DLPack 1 exchange API; torch 2.11 and newer do");
    tensor_ = py::object(tensor).release().ptr();
    parameter_ = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
    is_neg_ = py::object(tensor.attr("is_neg")).release().ptr();
    is_zerotensor_ = py::object(tensor.attr("_is_zerotensor")).release().ptr();
  }

  static bool says(PyObject* method, PyObject* object) {
    PyObject* answer = PyObject_CallOneArg(method, object);
    if (!answer) throw pybind11::error_already_set();
    Py_DECREF(answer);
    return answer == Py_True;
  }

  const dlpack::ExchangeAPI* api_;
  PyObject *tensor_, *parameter_, *is_neg_, *is_zerotensor_;
};

inline bool has_values(const dlpack::View& view) {
  for (int i = 0; i < view.ndim; ++i)
    if (view.shape[i] == 0) return false;
  return true;
}

// Whether the kernels may read every tensor among the arguments (lists and tuples are looked into): its memory is its value.
inline bool is_plain(PyObject* argument) {
  const Torch& torch = Torch::get();
  if (PyTuple_Check(argument) || PyList_Check(argument)) {
    PyObject** items = PySequence_Fast_ITEMS(argument);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(argument); ++i)
      if (!is_plain(items[i])) return false;
    return true;
  }
  if (!torch.is_tensor(argument)) return true;
  dlpack::View view;
  if (!torch.is_exactly_tensor(argument) || !torch.view(argument, view)) return false;
  return (!has_values(view) || !torch.is_unwritten(argument, view)) && !torch.is_negative(argument);
}

inline bool to_dtype(dlpack::DType from, Dtype& to) {
  const auto is = [&](uint8_t code, int bits) { return from.code == code && from.bits == bits && from.lanes == 1; };
  if (is(dlpack::floating, 32)) to = Dtype::float32;
  else if (is(dlpack::floating, 64)) to = Dtype::float64;
  else if (is(dlpack::bfloat, 16)) to = Dtype::bfloat16;
  else if (is(dlpack::floating, 16)) to = Dtype::float16;
  else if (is(dlpack::signed_integer, 32)) to = Dtype::int32;
  else if (is(dlpack::signed_integer, 64)) to = Dtype::int64;
  else if (is(dlpack::unsigned_integer, 8)) to = Dtype::uint8;
  else return false;
  return true;
}

}  // namespace flowkern

namespace pybind11::detail {

template <class T>
struct tensor_caster {
  PYBIND11_TYPE_CASTER(T, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    const flowkern::Torch& torch = flowkern::Torch::get();
    if (!torch.is_tensor(source.ptr())) return false;
    flowkern::dlpack::View view;
    if (!torch.view(source.ptr(), view) || (!view.data && flowkern::has_values(view)))
      throw type_error("expected a tensor with memory of its own, got " + str(source.get_type()).cast<std::string>());
    if (view.ndim > flowkern::max_dims || !flowkern::to_dtype(view.dtype, value.dtype)) return false;
    static char nothing;  // no address means that the tensor was not given
    value.data = view.data ? static_cast<char*>(view.data) + view.byte_offset : &nothing;
    value.dims = view.ndim ? view.ndim : 1;
    value.size[0] = value.stride[0] = 1;  // 0-d: one element
    for (int i = 0; i < view.ndim; ++i) {
      value.size[i] = view.shape[i];
      value.stride[i] = view.strides[i];
    }
    if (std::is_same_v<T, flowkern::Output> && view.ndim == 1 && view.shape[0] == 0) value.data = nullptr;
    return true;
  }
};

template <>
struct type_caster<flowkern::Tensor> : tensor_caster<flowkern::Tensor> {};
template <>
struct type_caster<flowkern::Output> : tensor_caster<flowkern::Output> {};

template <>
struct type_caster<flowkern::Unused> {
  PYBIND11_TYPE_CASTER(flowkern::Unused, const_name("object"));
  bool load(handle, bool) { return true; }
};

}  // namespace pybind11::detail
