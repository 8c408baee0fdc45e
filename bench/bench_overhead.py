"""What a call costs before any work is done: rms_norm of a (16, 64) tensor by each way in, as ratios to `x + y`.

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
    "mlcore: binding, outputs given": 0.35,
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


@pytest.mark.parametrize("row", ROWS)
def test_overhead(race, row):
    race("overhead rms_norm (16,64) float32", row, make_group)
