"""rms_norm and layer_norm on a GPU: the CUDA and Triton kernels on the cases of the emulator, and the public functions."""

from __future__ import annotations

import gpu_code
import pytest
import torch
from gpu_code import BF16, F16, Norm

import mlcore

OPS = ["rms_norm", "layer_norm"]
BACKENDS = ["cuda", "triton"]
LARGE = [Norm(4096, 1024, BF16, residual=True), Norm(513, 12288, F16), Norm(100, 40000, BF16), Norm(20000, 128)]


@pytest.mark.parametrize("case", gpu_code.NORM_CASES, ids=str)
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"])
@pytest.mark.parametrize("op", OPS)
def test_kernels(op, backend, case):
    gpu_code.check_norm(op, gpu_code.on_gpu(op, backend), case, "cuda")


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_large(op, backend, case):
    gpu_code.check_norm(op, gpu_code.on_gpu(op, backend), case, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_every_run(op, backend):
    case = Norm(3000, 1024, BF16, residual=True)
    first, second = (gpu_code.check_norm(op, gpu_code.on_gpu(op, backend), case, "cuda") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("impl", [None, *BACKENDS])
@pytest.mark.parametrize("op", OPS)
def test_public_function(op, impl):
    x = torch.randn(4, 33, 768, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(768, device="cuda", requires_grad=True)
    y = getattr(mlcore.ops, op)(x, weight, impl=impl)
    got = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    want_y, _ = gpu_code.reference(op)(x, weight)
    want = torch.autograd.grad(want_y, [x, weight], torch.ones_like(y))
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)  # two bfloat16 roundings
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-3)  # float32 sums over 132 rows


def test_follows_the_current_stream():
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 14, 1024, device="cuda")
    weight = torch.ones(1024, device="cuda")
    mlcore.ops.rms_norm(x, weight, impl="cuda")  # the first launch of a kernel loads it, which waits for the device
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2.0)
        y = mlcore.ops.rms_norm(x, weight, impl="cuda")  # a launch on another stream would read zeros
    stream.synchronize()
    torch.testing.assert_close(y, torch.ones_like(y))
