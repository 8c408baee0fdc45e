// What every .cu file starts from: CUDA's own headers under nvcc, the CPU stand-in under a host compiler.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

// name points to the launch's dynamic shared memory, aligned to 128 bytes. Once a kernel.
#define MLC_DYNAMIC_SMEM(type, name)                                 \
  extern __shared__ __align__(128) unsigned char mlc_dynamic_smem[]; \
  type* const name = reinterpret_cast<type*>(mlc_dynamic_smem)
#else
#include "cuda/emu.h"
#endif

#define MLC_DEVICE __device__ __forceinline__
