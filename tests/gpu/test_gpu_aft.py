"""aft on a GPU: the CUDA and Triton kernels on the cases of the CPU's tests, and over longer sequences."""

from __future__ import annotations

import pytest
import test_aft as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore.ops import aft

BACKENDS = [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"]
LONG = (2, 4, 700, 64)


def evaluate(fn, inputs, options, seed):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    o = fn(**leaves, **options)
    return {"o": o.detach()} | dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), seed.to(o.dtype)), strict=True))


def check(backend, kind, shape, dtype=F32, causal=False, spread=1.0):
    """Against the reference in float64, relative to each tensor's norm."""
    inputs, options = suite.make(kind, shape, dtype, causal, spread=spread)
    inputs = {n: t.cuda() for n, t in inputs.items()}
    seed = torch.randn(shape, device="cuda")
    got = evaluate(lambda **t: aft(**t, impl=backend), inputs, options, seed)
    want = evaluate(lambda **t: aft(**t, impl="reference"), {n: t.double() for n, t in inputs.items()}, options, seed)
    for name, w in want.items():
        limit = 2e-5 * spread if dtype == F32 else 2e-2
        assert (got[name] - w).norm() <= limit * w.norm() + 1e-5, name


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", suite.KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, kind, causal):
    check(backend, kind, suite.SMALL, F32, causal)
    check(backend, kind, suite.SMALL, F32, causal, spread=30.0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["simple", "full", "local", "conv"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_long(backend, kind, dtype):
    check(backend, kind, LONG, dtype, True)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_same_bits_every_run(backend):
    inputs, options = suite.make("conv", LONG, causal=True)
    inputs = {n: t.cuda() for n, t in inputs.items()}
    runs = [evaluate(lambda **t: aft(**t, impl=backend), inputs, options, inputs["q"]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))
