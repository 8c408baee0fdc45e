"""linear_attention on a GPU: the kernels on every variant of the CPU's tests, and in the sizes of real models."""

from __future__ import annotations

import functools

import linear_attention_suite as suite
import pytest
import test_linear_attention_state
import torch

from mlcore.ops import linear_attention, linear_attention_step

BACKENDS = ["triton"]


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def inputs_there(monkeypatch):
    monkeypatch.setattr(suite.testing, "make_input", functools.partial(suite.testing.make_input, device="cuda"))


def gradients(inputs, variant):
    """(o, state, gradients) of the Triton kernels, for gradients of the outputs that are 1."""
    seeds = torch.ones_like(inputs["v"]), torch.ones_like(inputs["initial_state"])
    return suite.gradients(inputs, seeds, impl="triton", **suite.options(variant))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 16, 16), (1, 2, 63, 33, 24), (1, 2, 700, 64, 64), (1, 1, 140, 256, 40)], ids=str)
@pytest.mark.parametrize("variant", suite.VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, variant, shape, dtype):
    suite.check([backend], suite.make(variant, shape, dtype), **suite.options(variant))


@pytest.mark.parametrize("variant", ["normalized", "gate", "vector gate", "vector gated delta"])
def test_extreme_gates_and_long_sequences(variant):
    inputs = suite.make(variant, (1, 2, 65536, 64, 64))
    if "gate" in inputs:
        inputs["gate"][:, :, 1::7], inputs["gate"][:, :, 5::11] = -1e4, -1e-7
    for name, t in zip(("o", "state", *inputs), gradients(inputs, variant)):
        assert t.isfinite().all(), name


@pytest.mark.parametrize("variant", suite.VARIANTS)
def test_same_bits_every_run(variant):
    inputs = suite.make(variant, (2, 4, 1500, 64, 72))
    first, second = (gradients(inputs, variant) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", suite.VARIANTS)
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"])
def test_step(backend, variant, dtype):
    test_linear_attention_state.test_step_matches_one_token(backend, dtype, variant)


@pytest.mark.parametrize("variant", suite.VARIANTS)
def test_short_sequences(variant):
    inputs = suite.make(variant, (2, 3, 40, 64, 72))
    want = linear_attention(**inputs, return_state=True, impl="reference", **suite.options(variant))
    got = linear_attention(**inputs, return_state=True, impl="cuda", **suite.options(variant))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_then_steps(backend):
    q, k, v = (torch.randn(2, 4, 40, 64) for _ in range(3))
    want, last = linear_attention(q, k, v, return_state=True, impl=backend)
    _, state = linear_attention(q[:, :, :30], k[:, :, :30], v[:, :, :30], return_state=True, impl=backend)
    for t in range(30, 40):
        o, state = linear_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state, impl=backend)
        torch.testing.assert_close(o, want[:, :, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
