#include "python/watch.h"

#include "python/tensor_caster.h"

namespace mlcore::python {
namespace {

enum Answer : long { kGeneral = 0, kLean = 1, kLeanWithGrad = 2 };

// What is asked of torch, looked up once; owned for the life of the process.
struct Torch {
  PyObject *tensor, *parameter;                        // the plain types
  PyObject *modes, *transforms, *tracing, *grad_mode;  // functions without arguments
  PyObject* forward_ad;                                // the dict of torch.autograd.forward_ad
  PyObject *requires_grad, *is_neg, *current_level;    // names

  Torch() {
    const auto keep = [](const py::object& o) { return o.inc_ref().ptr(); };
    const py::module_ torch = py::module_::import("torch"), c = py::module_::import("torch._C");
    tensor = keep(torch.attr("Tensor"));
    parameter = keep(torch.attr("nn").attr("Parameter"));
    modes = keep(c.attr("_len_torch_dispatch_stack"));
    transforms = keep(c.attr("_are_functorch_transforms_active"));
    tracing = keep(c.attr("_get_tracing_state"));
    grad_mode = keep(torch.attr("is_grad_enabled"));
    forward_ad = keep(py::module_::import("torch.autograd.forward_ad").attr("__dict__"));
    requires_grad = PyUnicode_InternFromString("requires_grad");
    is_neg = PyUnicode_InternFromString("is_neg");
    current_level = PyUnicode_InternFromString("_current_level");
  }
};

// Takes the reference; an exception is the caller's.
bool is(PyObject* owned, PyObject* value) {
  if (owned == nullptr) throw py::error_already_set();
  Py_DECREF(owned);  // the values compared with are immortal for our purposes: True, False, None, small integers
  return owned == value;
}

bool is_zero(PyObject* owned) {
  if (owned == nullptr) throw py::error_already_set();
  const long value = PyLong_AsLong(owned);
  Py_DECREF(owned);
  return value == 0;
}

bool unwatched(const Torch& torch) {
  PyObject* level = PyDict_GetItem(torch.forward_ad, torch.current_level);  // borrowed; -1 outside of forward-mode AD
  if (level == nullptr || PyLong_AsLong(level) >= 0) return false;
  return is_zero(PyObject_CallNoArgs(torch.modes)) && is(PyObject_CallNoArgs(torch.transforms), Py_False) &&
         is(PyObject_CallNoArgs(torch.tracing), Py_None);
}

// t: as the exchange API or the pointers tell it.
bool compact(const DLTensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.strides != nullptr && t.shape[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i];
  }
  return true;
}

bool compact_rows(const DLTensor& t) {
  return t.ndim > 0 && (t.strides == nullptr || t.shape[t.ndim - 1] == 1 || t.strides[t.ndim - 1] == 1);
}

template <bool (*kTaken)(const DLTensor&)>
Answer ask(PyObject* const* args, Py_ssize_t count) {
  static const Torch* const torch = new Torch;  // imports nothing that isn't imported already
  if (!unwatched(*torch)) return kGeneral;
  bool grad = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (args[i] == Py_None) continue;
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(args[i]));
    if (type != torch->tensor && type != torch->parameter) return kGeneral;
    if (!is(PyObject_CallMethodNoArgs(args[i], torch->is_neg), Py_False)) return kGeneral;
    grad = is(PyObject_GetAttr(args[i], torch->requires_grad), Py_True) || grad;
    TensorArg arg;
    arg.load(args[i], "watch", static_cast<int>(i), false);
    const DLTensor& t = *arg.get();
    const bool half = t.dtype.bits == 16 && (t.dtype.code == kDLFloat || t.dtype.code == kDLBfloat);
    const bool single = t.dtype.bits == 32 && t.dtype.code == kDLFloat;
    if (t.device.device_type != kDLCPU || !(half || single) || !kTaken(t)) return kGeneral;
  }
  return grad && is(PyObject_CallNoArgs(torch->grad_mode), Py_True) ? kLeanWithGrad : kLean;
}

template <bool (*kTaken)(const DLTensor&)>
PyObject* watch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return PyLong_FromLong(ask<kTaken>(args, count));
  } catch (py::error_already_set&) {  // a tensor that can't be read (meta, sparse): the general way says so in its own words
    return PyLong_FromLong(kGeneral);
  } catch (py::builtin_exception&) {
    return PyLong_FromLong(kGeneral);
  }
}

template <bool (*kTaken)(const DLTensor&)>
PyMethodDef define(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(watch<kTaken>)), METH_FASTCALL, doc};
}

PyMethodDef definitions[] = {
    define<compact>("watch",
                    "watch(*tensors) -> int\n\n0: take the general way; 1: straight to the CPU kernel; 2: the same under "
                    "autograd. Not under torch.compile."),
    define<compact_rows>("watch_rows", "watch(*tensors) for kernels that ask for a contiguous last dimension only."),
};

}  // namespace

void bind_watch(py::module_& m) {
  for (PyMethodDef& f : definitions) m.add_object(f.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&f, nullptr)));
}

}  // namespace mlcore::python
