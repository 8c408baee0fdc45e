"""Layers of gathered attention at doubling lengths: their time must follow the length, full attention's is its square.

Rows: one layer at one length each; full attention beside them. Checked: finite, and the same twice.
Next: kernels/attention/README.md.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import Group

import mlcore

E, H = 256, 4
LENGTHS = (2048, 4096, 8192, 16384)
LAYERS = {
    "mlcore reformer": lambda: mlcore.nn.ReformerAttention(E, H, chunk=64, rounds=2, batch_first=True),
    "mlcore routing": lambda: mlcore.nn.RoutingAttention(E, H, clusters=32, window=128, batch_first=True),
    "mlcore sinkhorn": lambda: mlcore.nn.SinkhornAttention(E, H, block=64, batch_first=True),
    "mlcore full": lambda: mlcore.nn.MultiheadAttention(E, H, batch_first=True),
}


def lengths_of(name: str) -> tuple[int, ...]:
    return LENGTHS[:2] if name == "mlcore full" else LENGTHS


def make_group() -> Group:
    calls, first = {}, {}
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        layer = make().eval().requires_grad_(False)
        for T in lengths_of(name):
            x = torch.randn(1, T, E)
            calls[f"{name}, T = {T}"] = functools.partial(layer, x, x, x, need_weights=False)

    def check(row, got):
        again = first.setdefault(row, calls[row]()[0])
        assert got[0].isfinite().all(), row
        error = float((got[0] - again).abs().max())
        assert error < 1e-6, f"{row}: differs by {error:.1e} from call to call"
        return error

    return Group(calls, check)


@pytest.mark.parametrize("row", [f"{name}, T = {T}" for name in LAYERS for T in lengths_of(name)])
def test_time_follows_the_length(race, row):
    race(f"attention_gathered float32 fwd (1,T,{E}) {H} heads", row, make_group)
