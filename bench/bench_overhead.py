"""What a call costs before any work is done, as ratios to `x + y`: rms_norm of a (16, 64) tensor by each way in, and attention
over eight tokens beside torch's.

The limits are the overhead contract; ratios, because the machine's speed then cancels. The kernel's own time is part of all.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error

import mlcore
from mlcore import _C

EPS = 1e-6
ROWS = {
    "x + y": None,
    "mlcore: binding, outputs given": None,
    "mlcore: rms_norm(x, w)": None,
    "mlcore: registered op": 3.0,
    "mlcore: rms_norm(x, w), grad": 7.0,
    "torch: F.rms_norm(x, w)": None,
    "torch: F.rms_norm(x, w), grad": None,
}


def make_group() -> Group:
    x, y, w = torch.randn(16, 64), torch.randn(16, 64), torch.randn(64)
    xg = x.clone().requires_grad_()
    out, rstd = torch.empty_like(x), torch.empty(16)
    registered = torch.ops.mlcore.rms_norm.default

    def binding():
        _C.rms_norm_fwd(x, None, w, EPS, out, None, rstd)
        return out

    calls = [
        lambda: x + y,
        binding,
        functools.partial(mlcore.ops.rms_norm, x, w, eps=EPS),
        lambda: registered(x, w, EPS),
        functools.partial(mlcore.ops.rms_norm, xg, w, eps=EPS),
        functools.partial(F.rms_norm, x, (64,), w, EPS),
        functools.partial(F.rms_norm, xg, (64,), w, EPS),
    ]
    rows = dict(zip(ROWS, calls, strict=True))
    norm = F.rms_norm(x.double(), (64,), w.double(), EPS)

    def check(row, got):
        error = relative_error(got, x + y if row == "x + y" else norm)
        assert error < 1e-6, f"{row}: relative error {error:.1e}"
        return error

    return Group(rows, check, extra={row: {"limit": limit} for row, limit in ROWS.items() if limit})


ATTENTION_ROWS = ["x + y", "mlcore: attention", "mlcore: attention, grad", "torch: sdpa", "torch: sdpa, grad"]


def make_attention_group() -> Group:
    x, y = torch.randn(16, 64), torch.randn(16, 64)
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    leaf = q.clone().requires_grad_()
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    calls = [lambda: x + y]
    for attention in (mlcore.ops.scaled_dot_product_attention, F.scaled_dot_product_attention):
        calls += [functools.partial(attention, q, k, v), functools.partial(attention, leaf, k, v)]

    def check(row, got):
        error = relative_error(got, x + y if row == "x + y" else want)
        assert error < 1e-6, f"{row}: relative error {error:.1e}"
        return error

    return Group(dict(zip(ATTENTION_ROWS, calls, strict=True)), check)


@pytest.mark.parametrize("row", ROWS)
def test_overhead(race, row):
    race("overhead rms_norm (16,64) float32", row, make_group)


@pytest.mark.parametrize("row", ATTENTION_ROWS)
def test_attention_overhead(race, row):
    race("overhead attention (1,2,8,16) float32", row, make_attention_group)
