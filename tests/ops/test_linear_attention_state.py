"""mlcore.ops.linear_attention's sequences, states and steps: packed, resumed, token by token, long, with extreme gates."""

from __future__ import annotations

import itertools

import pytest
import torch
from linear_attention_suite import KERNELS, VARIANTS, gradients, make, math_path, options

from mlcore import testing
from mlcore.ops import linear_attention, linear_attention_step

CASES = [case for case in testing.cases("linear_attention", "cpu") if case[1] != torch.float64]  # that one is the truth itself


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("variant", ["normalized", "gate", "vector gate", "vector gated delta"])
def test_packed_sequences_are_separate_ones(name, variant):
    bounds = [0, 0, 70, 71, 71, 600, 600]
    inputs = make(variant, (1, 2, 600, 24, 40), sequences=6)
    per_sequence = {"decay", "initial_state"}
    with testing.use(name) as impl:
        got = gradients(inputs, cu_seqlens=torch.tensor(bounds), impl=impl, **options(variant))
        generator = torch.Generator().manual_seed(1)
        d_o, d_state = (torch.randn(t.shape, generator=generator) for t in got[:2])
        names = ["o", "state", *inputs]
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            part = {m: t if m in per_sequence else t[:, :, begin:end] for m, t in inputs.items()}
            part["initial_state"] = inputs["initial_state"][n : n + 1]
            seeds = d_o[:, :, begin:end], d_state[n : n + 1]
            want = gradients(part, seeds, impl=impl, **options(variant))
            for m, g, w in zip(names, got, want):
                if m == "decay":
                    continue  # a sum over all sequences
                g = g[n : n + 1] if m in ("state", "initial_state") else g[:, :, begin:end]
                assert torch.equal(g, w), (m, n)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_steps_is_one_run(variant, tmp_path):
    T, prefill = 150, 93
    inputs = make(variant, (2, 3, T, 33, 20))
    start = inputs.pop("initial_state")
    want, want_state = linear_attention(**inputs, initial_state=start, return_state=True, **options(variant))
    tokens = {n: t for n, t in inputs.items() if n != "decay"}
    shared = {n: t for n, t in inputs.items() if n == "decay"}
    first = {n: t[:, :, :prefill] for n, t in tokens.items()}
    o, state = linear_attention(**first, **shared, initial_state=start, return_state=True, **options(variant))
    outputs = [o]
    for t in range(prefill, T):
        if t == 120:  # a state can be saved and resumed
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt")
        o, state = linear_attention_step(
            state=state, **{n: x[:, :, t] for n, x in tokens.items()}, **shared, **options(variant)
        )
        outputs.append(o.unsqueeze(2))
    torch.testing.assert_close(torch.cat(outputs, 2), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_matches_one_token(name, dtype, variant):
    inputs = make(variant, (2, 3, 1, 33, 20), dtype)
    state = inputs.pop("initial_state")
    want, want_state = linear_attention(**inputs, initial_state=state, return_state=True, impl="reference", **options(variant))
    with testing.use(name) as impl:
        one = {n: t if n == "decay" else t[:, :, 0] for n, t in inputs.items()}
        before = state.clone()
        o, after = linear_attention_step(state=state, **one, impl=impl, **options(variant))
    assert o.dtype == dtype and torch.equal(state, before)
    rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(o, want[:, :, 0], rtol=rounding, atol=rounding)
    torch.testing.assert_close(after, want_state, rtol=1e-5, atol=1e-5)


def test_step_records_gradients():
    inputs = make("gate", (2, 3, 1, 8, 6))
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    state = leaves.pop("initial_state")
    o, after = linear_attention_step(state=state, **{n: t[:, :, 0] for n, t in leaves.items()}, **options("gate"))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(o.sum() + after.sum(), [state, *leaves.values()]))


@pytest.mark.parametrize("variant", ["gate", "vector gate", "gated delta", "vector gated delta", "gate normalized"])
@pytest.mark.parametrize("name", KERNELS)
def test_extreme_gates(name, variant):
    """Gates that forget everything, at once or little by little, beside gates that forget nothing: finite, and right behind."""
    inputs = make(variant, (1, 2, 200, 16, 8))
    gate = inputs["gate"]
    gate[:, :, 1::7] = -1e4
    gate[:, :, 5::11] = -1e-7
    gate[:, :, 100] = -1e30
    gate[:, :, 130] = -float("inf")
    with testing.use(name) as impl:
        got = gradients(inputs, impl=impl, **options(variant))
    wide = {n: t.double() for n, t in inputs.items()}
    seeds = [torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).double() for t in got[:2]]
    with testing.use(name) as impl:
        got = gradients(inputs, [s.float() for s in seeds], impl=impl, **options(variant))
    seeds = [s.float().double() for s in seeds]
    for n, g, w in zip(["o", "state", *inputs], got, gradients(wide, seeds, impl="reference", **options(variant))):
        assert g.isfinite().all(), n
        if w.isfinite().all():
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["normalized", "retention", "vector gate"])
def test_long_sequences(variant):
    inputs = make(variant, (1, 1, 65536, 8, 8))
    got, state = linear_attention(**inputs, return_state=True, **options(variant))
    want, want_state = math_path(**{n: t.double() for n, t in inputs.items()}, **options(variant))
    for g, w in ((got, want), (state, want_state)):
        assert (g.double() - w).norm() < 1e-5 * w.norm()
