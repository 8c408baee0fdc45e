// The extension module mlcore._cuda: every CUDA row of kernels.inc, from libmlcore_cuda.so. Imported on first use, so that
// mlcore._C never needs a driver. The functions queue their work on torch's current stream and return.
#include "mlcore/mlcore.h"
#include "python/bind_function.h"

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_used()) {
  m.doc() = "mlcore's CUDA kernels. Use mlcore.ops: these raw functions know neither autograd nor torch.compile.";
#define MLC_CPU(op, pass, dtypes)
#define MLC_CPU_HELPER(op, name)
#define MLC_CUDA(op, pass, dtypes) mlcore::python::bind_on_stream<&mlc_cuda_##op##_##pass>(m, #op "_" #pass);
#define MLC_TRITON(op, pass, dtypes)
#include "kernels.inc"
#undef MLC_CPU
#undef MLC_CPU_HELPER
#undef MLC_CUDA
#undef MLC_TRITON
}
