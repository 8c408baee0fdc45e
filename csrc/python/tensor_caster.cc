#include "python/tensor_caster.h"

#include <pybind11/gil_safe_call_once.h>

#include <string>
#include <unordered_map>

namespace mlcore::python {
namespace {

bool pointer_path_forced = false;

struct TypeEntry {
  const DLPackExchangeAPI* api = nullptr;
  bool is_torch = false;  // a torch.Tensor: has requires_grad and is_neg()
};

[[noreturn]] void type_error(const char* function, int index, const std::string& rule) {
  throw py::type_error(std::string(function) + ": argument " + std::to_string(index) + " " + rule);
}

std::string type_name(py::handle h) { return py::str(py::type::handle_of(h).attr("__qualname__")); }

// Subclasses that carry their data elsewhere (DTensor, FakeTensor, quantized wrappers) overload __torch_dispatch__.
bool wraps_other_data(PyTypeObject* type) {
  const py::handle t(reinterpret_cast<PyObject*>(type));
  if (!py::hasattr(t, "__torch_dispatch__")) return false;
  const py::object torch_tensor = py::module_::import("torch").attr("Tensor");
  return !t.attr("__torch_dispatch__").is(torch_tensor.attr("__torch_dispatch__"));
}

// Looked up once a type. The GIL guards the cache.
const TypeEntry& entry_of(py::handle source, const char* function, int index) {
  static std::unordered_map<PyTypeObject*, TypeEntry> cache;
  static PyTypeObject* last_type = nullptr;
  static const TypeEntry* last = nullptr;
  PyTypeObject* type = Py_TYPE(source.ptr());
  if (type == last_type) return *last;
  auto it = cache.find(type);
  if (it == cache.end()) {
    TypeEntry entry;
    const py::handle t(reinterpret_cast<PyObject*>(type));
    if (wraps_other_data(type))
      type_error(function, index,
                 "is a " + type_name(source) +
                     ", which holds no data of its own; call the public function in mlcore.ops or torch.ops.mlcore");
    if (py::hasattr(t, "__dlpack_c_exchange_api__")) {
      const py::object capsule = t.attr("__dlpack_c_exchange_api__");
      entry.api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (entry.api == nullptr) PyErr_Clear();
      const bool usable =
          entry.api != nullptr && entry.api->header.version.major == 1 && entry.api->dltensor_from_py_object_no_sync;
      if (!usable) entry.api = nullptr;
    }
    entry.is_torch = py::hasattr(t, "requires_grad") && py::hasattr(t, "data_ptr");
    if (entry.api == nullptr && !entry.is_torch)
      type_error(function, index, "must be a torch.Tensor; got " + type_name(source));
    Py_INCREF(reinterpret_cast<PyObject*>(type));  // the cache's key stays alive
    it = cache.emplace(type, entry).first;
  }
  last_type = type;
  last = &it->second;
  return *last;
}

bool is_true(PyObject* owned) {
  if (owned == nullptr) throw py::error_already_set();
  const bool value = owned == Py_True;
  Py_DECREF(owned);
  return value;
}

// Reading the data of such a tensor would lose a gradient or a sign.
void refuse_lazy_state(py::handle source, const char* function, int index) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  if (is_true(PyObject_GetAttr(source.ptr(), requires_grad))) {
    // A plain static would wait for another thread's import with the GIL held.
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> is_grad_enabled;
    is_grad_enabled.call_once_and_store_result([] { return py::object(py::module_::import("torch").attr("is_grad_enabled")); });
    if (is_true(PyObject_CallNoArgs(is_grad_enabled.get_stored().ptr())))
      type_error(function, index, "requires grad, which this raw binding would lose; call the public function in mlcore.ops");
  }
  if (is_true(PyObject_CallMethodNoArgs(source.ptr(), is_neg)))
    type_error(function, index, "is a lazily negated view; call resolve_neg() or the public function in mlcore.ops");
}

DLDataType dtype_by_name(const std::string& name) {
  static const std::unordered_map<std::string, DLDataType> known = {
      {"torch.float32", {kDLFloat, 32, 1}},   {"torch.float64", {kDLFloat, 64, 1}}, {"torch.float16", {kDLFloat, 16, 1}},
      {"torch.bfloat16", {kDLBfloat, 16, 1}}, {"torch.bool", {kDLBool, 8, 1}},      {"torch.int8", {kDLInt, 8, 1}},
      {"torch.uint8", {kDLUInt, 8, 1}},       {"torch.int16", {kDLInt, 16, 1}},     {"torch.int32", {kDLInt, 32, 1}},
      {"torch.int64", {kDLInt, 64, 1}},       {"torch.uint64", {kDLUInt, 64, 1}}};
  const auto it = known.find(name);
  return it == known.end() ? DLDataType{kDLOpaqueHandle, 8, 1} : it->second;
}

}  // namespace

