"""depthwise_conv on a GPU: the CUDA and Triton kernels on the cases of the CPU's tests, and in the sizes of real models."""

from __future__ import annotations

import functools

import pytest
import test_depthwise_conv as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore.ops import depthwise_conv2d

BACKENDS = [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"]
LARGE = [
    ((8, 256, 56, 56), 1, (3, 3), 1, 1, 1),
    ((4, 96, 57, 55), 1, (7, 7), 2, 3, 1),
    ((2, 24, 16, 28, 28), 1, (3, 3, 3), 1, 1, 1),
]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(suite.testing, "make_input", functools.partial(suite.testing.make_input, device="cuda"))


@pytest.mark.parametrize("problem", suite.PROBLEMS, ids=lambda p: str(p).replace(" ", ""))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_conv(backend, problem):
    suite.check(backend, problem, suite.make(problem, F32, "contiguous"))
    suite.check(backend, problem, suite.make(problem, F32, "channels_last", bias=False))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("problem", LARGE, ids=lambda p: str(p).replace(" ", ""))
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large(backend, problem, layout, dtype):
    suite.check(backend, problem, suite.make(problem, dtype, layout))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_same_bits_every_run(backend):
    x = torch.randn(8, 96, 40, 40, device="cuda", requires_grad=True)
    weight = torch.randn(96, 1, 5, 5, device="cuda", requires_grad=True)
    runs = []
    for _ in range(2):
        y = depthwise_conv2d(x, weight, padding=2, impl=backend)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
