// watch(*tensors) and watch_rows(*tensors): whether a call may go straight to a CPU kernel, in one call of 0.5 us; the same
// questions from Python cost five times that. The answer is about the caller's state and the tensors' kind; the kernel still
// checks shapes and dtypes.
#pragma once
#include <pybind11/pybind11.h>

namespace mlcore::python {

// Adds both to the module: 0 where something follows the call (a dispatch mode, torch.func, forward-mode AD, torch.jit.trace)
// or a tensor isn't a plain floating CPU tensor that a kernel takes as it stands, contiguous, or for watch_rows contiguous in
// its last dimension; else 1, or 2 where autograd must record the call. None stands for an argument left out. Not for code
// under torch.compile, which can't follow it.
void bind_watch(pybind11::module_& m);

}  // namespace mlcore::python
