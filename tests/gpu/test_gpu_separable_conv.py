"""separable_conv on a GPU: the CUDA and Triton kernels on the cases of the CPU's tests, and in the sizes of MobileNet."""

from __future__ import annotations

import functools

import pytest
import test_separable_conv as suite
import torch
from gpu_code import BF16, F16

from mlcore.ops import BatchNorm, separable_conv2d

BACKENDS = [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"]
# ((N, C, H, W), J, kernel, stride, padding, dilation)
LARGE = [
    ((8, 128, 56, 56), 128, (3, 3), 1, 1, 1),
    ((8, 256, 28, 28), 512, (3, 3), 2, 1, 1),
    ((4, 96, 57, 55), 40, (7, 7), 1, 3, 1),
]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(suite.testing, "make_input", functools.partial(suite.testing.make_input, device="cuda"))


@pytest.mark.parametrize("problem", suite.PROBLEMS, ids=lambda p: str(p).replace(" ", ""))
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_convolutions(backend, problem):
    suite.check(backend, problem, suite.make(problem), "silu")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("problem", LARGE, ids=lambda p: str(p).replace(" ", ""))
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large(backend, problem, dtype):
    suite.check(backend, problem, suite.make(problem, dtype))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_training_norms_and_same_bits_every_run(backend):
    """Batch moments of h and of the product, running moments and all gradients, against float64; twice."""
    x, depthwise, pointwise, *_ = suite.make(LARGE[0]).values()
    leaves = [t.detach().requires_grad_() for t in (x, depthwise, pointwise)]

    def run(wide, impl):
        own = [t.to(wide).detach().requires_grad_() for t in leaves]
        moments = [torch.zeros(128, device="cuda", dtype=wide) for _ in range(4)]
        norms = [BatchNorm(None, None, *moments[2 * i : 2 * i + 2], True) for i in range(2)]
        words = {"norm": norms[0], "activation": "silu", "pointwise_norm": norms[1], "impl": impl}
        y = separable_conv2d(*own, padding=1, **words)
        return [y.detach(), *moments, *torch.autograd.grad(y.square().sum() / 2 + y.sum(), own)]

    got, again, want = run(torch.float32, backend), run(torch.float32, backend), run(torch.float64, "reference")
    assert all(torch.equal(a, b) for a, b in zip(got[:6], again[:6], strict=True))  # the rest are torch's products
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-4 * w.norm()
