"""What bench_rms_norm.py and bench_layer_norm.py share: shapes, rows and checks. The work is memory traffic, so rates are GB/s.

Bytes are those that must move: x (and residual) in, y (and the sum) out; backward reads dy and the sum and writes dx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from harness import Group, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
STOCK_TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 0.2,
}  # torch sums layer_norm's bf16 weight gradient in bf16: 7 % at 8192 rows
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, int]  # (rows, columns)
    residual: bool = False
    backward: bool = False

    def __str__(self) -> str:
        return (
            f"{'fwd+bwd' if self.backward else 'fwd'} ({','.join(map(str, self.shape))}){' +residual' if self.residual else ''}"
        )

    def bytes(self, dtype: torch.dtype) -> float:
        tensors = 4 if self.residual else 2
        if self.backward:
            tensors += 4 if self.residual else 3
        return tensors * self.shape[0] * self.shape[1] * dtype.itemsize


PROBLEMS = [
    Problem((4096, 384)),  # a small BERT's batch
    Problem((512, 4096)),  # a large decoder's prompt
    Problem((8192, 1024)),  # beyond the caches
    Problem((512, 4096), residual=True),
    Problem((8192, 1024), residual=True),
    Problem((8192, 1024), backward=True),
    Problem((8192, 1024), residual=True, backward=True),
]


def make_group(problem: Problem, dtype: torch.dtype, biased: bool, ours: Callable, stock: Callable, compiled: bool) -> Group:
    """ours(x, weight[, bias], residual=None) and stock(x, weight[, bias]) as rows; stock adds a residual by itself."""
    generator = torch.Generator().manual_seed(0)
    cols = problem.shape[1]
    x, residual, dy, ds = (torch.randn(problem.shape, generator=generator).to(dtype) for _ in range(4))
    params = [torch.randn(cols, generator=generator).to(dtype) for _ in range(2 if biased else 1)]

    def add_then_norm(x, *params, residual=None):
        if residual is None:
            return stock(x, *params)
        s = x + residual
        return stock(s, *params), s

    def call_of(norm, cast=lambda t: t):
        inputs = [
            cast(t).detach().requires_grad_(problem.backward)
            for t in ([x, *params, residual] if problem.residual else [x, *params])
        ]
        n = 1 + len(params)
        grads = [cast(t) for t in ([dy, ds] if problem.residual else [dy])]

        def call():
            out = norm(*inputs[:n], residual=inputs[n] if problem.residual else None)
            out = list(out) if problem.residual else [out]
            return out + list(torch.autograd.grad(out, inputs, grads)) if problem.backward else out

        return call

    calls = {"mlcore": call_of(ours), "torch": call_of(add_then_norm)}
    if compiled:
        calls["torch (compiled)"] = call_of(harness.compiled(add_then_norm))
    want = [t.detach() for t in call_of(add_then_norm, torch.Tensor.double)()]

    def check(row, got):
        errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
        allowed = TOLERANCE[dtype] if row == "mlcore" else STOCK_TOLERANCE[dtype]
        assert max(errors) < allowed, f"{row}: relative errors {errors} against float64, {allowed} is allowed"
        return max(errors)

    return Group(calls, check, bytes=problem.bytes(dtype))
