"""Attention against torch's: forward, forward with backward, grouped heads, padding, and how backward scales with threads.

Rows: mlcore; torch-sdpa in whichever memory layout it is faster in; the same through float32 where the dtype is lower (a
user may well do that); torch-math; and compiled FlexAttention (forward, with --compiled). Next: kernels/attention/README.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import harness
import pytest
import torch
import torch.nn.functional as F
from _attention import DTYPES, TOLERANCE, call_of
from harness import Group, interleaved, name_of, relative_error

import mlcore

ROWS = ("mlcore", "torch-sdpa", "torch-sdpa via fp32", "torch-math", "flex (compiled)")


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, int, int, int]  # (B, H, T, D)
    kind: str = "full"  # "full", "causal", "padding"
    kv_heads: int | None = None
    backward: bool = False

    def __str__(self) -> str:
        heads = f" kv_heads={self.kv_heads}" if self.kv_heads else ""
        return f"{'fwd+bwd' if self.backward else 'fwd'} ({','.join(map(str, self.shape))}){heads} {self.kind}"

    @property
    def causal(self) -> bool:
        return self.kind == "causal"

    def lengths(self) -> list[int]:
        """Keys that each sequence has: all, or with padding from a quarter to all of T."""
        B, _, T, _ = self.shape
        return [T - (T * 3 // 4) * b // max(B - 1, 1) for b in range(B)] if self.kind == "padding" else [T] * B

    def flops(self) -> float:
        """Multiplies and adds of the products that can't be skipped: two of the forward pass, five more of backward."""
        _, H, T, D = self.shape
        pairs = sum(T * (T + 1) / 2 if self.causal else T * n for n in self.lengths())
        return 4 * H * D * pairs * (3.5 if self.backward else 1)


FORWARD = [
    Problem((1, 8, 2048, 64)),
    Problem((1, 8, 2048, 64), "causal"),
    Problem((1, 8, 2048, 128), "causal"),
    Problem((8, 12, 128, 32)),
    Problem((8, 12, 512, 32), "padding"),
    Problem((1, 32, 1024, 64), "causal", kv_heads=8),
]
BACKWARD = [
    Problem((1, 8, 2048, 64), backward=True),
    Problem((1, 8, 2048, 64), "causal", backward=True),
]


