"""What gpu_rms_norm.py and gpu_layer_norm.py share. As in _norms.py the rates count the bytes that must move: x (and residual)
in, y (and the sum) out; backward reads dy, ds and the sum and writes dx.
"""

from __future__ import annotations

from collections.abc import Callable

import _gpu
import torch
from harness import Group, relative_error

SHAPES = [(16384, 768), (8192, 4096), (4096, 8192), (2048, 16384)]  # (rows, columns)
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 1.5e-2,
}  # of the norm of the error; bfloat16 rounds every output once or twice


def _group(
    shape: tuple[int, int], dtype: torch.dtype, residual: bool, backward: bool, ours: Callable, stock: Callable, params: int
):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator).to(dtype)

    tensors = [random(*shape)] + [random(shape[1]) for _ in range(params)] + ([random(*shape)] if residual else [])
    cotangents = [random(*shape) for _ in range(2 if residual else 1)]

    def add_then_norm(x, *rest, residual=None, impl=None):
        if residual is None:
            return stock(x, *rest)
        s = x + residual
        return stock(s, *rest), s

    def call_of(norm, cast=lambda t: t, **kwargs):
        inputs = [cast(t).detach().requires_grad_(backward) for t in tensors]
        given = [cast(t) for t in cotangents]

        def forward():
            out = norm(*inputs[: 1 + params], residual=inputs[-1] if residual else None, **kwargs)
            return list(out) if residual else [out]

        if not backward:
            return forward
        outputs = forward()
        return lambda: list(torch.autograd.grad(outputs, inputs, given, retain_graph=True))

    want = call_of(add_then_norm, torch.Tensor.double)()

    def check(row: str, got: list[torch.Tensor]) -> float:
        error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
        assert not row.startswith("mlcore") or error < TOLERANCE[dtype], f"{row}: relative error {error}"
        return error

    moved = 3 + residual if backward else 2 + 2 * residual
    rows = {f"mlcore {impl}": _lazy(call_of, ours, impl=impl) for impl in ("cuda", "triton")}
    rows["torch"] = call_of(add_then_norm)
    return Group(rows, check, bytes=moved * shape[0] * shape[1] * dtype.itemsize)


def _lazy(call_of: Callable, norm: Callable, **kwargs) -> Callable[[], object]:
    """A row that is set up by its first call, so that a backend which is not there raises in the row and not before."""
    made = []

    def call():
        if not made:
            made.append(call_of(norm, **kwargs))
        return made[0]()

    return call


def main(op: str, ours: Callable, stock: Callable, params: int, argv: list[str] | None) -> int:
    """ours(x, *params, residual=, impl=) and stock(x, *params) with `params` vectors; backward alone is timed as bwd."""
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES if dtype == torch.bfloat16 else SHAPES[1:2]:
            for residual in (False, True):
                for backward in (False, True):
                    name = (
                        f"{op} {'bwd' if backward else 'fwd'} {str(dtype)[6:]} ({shape[0]},{shape[1]}){' +residual' * residual}"
                    )
                    args = shape, dtype, residual, backward, ours, stock, params
                    groups.append((name, lambda args=args: _group(*args)))
    return _gpu.main(groups, argv)
