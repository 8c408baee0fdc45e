// bind<&mlc_f>(module, "f"): a C API function as a Python function. DLTensor pointers become tensors (None is NULL), the
// status becomes an exception, and the GIL is released while it runs. bind_on_stream is for functions whose last parameter
// is a stream: Python doesn't pass it, it is the one that torch works on now for the first tensor's device.
// For::launchers binds without the checks that the dispatcher or the launcher has already made (see TensorArg::load).
#pragma once
#include <tuple>
#include <type_traits>

#include "python/tensor_caster.h"

namespace mlcore::python {

enum class For { anyone, launchers };

namespace detail {

inline void raise(int status) {
  if (status == MLC_OK) return;
  const char* text = mlc_last_error();
  switch (status) {
    case MLC_INVALID_ARGUMENT: throw py::value_error(text);
    case MLC_UNSUPPORTED: PyErr_SetString(PyExc_NotImplementedError, text); throw py::error_already_set();
    default: throw std::runtime_error(text);
  }
}

// What Python passes for a C parameter, and what the C function then gets.
template <class T>
struct Param {
  using Python = T;
  T value;
  void load(T v, const char*, int, For) { value = v; }
  T get() { return value; }
  bool stream(void**) { return false; }
};
template <>
struct Param<const DLTensor*> {
  using Python = py::handle;
  TensorArg value;
  py::handle source;
  void load(py::handle v, const char* function, int index, For caller) {
    source = v;
    value.load(v, function, index, caller == For::anyone);
  }
  const DLTensor* get() { return value.get(); }
  bool stream(void** out) {  // false where the argument was left out
    if (value.get() == nullptr) return false;
    *out = current_stream(source, value.get()->device);
    return true;
  }
};
template <>
struct Param<DLTensor*> : Param<const DLTensor*> {
  DLTensor* get() { return const_cast<DLTensor*>(value.get()); }
};

// Tuple: the types of the parameters that Python passes, the first sizeof...(I) of F's.
template <auto F, bool kOnStream, class Tuple, size_t... I>
void bind_impl(py::module_& m, const char* name, For caller, std::index_sequence<I...>) {
  m.def(name, [name, caller](typename Param<std::tuple_element_t<I, Tuple>>::Python... args) {
    std::tuple<Param<std::tuple_element_t<I, Tuple>>...> params;
    (std::get<I>(params).load(args, name, static_cast<int>(I), caller), ...);
    adopt_thread_count();
    int status;
    if constexpr (kOnStream) {
      void* stream = nullptr;
      static_cast<void>((std::get<I>(params).stream(&stream) || ...));
      py::gil_scoped_release release;
      status = F(std::get<I>(params).get()..., stream);
    } else {
      py::gil_scoped_release release;
      status = F(std::get<I>(params).get()...);
    }
    raise(status);
  });
}

template <auto F, class... Args>
void bind_all(py::module_& m, const char* name, For caller, int (*)(Args...)) {
  bind_impl<F, false, std::tuple<Args...>>(m, name, caller, std::index_sequence_for<Args...>{});
}

template <auto F, class... Args>
void bind_all_but_stream(py::module_& m, const char* name, For caller, int (*)(Args...)) {
  using Tuple = std::tuple<Args...>;
  constexpr size_t kLast = sizeof...(Args) - 1;
  static_assert(std::is_same_v<std::tuple_element_t<kLast, Tuple>, void*>, "the last parameter must be void* stream");
  bind_impl<F, true, Tuple>(m, name, caller, std::make_index_sequence<kLast>{});
}

}  // namespace detail

template <auto F>
void bind(py::module_& m, const char* name, For caller) {
  detail::bind_all<F>(m, name, caller, F);
}

template <auto F>
void bind_on_stream(py::module_& m, const char* name, For caller) {
  detail::bind_all_but_stream<F>(m, name, caller, F);
}

}  // namespace mlcore::python
