// Host side of a kernel launch, the same on a GPU and in the emulator: MLC_LAUNCH, the device it runs on, its errors.
#pragma once
#include <cstddef>
#include <string>
#include <utility>

#include "core/status.h"
#include "cuda/device.h"

// Queues kernel(args...) on `stream` (a cudaStream_t as void*) with `smem` bytes of dynamic shared memory; throws
// mlcore::Error. Template arguments go in parentheses: MLC_LAUNCH((softmax<float, 4>), grid, block, 0, stream, x, y).
#define MLC_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::mlcore::cuda::launch(#kernel, kernel, grid, block, smem, stream, __VA_ARGS__)

namespace mlcore::cuda {

// The kernel's own name in the text that MLC_LAUNCH was given: softmax for "(softmax<float, 4>)".
inline std::string kernel_name(const std::string& text) {
  const size_t begin = text.find_first_not_of('(');
  return text.substr(begin, text.find('<') - begin);
}

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    fail(MLC_RUNTIME_ERROR, kernel_name(what), ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A&&... args) {
  constexpr size_t kDefaultLimit = 48 << 10;  // more has to be asked for, kernel by kernel
  if (smem > kDefaultLimit)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)), name);
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(std::forward<A>(args))...);
  check(cudaGetLastError(), name);
}

#else

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* /*stream*/, A&&... args) {
  static thread_local char anchor;
  auto body = [&] { kernel(static_cast<P>(args)...); };
  emu::launch(
      kernel_name(name).c_str(), grid, block, smem, &anchor, [](void* context) { (*static_cast<decltype(body)*>(context))(); },
      &body);
}

#endif

}  // namespace mlcore::cuda
