"""Attention over patterns: what a window, strides, global tokens and packed documents cost beside the same mask elsewhere.

Rows: mlcore with a pattern; torch-sdpa with the dense boolean mask; torch-sdpa over a padded batch (documents); attention in
look-back buckets made of torch's own ops, as packages for local attention do it (windows); compiled FlexAttention with a block
mask (forward, with --compiled). Next: kernels/attention/README.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import harness
import pytest
import torch
import torch.nn.functional as F
from _attention import DTYPES, TOLERANCE, call_of
from harness import Group, name_of, relative_error

import mlcore
from mlcore.patterns import Causal, Documents, GlobalTokens, Strided, Window

ROWS = ("mlcore", "torch-sdpa masked", "torch-sdpa padded", "torch buckets", "flex (compiled)")


def zipf_lengths(total: int, least: int = 32) -> list[int]:
    """Document lengths that fall as 1 / rank, as text collections' do, shuffled; their sum is total."""
    weights = [1 / r for r in range(1, 25)]
    lengths = [max(least, int(total * w / sum(weights))) for w in weights]
    lengths[0] += total - sum(lengths)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    return [lengths[i] for i in order.tolist()]


DOCUMENTS = zipf_lengths(8192)
CU = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()])


@dataclass(frozen=True)
class Problem:
    name: str
    shape: tuple[int, int, int, int]  # (B, H, T, D)
    backward: bool = False

    def __str__(self) -> str:
        return f"{'fwd+bwd' if self.backward else 'fwd'} ({','.join(map(str, self.shape))}) {self.name}"

    @property
    def window(self) -> int:
        return int(self.name.split()[-1]) if self.name.startswith("window") else 0

    def pattern(self):
        if self.window:
            return Causal() & Window(self.window - 1, 0)
        return {
            "strided 64 + local 64": Causal() & (Strided(64) | Window(63, 0)),
            "global 16 + window 128": GlobalTokens(16) | Window(128, 128),
            "documents": Documents(CU) & Causal(),
        }[self.name]

    def rule(self):
        """FlexAttention's mask_mod."""
        W, owner = self.window, torch.searchsorted(CU, torch.arange(int(CU[-1])), right=True)
        if W:
            return lambda b, h, i, j: (i >= j) & (i - j < W)
        return {
            "strided 64 + local 64": lambda b, h, i, j: (i >= j) & (((i - j) % 64 == 0) | (i - j < 64)),
            "global 16 + window 128": lambda b, h, i, j: (i < 16) | (j < 16) | ((i - j).abs() <= 128),
            "documents": lambda b, h, i, j: (owner[i] == owner[j]) & (i >= j),
        }[self.name]

    def pairs(self) -> int:
        T, W = self.shape[2], self.window
        if W:
            return T * W - W * (W - 1) // 2
        return int(self.pattern().to_dense(T).sum())

    def flops(self) -> float:
        """Multiplies and adds of the pairs that are seen: two products forward, five more backward."""
        return 4 * self.shape[1] * self.shape[3] * self.pairs() * (3.5 if self.backward else 1)


PROBLEMS = [
    Problem("window 128", (1, 4, 4096, 64)),
    Problem("window 256", (1, 8, 4096, 64)),
    Problem("strided 64 + local 64", (1, 4, 4096, 64)),
    Problem("global 16 + window 128", (1, 8, 4096, 64)),
    Problem("documents", (1, 8, 8192, 64)),
]
ALL = PROBLEMS + [Problem(p.name, p.shape, backward=True) for p in PROBLEMS]


def inputs(problem: Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(problem.shape, generator=generator).to(dtype) for _ in range(4)]


def reference(problem: Problem, q, k, v, do) -> list[torch.Tensor]:
    """[o] or [o, dq, dk, dv] in float64, a head and a thousand queries at a time."""
    mask = problem.pattern().to_dense(problem.shape[2])
    results = [torch.zeros(problem.shape, dtype=torch.float64) for _ in range(4 if problem.backward else 1)]
    for h in range(problem.shape[1]):
        K, V = (t[0, h].double().requires_grad_(problem.backward) for t in (k, v))
        for i in range(0, problem.shape[2], 1024):
            rows = slice(i, i + 1024)
            Q = q[0, h, rows].double().requires_grad_(problem.backward)
            s = (Q @ K.mT * problem.shape[3] ** -0.5).masked_fill(~mask[rows], -torch.inf)
            o = s.softmax(-1) @ V
            results[0][0, h, rows] = o.detach()
            if problem.backward:
                dq, dk, dv = torch.autograd.grad(o, (Q, K, V), do[0, h, rows].double())
                results[1][0, h, rows] = dq
                results[2][0, h] += dk
                results[3][0, h] += dv
    return results


