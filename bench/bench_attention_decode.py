"""Decoding: one query a sequence over a key-value cache, which is a matter of reading the cache.

Rows: mlcore; mlcore with the same keys in pages of 16, and in int8; torch-sdpa over the contiguous cache; "floor: read", a
product of the cache with a vector in torch, which is the fastest read that torch offers: GB/s of all rows count the bytes of
the full-precision cache. Next: kernels/attention/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error

import mlcore

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
ROWS = ("mlcore", "mlcore, pages of 16", "lossy: mlcore, int8", "torch-sdpa", "floor: read")
PAGE = 16


@dataclass(frozen=True)
class Problem:
    B: int
    H: int
    Hkv: int
    T: int
    D: int

    def __str__(self) -> str:
        return f"({self.B},{self.H}:{self.Hkv},1,{self.D}) over {self.T} keys"


PROBLEMS = [
    Problem(8, 16, 16, 16384, 64),
    Problem(1, 8, 1, 16384, 64),
    Problem(8, 8, 1, 16384, 128),
    Problem(1, 32, 8, 4096, 128),
]


def make_group(p: Problem, dtype: torch.dtype) -> Group:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(p.B, p.H, 1, p.D, generator=generator).to(dtype)
    k, v = (torch.randn(p.B, p.Hkv, p.T, p.D, generator=generator).to(dtype) for _ in range(2))
    table = torch.randperm(p.B * p.T // PAGE, generator=generator).view(p.B, -1)
    pages = []
    for cache in (k, v):
        paged = torch.empty(table.numel(), p.Hkv, PAGE, p.D, dtype=dtype)
        paged[table] = cache.unflatten(2, (-1, PAGE)).transpose(1, 2)
        pages.append(paged)
    scales = [t.float().abs().amax(-1) / 127 for t in (k, v)]
    small = [(t.float() / s[..., None]).round().to(torch.int8) for t, s in zip((k, v), scales)]
    words = [t.view(-1).view(torch.float32).view(-1, 4096) for t in (k, v)]
    ones = torch.ones(4096)

    def ours(k, v, **options):
        return lambda: mlcore.ops.attention_with_kvcache(q, k, v, cache_seqlens=p.T, **options)

    calls = {
        "mlcore": ours(k, v),
        "mlcore, pages of 16": ours(*pages, page_table=table),
        "lossy: mlcore, int8": ours(*small, k_scale=scales[0], v_scale=scales[1]),
        "torch-sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=p.Hkv != p.H),
        "floor: read": lambda: [w @ ones for w in words],
    }

    def exact(q, k, v):
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=p.Hkv != p.H)

    def check(row, got):
        if row == "floor: read":
            return 0.0
        worst = 0.0
        for b in {0, p.B - 1}:
            keys = [t[b : b + 1] for t in (k, v)]
            if "int8" in row:
                keys = [t[b : b + 1].float() * s[b : b + 1, ..., None] for t, s in zip(small, scales)]
            worst = max(worst, relative_error(got[b : b + 1], exact(q[b : b + 1], *keys)))
        assert worst < TOLERANCE[dtype], f"{row}: relative error {worst:.1e} against float64"
        return worst

    return Group(calls, check, bytes=2 * k.numel() * k.element_size())


CASES = [(p, d, r) for p in PROBLEMS for d in TOLERANCE for r in ROWS]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("problem", "dtype", "row"), CASES, ids=[f"{name_of(d)} {p}-{r}" for p, d, r in CASES])
def test_decode(race, problem, dtype, row):
    race(f"attention_decode {name_of(dtype)} {problem}", row, lambda: make_group(problem, dtype))
