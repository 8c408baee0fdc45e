"""What the gpu_<op>.py of ops with a backward pass share: one group a problem and pass, rows "mlcore cuda", "mlcore triton" and
torch's ways, all checked against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import _gpu
import harness
import torch
from harness import Group, relative_error

BACKENDS = ("cuda", "triton")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}  # of the norm of the error; gradients sum rounded outputs


def random(*size: int, dtype: torch.dtype, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*size, device="cuda") * std).to(dtype)


def make_group(
    ours: Callable,
    stock: Callable,
    inputs: list[torch.Tensor],
    backward: bool,
    *,
    moved: float = 0,
    flops: float = 0,
    truth: Callable | None = None,
    form: str = "",
) -> Group:
    """ours(*inputs, impl=) against stock(*inputs) of torch's ops, eager and compiled; form: which one that is, in rows' names.
    truth: what is computed in float64, if not stock. moved, flops: the bytes or the work of one call.
    """
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

    want = call_of(truth or stock, torch.Tensor.double)()

    def check(row: str, got: list[torch.Tensor]) -> float:
        error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
        assert not row.startswith("mlcore") or error < TOLERANCE[dtype], f"{row}: relative error {error}"
        return error

    def later(make):
        """A row that is set up by its first call, so that a backend which is not there raises in the row and not before."""
        made = []
        return lambda: (made or made.append(make()) or made)[0]()

    rows = {f"mlcore {i}": later(lambda i=i: call_of(lambda *t: ours(*t, impl=i))) for i in BACKENDS}
    rows["torch" + form] = later(lambda: call_of(stock))
    rows["torch.compile" + form] = later(lambda: call_of(harness.compiled(stock)))
    return Group(rows, check, flops=flops, bytes=moved)


def run(
    op: str, problems: Iterable[tuple], words: Callable[..., str], group: Callable[..., Group], argv, passes=("fwd", "bwd")
) -> int:
    """The script's main: group(*problem, dtype, backward) of every problem, dtype and pass, named by words(*problem)."""
    groups = []
    for dtype in TOLERANCE:
        for problem in problems:
            for backward, name in enumerate(passes):
                args = *problem, dtype, bool(backward)
                groups.append((f"{op} {name} {str(dtype)[6:]} {words(*problem)}", lambda args=args: group(*args)))
    return _gpu.main(groups, argv)


def shape_of(shape: Iterable[int]) -> str:
    return f"({','.join(map(str, shape))})"
