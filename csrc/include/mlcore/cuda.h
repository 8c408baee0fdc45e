// The CUDA kernels: mlc_cuda_<op>_<pass> for every CUDA row of kernels.inc, in libmlcore_cuda. Each takes the arguments of
// mlc_<op>_<pass>, with tensors in device memory, and then the stream (a cudaStream_t) on which it queues its work. C++ only.
#ifndef MLCORE_CUDA_H_
#define MLCORE_CUDA_H_

#include "mlcore/mlcore.h"

namespace mlcore::detail {
template <class Function>
struct OnStream;
template <class... Args>
struct OnStream<int(Args...)> {
  using type = int(Args..., void* stream);
};
}  // namespace mlcore::detail

#define MLC_CUDA(op, pass, dtypes) MLC_API mlcore::detail::OnStream<decltype(mlc_##op##_##pass)>::type mlc_cuda_##op##_##pass;
#include "mlcore/kernels.inc"

#endif  // MLCORE_CUDA_H_
