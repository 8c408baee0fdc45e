"""AFT against plain torch: the two products, running sums and convolutions that a user would write for each kind. Next:
kernels/aft/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from harness import Group, relative_error

from mlcore.kernels.aft import aft_ref
from mlcore.ops import aft

TOLERANCE = 1e-4  # whether all rows solve the same problem; tests/ops holds the numerics contract


@dataclass(frozen=True)
class Problem:
    kind: str  # "full", "local", "simple", "conv"
    shape: tuple[int, int, int, int]  # (B, H, T, D)
    causal: bool = True
    window: int | None = None
    backward: bool = False

    def __str__(self) -> str:
        name = self.kind if self.window is None else f"{self.kind} {self.window}"
        causal = " causal" if self.causal else ""
        return f"{'fwd+bwd' if self.backward else 'fwd'} ({','.join(map(str, self.shape))}) {name}{causal}"

    def flops(self) -> float:
        """Of the two products, or of the band: numerators and denominators, and twice that in backward, 3 with the bias."""
        B, H, T, D = self.shape
        pairs = {"full": T * T, "simple": T}.get(self.kind) or T * (2 * self.window - 1)
        return 4 * B * H * pairs * D * (0.5 if self.causal and self.kind != "simple" else 1) * (3 if self.backward else 1)


PROBLEMS = [
    Problem("full", (1, 8, 1024, 64)),
    Problem("full", (1, 8, 1024, 64), causal=False),
    Problem("full", (1, 8, 1024, 64), backward=True),
    Problem("simple", (1, 8, 4096, 64)),
    Problem("simple", (1, 8, 4096, 64), backward=True),
    Problem("conv", (1, 8, 4096, 64), window=16),
    Problem("conv", (1, 8, 4096, 64), window=16, backward=True),
    Problem("local", (1, 8, 4096, 64), window=32),
]


def inputs(problem: Problem) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([q, k, v, bias where there is one], d_o), standard normal."""
    generator = torch.Generator().manual_seed(0)
    _, H, T, _ = problem.shape
    q, k, v, d_o = (torch.randn(problem.shape, generator=generator) for _ in range(4))
    columns = T if problem.window is None else problem.window if problem.causal else 2 * problem.window - 1
    bias = {"full": (1, T, T), "local": (1, T, columns), "conv": (H, columns), "simple": None}[problem.kind]
    return [q, k, v] + ([] if bias is None else [torch.randn(bias, generator=generator)]), d_o


def call_of(fn, problem, tensors, d_o):
    options = {"window": problem.window, "causal": problem.causal}
    if not problem.backward:

        def forward():
            with torch.no_grad():
                return [fn(*tensors, **options)]

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]

    def forward_backward():
        o = fn(*leaves, **options)
        return [o, *torch.autograd.grad(o, leaves, d_o)]

    return forward_backward


def rows_of(problem: Problem) -> dict:
    torch_way = {"conv": {"torch convolution": aft_ref.convolution}}.get(problem.kind, {"torch products": aft_ref.products})
    return {"mlcore": aft} | (torch_way if problem.kind != "simple" else {"torch running sums": aft_ref.products})


def make_group(problem: Problem) -> Group:
    tensors, d_o = inputs(problem)
    rows = {row: call_of(fn, problem, tensors, d_o) for row, fn in rows_of(problem).items()}
    wide = [t.double() for t in tensors]
    want = call_of(aft_ref.products, problem, wide, d_o.double())()

    def check(row, got):
        error = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        assert error < TOLERANCE, f"{row}: relative error {error:.1e} against float64"
        return error

    return Group(rows, check, flops=problem.flops())


CASES = [(p, r) for p in PROBLEMS for r in rows_of(p)]


@pytest.mark.parametrize(("problem", "row"), CASES, ids=[f"{p}-{r}" for p, r in CASES])
def test_aft(race, problem, row):
    race(f"aft float32 {problem}", row, lambda: make_group(problem))
