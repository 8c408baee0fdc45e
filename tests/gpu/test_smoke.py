"""The device, the CUDA library, and the harness itself: what the emulator computes is what this GPU computes."""

from __future__ import annotations

import primitive_checks as checks
import pytest
import torch

from mlcore import _C
from mlcore._backend import cuda_library, unusable


def test_device_is_new_enough():
    properties = torch.cuda.get_device_properties(0)
    print(properties)
    assert (properties.major, properties.minor) >= (8, 0), "the kernels need compute capability 8.0"
    assert properties.warp_size == 32


@pytest.mark.sanitized
def test_every_cuda_row_is_bound():
    library = cuda_library()
    assert not isinstance(library, str)
    for op, pass_name, backend, _ in _C.table():
        if backend == "cuda":
            assert callable(getattr(library, f"{op}_{pass_name}"))


def test_triton_is_usable():
    assert unusable("triton") is None


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_mma(nvcc_library, dtype):
    checks.mma(nvcc_library("primitives"), dtype)


def test_mma_bits(nvcc_library):
    checks.mma_bits(nvcc_library("primitives"))


def test_mma_tf32_rounding(nvcc_library):
    checks.mma_tf32_rounding(nvcc_library("primitives"))


@pytest.mark.sanitized
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(nvcc_library, n, trans):
    checks.ldmatrix(nvcc_library("primitives"), n, trans)


@pytest.mark.sanitized
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(nvcc_library, size, left):
    copied, wanted = checks.cp_async(nvcc_library("primitives"), size, left)
    assert torch.equal(copied, wanted)


def test_warp_functions(nvcc_library):
    checks.warp(nvcc_library("primitives"))


def test_atomics(nvcc_library):
    checks.atomics(nvcc_library("primitives"))


@pytest.mark.parametrize("threads", [64, 256, 1024])
def test_reduce(nvcc_library, threads):
    checks.reduce(nvcc_library("primitives"), threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convert(nvcc_library, dtype):
    checks.convert(nvcc_library("primitives"), dtype)


@pytest.mark.parametrize("T", [1, 129, 1000])
def test_attention_harness(nvcc_library, T):
    assert checks.attention(nvcc_library("flash_attention"), 2, T) < 1.6e-2  # two bfloat16 roundings, as in test_emu.py


def test_launch_errors_are_exceptions(nvcc_library):
    """A block of 1025 threads is refused by CUDA, and the next launch works."""
    with pytest.raises(RuntimeError, match="cudaErrorInvalid"):
        checks.reduce(nvcc_library("primitives"), 1088)
    checks.reduce(nvcc_library("primitives"), 64)