void TensorArg::load(py::handle source, const char* function, int index, bool check_lazy_state) {
  if (source.is_none()) return;
  const TypeEntry& entry = entry_of(source, function, index);
  try {
    if (check_lazy_state && entry.is_torch) refuse_lazy_state(source, function, index);
    if (entry.api == nullptr || pointer_path_forced) {
      load_by_pointer(source, function, index);
    } else if (entry.api->dltensor_from_py_object_no_sync(source.ptr(), &tensor_) != 0) {
      throw py::error_already_set();
    }
  } catch (py::error_already_set& e) {  // meta, sparse and vmap tensors refuse themselves, in many lines
    if (!e.matches(PyExc_Exception)) throw;
    const std::string text = py::str(e.value());
    type_error(function, index, "can't be read: " + text.substr(0, text.find('\n')));
  }
  if (tensor_.data == nullptr) {  // fake tensors pass the exchange API with a shape and no memory
    int64_t numel = 1;
    for (int i = 0; i < tensor_.ndim; ++i) numel *= tensor_.shape[i];
    if (numel > 0)
      type_error(function, index,
                 "is a " + type_name(source) + " without data; call torch.ops.mlcore or the public function in mlcore.ops");
  }
  present_ = true;
}

void TensorArg::load_by_pointer(py::handle source, const char* function, int index) {
  const py::tuple shape = source.attr("shape"), stride = source.attr("stride")();
  const size_t rank = shape.size();
  if (rank > 8) type_error(function, index, "has more than 8 dimensions");
  for (size_t i = 0; i < rank; ++i) {
    dims_[i] = shape[i].cast<int64_t>();
    dims_[8 + i] = stride[i].cast<int64_t>();
  }
  const py::object device = source.attr("device");
  const std::string kind = py::str(device.attr("type"));
  if (kind != "cpu" && kind != "cuda") type_error(function, index, "is on device " + kind + "; expected cpu or cuda");
  tensor_.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
  tensor_.device = {kind == "cpu" ? kDLCPU : kDLCUDA, device.attr("index").is_none() ? 0 : device.attr("index").cast<int>()};
  tensor_.ndim = static_cast<int32_t>(rank);
  tensor_.dtype = dtype_by_name(py::str(source.attr("dtype")));
  tensor_.shape = dims_;
  tensor_.strides = dims_ + 8;
  tensor_.byte_offset = 0;
}

void* current_stream(py::handle tensor, const DLDevice& device) {
  if (device.device_type != kDLCUDA) return nullptr;
  const TypeEntry& entry = entry_of(tensor, "current_stream", 0);
  void* stream = nullptr;
  if (entry.api != nullptr && !pointer_path_forced) {
    if (entry.api->current_work_stream(device.device_type, device.device_id, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object current = py::module_::import("torch").attr("cuda").attr("current_stream")(device.device_id);
  return reinterpret_cast<void*>(current.attr("cuda_stream").cast<uintptr_t>());
}

void adopt_thread_count() {
  static thread_local bool adopted = false;
  if (adopted) return;
  adopted = true;
  py::module_::import("torch").attr("get_num_threads")();
}

void force_pointer_path(bool on) { pointer_path_forced = on; }

}  // namespace mlcore::python
