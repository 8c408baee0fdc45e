"""What the tests of binary ops share: the ways to compute, and the signs."""

from __future__ import annotations

import torch

from mlcore import testing

WAYS = testing.ways("binary_linear", "vpopcntdq")
LEVELS = [name for name in WAYS if "without" not in name]


def signs(x):
    return 1.0 - 2.0 * (x < 0).to(torch.float64)
