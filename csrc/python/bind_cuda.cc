// The extension module mlcore._cuda: every CUDA row of kernels.inc, from libmlcore_cuda.so. Imported on first use, so that
// mlcore._C never needs a driver. The functions queue their work on torch's current stream and return.
#include "mlcore/cuda.h"
#include "python/bind_function.h"

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_used()) {
  m.doc() = "mlcore's CUDA kernels. Use mlcore.ops: these raw functions know neither autograd nor torch.compile.";
  pybind11::module_ launch = m.def_submodule("launch", "The same functions for mlcore's launchers, which run below autograd.");
  using mlcore::python::For;
#define MLC_CUDA(op, pass, dtypes)                                                        \
  mlcore::python::bind_on_stream<&mlc_cuda_##op##_##pass>(m, #op "_" #pass, For::anyone); \
  mlcore::python::bind_on_stream<&mlc_cuda_##op##_##pass>(launch, #op "_" #pass, For::launchers);
#include "mlcore/kernels.inc"
}