def inputs(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v, do of a problem, standard normal as behind a layer norm, and the mask (B, 1, 1, T) of padding or None."""
    generator = torch.Generator().manual_seed(0)
    B, H, T, D = problem.shape
    q, k, v, do = (
        torch.randn(B, heads, T, D, generator=generator).to(dtype)
        for heads in (H, problem.kv_heads or H, problem.kv_heads or H, H)
    )
    mask = None
    if problem.kind == "padding":
        mask = (torch.arange(T) < torch.tensor(problem.lengths())[:, None])[:, None, None]
    return q, k, v, do, mask


def reference(problem: Problem, q, k, v, do, mask) -> list[torch.Tensor]:
    """[o] or [o, dq, dk, dv] in float64, a (sequence, key head) at a time to stay small."""
    group = q.shape[1] // k.shape[1]
    results = [torch.empty_like(x, dtype=torch.float64) for x in ((q, q, k, v) if problem.backward else (q,))]
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            args = [x.double().requires_grad_(problem.backward) for x in (q[b, heads], k[b, h : h + 1], v[b, h : h + 1])]
            scores = args[0] @ args[1].mT * q.shape[-1] ** -0.5
            if problem.causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
            if mask is not None:
                scores = scores.masked_fill(~mask[b, 0], -torch.inf)
            o = scores.softmax(-1) @ args[2]
            results[0][b, heads] = o.detach()
            if problem.backward:
                dq, dk, dv = torch.autograd.grad(o, args, do[b, heads].double())
                results[1][b, heads], results[2][b, h], results[3][b, h] = dq, dk[0], dv[0]
    return results


def with_layout(layout: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies with the memory order "BHTD" (contiguous) or "BTHD" (as a projection leaves them)."""
    return [t.contiguous() if layout == "BHTD" else t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]


def implementations(problem: Problem, mask) -> dict:
    """Row -> attention(q, k, v)."""
    gqa = {"enable_gqa": True} if problem.kv_heads else {}
    sdpa = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=problem.causal, **gqa)

    def via_fp32(q, k, v):
        return sdpa(q.float(), k.float(), v.float()).to(q.dtype)

    def math(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return sdpa(q, k, v)

    def ours(q, k, v):
        return mlcore.ops.attention(q, k, v, causal=problem.causal, pattern=mask)

    return {"mlcore": ours, "torch-sdpa": sdpa, "torch-sdpa via fp32": via_fp32, "torch-math": math}


def compiled_flex(problem: Problem):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, lengths = problem.shape[2], torch.tensor(problem.lengths())
    rule = {
        "full": None,
        "causal": lambda b, h, i, j: i >= j,
        "padding": lambda b, h, i, j: j < lengths[b],
    }[problem.kind]
    blocks = rule and create_block_mask(rule, problem.shape[0] if problem.kind == "padding" else None, None, T, T, device="cpu")
    return functools.partial(harness.compiled(flex_attention), block_mask=blocks, enable_gqa=bool(problem.kv_heads))


def make_group(problem: Problem, dtype: torch.dtype, compiled: bool) -> Group:
    q, k, v, do, mask = inputs(problem, dtype)
    want = reference(problem, q, k, v, do, mask)
    calls, extra = {}, {}
    for row, attention in implementations(problem, mask).items():
        if not applies(problem, dtype, row):
            continue
        layouts = {name: call_of(attention, problem.backward, *with_layout(name, q, k, v, do)) for name in ("BHTD", "BTHD")}
        if row == "torch-sdpa":
            pilot = interleaved(layouts, 3)
            layout = min(pilot, key=lambda name: pilot[name].min)
        else:
            layout = "BHTD"
        calls[row], extra[row] = layouts[layout], {"layout": layout}
    if compiled and applies(problem, dtype, "flex (compiled)"):
        calls["flex (compiled)"] = call_of(compiled_flex(problem), False, q, k, v, do)

    def check(row, got):
        errors = {name: relative_error(x, y) for name, x, y in zip(("o", "dq", "dk", "dv"), got, want)}
        assert max(errors.values()) < TOLERANCE[dtype], (
            f"{row}: relative errors {errors} against float64, {TOLERANCE[dtype]} is allowed"
        )
        return max(errors.values())

    return Group(calls, check, flops=problem.flops(), extra=extra)


def applies(problem: Problem, dtype: torch.dtype, row: str) -> bool:
    return not (row.endswith("via fp32") and dtype == torch.float32) and not (row.startswith("flex") and problem.backward)


CASES = [(p, d, r) for p in [*FORWARD, *BACKWARD] for d in DTYPES for r in ROWS if applies(p, d, r)]


@pytest.mark.parametrize(("problem", "dtype", "row"), CASES, ids=[f"{name_of(d)} {p}-{r}" for p, d, r in CASES])
def test_attention(race, request, problem, dtype, row):
    compiled = request.config.getoption("compiled")
    race(f"attention {name_of(dtype)} {problem}", row, lambda: make_group(problem, dtype, compiled))


SCALING = Problem((1, 1, 2048, 64), backward=True)


def make_scaling_group() -> Group:
    q, k, v, do, _ = inputs(SCALING, torch.float32)
    want = reference(SCALING, q, k, v, do, None)[1:]
    everyone = torch.get_num_threads()
    calls, before, extra = {}, {}, {}
    for impl in ("mlcore", "torch-sdpa"):
        args = [x.detach().requires_grad_() for x in (q, k, v)]
        o = implementations(SCALING, None)[impl](*args)
        for threads in (1, everyone):
            row = f"{impl}, {'1 thread' if threads == 1 else 'all threads'}"
            calls[row] = functools.partial(torch.autograd.grad, o, args, do, retain_graph=True)
            before[row] = functools.partial(torch.set_num_threads, threads)
            extra[row] = {"impl": impl, "threads": threads}

    def check(row, got):
        torch.set_num_threads(everyone)
        error = max(relative_error(x, y) for x, y in zip(got, want, strict=True))
        assert error < TOLERANCE[torch.float32], f"{row}: relative error {error:.1e} against float64"
        return error

    return Group(calls, check, flops=SCALING.flops() * 2.5 / 3.5, before=before, extra=extra)


@pytest.mark.parametrize("row", [f"{impl}, {n}" for impl in ("mlcore", "torch-sdpa") for n in ("1 thread", "all threads")])
def test_backward_threads(race, row):
    """One head, one sequence: backward must find its parallelism inside."""
    threads = torch.get_num_threads()
    try:
        race("scaling attention bwd float32 (1,1,2048,64) full", row, make_scaling_group)
    finally:
        torch.set_num_threads(threads)
