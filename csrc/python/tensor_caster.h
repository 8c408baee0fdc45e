// From a Python tensor to a borrowed DLTensor: the DLPack exchange API where the tensor's type offers it, else data_ptr(),
// shape and stride(). The guards here are what neither checks: see the tests in tests/native/test_binding.py, one a guard.
#pragma once
#include <pybind11/pybind11.h>

#include "mlcore/api.h"

namespace mlcore::python {

namespace py = pybind11;

// One tensor argument for the length of one call. Never store it: its pointers belong to the Python object.
class TensorArg {
 public:
  // source is a tensor or None; raises TypeError or ValueError naming argument `index` of `function`. check_lazy_state: refuse
  // tensors whose gradient or lazy negation would be lost, which below torch's dispatcher is nobody's mistake.
  void load(py::handle source, const char* function, int index, bool check_lazy_state);
  const DLTensor* get() const { return present_ ? &tensor_ : nullptr; }

 private:
  void load_by_pointer(py::handle source, const char* function, int index);

  DLTensor tensor_{};
  bool present_ = false;
  int64_t dims_[16];  // shape and strides on the pointer path
};

// The stream that the tensor's framework works on now; nullptr (the default stream) for CPU tensors.
void* current_stream(py::handle tensor, const DLDevice& device);

// torch.set_num_threads reaches OpenMP thread by thread, when torch first works in a thread: this makes it happen. Called
// before every kernel; free after a thread's first.
void adopt_thread_count();

// Tests only: behave as with a torch that has no exchange API.
void force_pointer_path(bool on);

}  // namespace mlcore::python
