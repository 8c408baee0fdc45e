"""causal_conv1d on a GPU: the CUDA and Triton kernels on the cases of the CPU's tests, and in the sizes of real models."""

from __future__ import annotations

import functools

import pytest
import test_causal_conv1d as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore.ops import causal_conv1d, causal_conv1d_update

BACKENDS = [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"]
LARGE = [(4, 1024, 2048, 4), (1, 12288, 4096, 4), (2, 64, 5000, 130)]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(suite.testing, "make_input", functools.partial(suite.testing.make_input, device="cuda"))


@pytest.mark.parametrize("shape", suite.SHAPES[:4], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_conv1d(backend, dtype, shape):
    suite.check(backend, suite.make(shape, dtype, "contiguous"))
    suite.check(backend, suite.make(shape, dtype, "channels_last", initial=True), activation="silu")


@pytest.mark.parametrize("layout", suite.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, layout):
    suite.check(backend, suite.make((3, 21, 45, 4), F32, layout, initial=layout != "expanded"), activation="gelu")


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large(backend, layout, shape):
    suite.check(backend, suite.make(shape, BF16, layout, initial=True), activation="silu")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sequences_are_found_on_the_device(backend):
    """cu_seqlens and seq_idx against the reference on the same device."""
    x, weight, initial = (torch.randn(s, device="cuda", requires_grad=True) for s in ((1, 70, 900), (70, 4), (4, 70, 3)))
    cu = torch.tensor([0, 300, 300, 301, 900], device="cuda")
    ids = (torch.arange(900, device="cuda") // 100)[None]
    outputs = []
    for impl in (backend, "reference"):
        y, final = causal_conv1d(
            x,
            weight,
            initial_states=initial,
            cu_seqlens=cu,
            seq_idx=ids,
            activation="silu",
            return_final_states=True,
            impl=impl,
        )
        outputs.append((y, final, *torch.autograd.grad(y.square().sum() + final.sum(), (x, weight, initial))))
    for got, want in zip(*outputs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_same_bits_every_run(backend):
    x, weight = (
        torch.randn(2, 300, 3000, device="cuda", requires_grad=True),
        torch.randn(300, 4, device="cuda", requires_grad=True),
    )
    runs = []
    for _ in range(2):
        y = causal_conv1d(x, weight, activation="silu", impl=backend)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_update_continues(backend, ring):
    x, weight = torch.randn(3, 200, 12, device="cuda"), torch.randn(200, 4, device="cuda")
    want, state = causal_conv1d(x, weight, impl="reference"), torch.zeros(3, 200, 5, device="cuda")
    for t in range(12):
        position = torch.full((3,), t, device="cuda") if ring else None
        got = causal_conv1d_update(x[:, :, t], state, weight, position=position, impl=backend)
        torch.testing.assert_close(got, want[:, :, t], rtol=1e-4, atol=1e-4)
