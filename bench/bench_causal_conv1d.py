"""causal_conv1d against torch.nn.functional.conv1d. The work is memory traffic: x in, y out;
backward reads dy and x, writes dx.
"""

from __future__ import annotations

from dataclasses import dataclass

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Group, name_of, relative_error

from mlcore.ops import causal_conv1d

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, int, int]  # (B, C, T)
    width: int = 4
    activation: str | None = None
    backward: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        sizes = ",".join(map(str, self.shape))
        words = [f"w{self.width}", self.activation or "", "channels_last" * self.channels_last]
        return f"{'bwd' if self.backward else 'fwd'} ({sizes}) {' '.join(w for w in words if w)}"


PROBLEMS = [
    Problem((4, 1024, 2048)),
    Problem((4, 1024, 2048), activation="silu"),
    Problem((4, 1024, 2048), channels_last=True),
    Problem((4, 1024, 2048), backward=True),
    Problem((4, 1024, 2048), activation="silu", backward=True),
    Problem((1, 4096, 512), width=16),
    Problem((1, 12288, 2048)),
    Problem((1, 12288, 2048), backward=True),
    Problem((1, 12288, 16384)),  # pytorch#192902; the check needs 8 GB
]


def make_group(problem: Problem, dtype: torch.dtype, compiled: bool) -> Group:
    B, C, T = problem.shape
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(B, C, T, generator=generator).to(dtype) for _ in range(2))
    weight = (torch.randn(C, problem.width, generator=generator) * problem.width**-0.5).to(dtype)
    if problem.channels_last:
        x, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy))

    def ours(x, weight):
        return causal_conv1d(x, weight, activation=problem.activation)

    def stock(x, weight):
        y = F.conv1d(x, weight[:, None], padding=problem.width - 1, groups=C)[..., :T]
        return F.silu(y) if problem.activation else y

    def call_of(fn):
        if not problem.backward:
            return lambda: [fn(x, weight)]
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = fn(*leaves)
        return lambda: list(torch.autograd.grad(y, leaves, dy, retain_graph=True))

    calls = {"mlcore": call_of(ours), "torch": call_of(stock)}
    if compiled:
        calls["torch (compiled)"] = call_of(harness.compiled(stock))
    if not problem.backward:
        calls["floor: clone of x"] = x.clone  # the floor: the same traffic, an output of the same size
    wide = [t.double().requires_grad_() for t in (x, weight)]
    h = F.pad(wide[0], (problem.width - 1, 0))
    y = sum(h[..., k : k + T] * wide[1][:, k, None] for k in range(problem.width))
    y = F.silu(y) if problem.activation else y
    want = [t.detach() for t in (torch.autograd.grad(y, wide, dy.double()) if problem.backward else [y])]

    def check(row, got):
        if "clone" in row:
            return 0.0
        errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
        assert max(errors) < TOLERANCE[dtype], f"{row}: relative errors {errors}, {TOLERANCE[dtype]} is allowed"
        return max(errors)

    return Group(calls, check, bytes=(3 if problem.backward else 2) * x.numel() * x.element_size())


@pytest.mark.parametrize("row", ["mlcore", "torch", "torch (compiled)", "floor: clone of x"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=name_of)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_causal_conv1d(race, request, problem, dtype, row):
    if "clone" in row and problem.backward:
        pytest.skip("a floor of the forward pass")
    compiled = request.config.getoption("compiled")
    name = name_of(dtype)
    race(f"causal_conv1d {name} {problem}", row, lambda: make_group(problem, dtype, compiled))
