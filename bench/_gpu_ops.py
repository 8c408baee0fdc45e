"""What the gpu_<op>.py of ops with a backward pass share: one group a problem and pass, rows "mlcore cuda", "mlcore triton" and
torch's ways, all checked against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from harness import Group, relative_error

BACKENDS = ("cuda", "triton")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the norm of the error; gradients sum rounded outputs


def random(*size: int, dtype: torch.dtype, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*size, device="cuda") * std).to(dtype)


def make_group(
    ours: Callable, truth: Callable, others: Mapping[str, Callable], inputs: list[torch.Tensor], backward: bool, moved: float
) -> Group:
    """ours(*inputs, impl=); truth and others (row's name -> function) take the inputs alone. moved: bytes of one call."""
    torch.manual_seed(0)
    dtype = inputs[0].dtype
    seed = []

    def call_of(fn, cast=lambda t: t):
        leaves = [cast(t).detach().requires_grad_(backward) for t in inputs]
        if not backward:
            return lambda: [fn(*leaves)]
        out = fn(*leaves)
        if not seed:
            seed.append(torch.randn_like(out))
        return lambda: list(torch.autograd.grad(out, leaves, seed[0].to(out.dtype), retain_graph=True))

    want = call_of(truth, torch.Tensor.double)()

    def check(row: str, got: list[torch.Tensor]) -> float:
        error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
        assert not row.startswith("mlcore") or error < TOLERANCE[dtype], f"{row}: relative error {error}"
        return error

    def later(make):
        """A row that is set up by its first call, so that a backend which is not there raises in the row and not before."""
        made = []
        return lambda: (made or made.append(make()) or made)[0]()

    rows = {f"mlcore {i}": later(lambda i=i: call_of(lambda *t: ours(*t, impl=i))) for i in BACKENDS}
    rows |= {name: later(lambda fn=fn: call_of(fn)) for name, fn in others.items()}
    return Group(rows, check, bytes=moved)
