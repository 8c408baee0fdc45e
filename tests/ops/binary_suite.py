"""What the tests of binary ops share: the ways to compute, and the signs."""

from __future__ import annotations

import contextlib

import torch

from mlcore import _C, testing

LEVELS = [name for name in testing.available("binary_linear") if name != "reference"]
WAYS = LEVELS + [f"{name} without vpopcntdq" for name in LEVELS if "avx512" in name]


@contextlib.contextmanager
def way(name):
    """An implementation, or "... without vpopcntdq"."""
    level, _, without = name.partition(" ")
    _C.binary_linear_allow_vpopcntdq(0 if without else 1)
    try:
        with testing.use(level) as impl:
            yield impl
    finally:
        _C.binary_linear_allow_vpopcntdq(1)


def signs(x):
    return 1.0 - 2.0 * (x < 0).to(torch.float64)
