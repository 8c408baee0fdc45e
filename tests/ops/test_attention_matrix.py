"""Kinds of pattern crossed with attention's other arguments, dtypes and head dims: results and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from attention_suite import check, qkv
from test_attention_patterns import DTYPES, KERNELS, PATTERNS, TK, TQ, B, H

from mlcore.ops import attention
from mlcore.patterns import Causal, Documents, GlobalTokens, Strided, Window

LOCAL = Causal() & (Window(50, 0) | GlobalTokens(3) | Strided(17))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_odd_length(dtype):
    check(KERNELS[-1], qkv((1, 1, 1, 1023, 1023, 32, 32), dtype), pattern=LOCAL)


@pytest.mark.parametrize("T", [1, 113, 127, 239, 799])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_lengths(T, dtype):
    check(KERNELS[-1], qkv((1, 2, 1, T, T, 32, 32), dtype), pattern=LOCAL)
    check(KERNELS[-1], qkv((1, 2, 2, T, 131, 8, 8), dtype), pattern=LOCAL & Documents([0, T // 3, T // 3, T], [0, 50, 70, 70]))


@pytest.mark.parametrize("D", [8, 32, 59, 64, 80, 111, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(D, dtype):
    check(KERNELS[-1], qkv((1, 2, 1, 113, 127, D, D), dtype), pattern=LOCAL)


FAMILIES = [
    "window",
    "dilated",
    "strided",
    "some tokens",
    "documents of two lengths",
    "blocks by sequence",
    "sparse graph",
    "clusters by head",
    "dense",
    "heads",
]
FEATURES = ["softcap", "bias", "relative", "alibi_slopes", "sinks"]
D_OF = [8, 32, 59, 64, 80, 111, 128, 256]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("pattern", FAMILIES)
def test_pattern_feature_dtype(pattern, feature):
    """The kernels against the reference in float64, dtypes and head dims taken in turn: o, lse and every gradient."""
    at = FAMILIES.index(pattern) * len(FEATURES) + FEATURES.index(feature)
    dtype = DTYPES[(FAMILIES.index(pattern) + FEATURES.index(feature)) % 3]
    inputs = qkv((B, H, H, TQ, TK, D_OF[at % 8], D_OF[(at + 3) % 8]), dtype)
    shapes = {"bias": (H, TQ, TK), "relative": (H, TQ + TK - 1), "alibi_slopes": (H,), "sinks": (H,)}
    options = {"softcap": 2.0} if feature == "softcap" else {}
    extra = {} if feature == "softcap" else {feature: torch.rand(shapes[feature]) / (50 if feature == "alibi_slopes" else 1)}
    weight = [torch.randn(B, H, TQ, inputs["v"].shape[3]), torch.randn(B, H, TQ)]

    def run(impl, wide):
        leaves = {n: (t.double() if wide else t).detach().requires_grad_() for n, t in (inputs | extra).items()}
        o, lse = attention(**leaves, **options, pattern=PATTERNS[pattern], return_lse=True, impl=impl)
        lse = torch.where(lse == float("-inf"), 0.0, lse)
        total = (o * weight[0]).sum() + (lse * weight[1]).sum()
        return [o.detach(), lse.detach(), *torch.autograd.grad(total, list(leaves.values()))]

    roundoff = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for n, (got, want) in enumerate(zip(run("cpu", False), run("reference", True))):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
        assert error < roundoff, f"result {n}: relative error {error:.1e}"