def buckets(q, k, v, window: int):
    """Causal attention over the last `window` keys, by buckets of that size that look one bucket back."""
    B, H, T, D = q.shape
    n = T // window
    q, k, v = (t.reshape(B, H, n, window, D) for t in (q, k, v))
    k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], 3) for t in (k, v))
    i = torch.arange(T).view(n, window, 1)
    j = (torch.arange(n)[:, None] - 1) * window + torch.arange(2 * window)
    distance = i - j[:, None]
    seen = (distance >= 0) & (distance < window) & (j[:, None] >= 0)
    s = (q @ k.mT * D**-0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    return (s.softmax(-1) @ v).reshape(B, H, T, D)


def padded(q, k, v):
    """One padded sequence a document, by torch's own causal kernel; packed again."""

    def apart(t):
        return torch.nn.utils.rnn.pad_sequence(
            [d.transpose(0, 1) for d in t[0].split(DOCUMENTS, 1)], batch_first=True
        ).transpose(1, 2)

    o = F.scaled_dot_product_attention(apart(q), apart(k), apart(v), is_causal=True)
    return torch.cat([o[d, :, :n] for d, n in enumerate(DOCUMENTS)], 1)[None]


def implementations(problem: Problem) -> dict:
    mask, pattern = problem.pattern().to_dense(problem.shape[2]), problem.pattern()
    rows = {
        "mlcore": lambda q, k, v: mlcore.ops.attention(q, k, v, pattern=pattern),
        "torch-sdpa masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    if problem.name == "documents":
        rows["torch-sdpa padded"] = padded
    if problem.window:
        rows["torch buckets"] = functools.partial(buckets, window=problem.window)
    return rows


def compiled_flex(problem: Problem):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = problem.shape[2]
    blocks = create_block_mask(problem.rule(), None, None, T, T, device="cpu")
    return functools.partial(harness.compiled(flex_attention), block_mask=blocks)


def make_group(problem: Problem, dtype: torch.dtype, compiled: bool) -> Group:
    q, k, v, do = inputs(problem, dtype)
    want = reference(problem, q, k, v, do)
    calls = {row: call_of(fn, problem.backward, q, k, v, do) for row, fn in implementations(problem).items()}
    if compiled and not problem.backward:
        calls["flex (compiled)"] = call_of(compiled_flex(problem), False, q, k, v, do)

    def check(row, got):
        errors = {name: relative_error(x, y) for name, x, y in zip(("o", "dq", "dk", "dv"), got, want)}
        loose = 4 if row != "mlcore" else 1  # torch sums bfloat16 gradients in bfloat16
        assert max(errors.values()) < loose * TOLERANCE[dtype], f"{row}: relative errors {errors} against float64"
        return max(errors.values())

    return Group(calls, check, flops=problem.flops())


def applies(problem: Problem, row: str) -> bool:
    return {
        "torch-sdpa padded": problem.name == "documents",
        "torch buckets": bool(problem.window),
        "flex (compiled)": not problem.backward,
    }.get(row, True)


CASES = [(p, d, r) for p in ALL for d in DTYPES for r in ROWS if applies(p, r)]


@pytest.mark.parametrize(("problem", "dtype", "row"), CASES, ids=[f"{name_of(d)} {p}-{r}" for p, d, r in CASES])
def test_patterns(race, request, problem, dtype, row):
    compiled = request.config.getoption("compiled")
    race(f"attention {name_of(dtype)} {problem}", row, lambda: make_group(problem, dtype, compiled))


LENGTHS = (4096, 16384, 65536)


def make_length_group() -> Group:
    """Time must follow T: the rows are one problem at growing lengths."""
    calls, wants = {}, {}
    pattern = Causal() & Window(255, 0)
    for T in LENGTHS:
        q, k, v, _ = inputs(Problem("window 256", (1, 2, T, 64)), torch.float32)
        calls[f"mlcore, T = {T}"] = functools.partial(mlcore.ops.attention, q, k, v, pattern=pattern)
        wants[f"mlcore, T = {T}"] = buckets(q.double(), k.double(), v.double(), 256)

    def check(row, got):
        error = relative_error(got, wants[row])
        assert error < TOLERANCE[torch.float32], f"{row}: relative error {error:.1e} against float64"
        return error

    return Group(calls, check, flops=0)


@pytest.mark.parametrize("row", [f"mlcore, T = {T}" for T in LENGTHS])
def test_time_follows_the_length(race, row):
    race("lengths attention fwd float32 (1,2,T,64) window 256", row, make_length_group)
