"""rms_norm: registration and the public function. The equations are in kernels/rms_norm/rms_norm.h."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import _C
from .._backend import choose
from .._registry import create_graph, direct, direct_apply, kernel, lean, needs_grad, register
from ..kernels.rms_norm import rms_norm_ref
from . import _rows

_OP = "rms_norm"
_cpu_fwd = _C.launch.rms_norm_fwd
_empty_like = torch.empty_like


def _run_fwd(x, residual, weight, eps, impl, statistics=True):
    rows = _rows.rows_of(x)  # (R, C)
    y, rstd = _rows.new_rows(rows), _rows.new_statistic(rows) if statistics else None
    s = None if residual is None else _rows.new_rows(rows)
    fwd = kernel(_OP, "fwd", impl)
    fwd(rows, _rows.rows_of(residual), _rows.contiguous(weight), eps, y, s, rstd)
    return _rows.shaped(y, x), None if s is None else _rows.shaped(s, x), rstd


def _infer_lean(x, weight, eps):
    y = _empty_like(x)
    _cpu_fwd(x, None, weight, eps, y, None, None)
    return y


def _infer_launch(x, weight, eps):
    impl = choose(_OP, None, x)
    if impl == "reference":
        return rms_norm_ref.rms_norm(x, weight, None, eps)[0].contiguous()
    return _run_fwd(x, None, weight, eps, impl, statistics=False)[0]


def _infer_cpu(x, weight, eps):
    try:
        return _infer_lean(x, weight, eps)
    except ValueError:  # strides that take a copy; what is wrong is refused once more
        return _infer_launch(x, weight, eps)


def _run_bwd(dy, ds, s, weight, rstd, need_dweight, impl):
    rows = _rows.rows_of(s)  # (R, C)
    dx = _rows.new_rows(rows)
    dweight = torch.empty_like(weight) if need_dweight else None
    partial = _rows.new_partials(rows) if need_dweight else None
    bwd = kernel(_OP, "bwd", impl)
    bwd(_rows.rows_of(dy), _rows.rows_of(ds), rows, _rows.contiguous(weight), rstd, dx, dweight, partial)
    return _rows.shaped(dx, s), dweight


# A schema has a fixed number of outputs: what was not asked for is an empty tensor there.
def _fwd_launch(x, residual, weight, eps, impl):
    y, s, rstd = _run_fwd(x, residual, weight, eps, impl)
    return y, x.new_empty(0) if s is None else s, rstd


def _fwd_fake(x, residual, weight, eps, impl):
    return _rows.fake_rows(x), x.new_empty(0) if residual is None else _rows.fake_rows(x), _rows.fake_statistic(x)


def _bwd_launch(dy, ds, s, weight, rstd, need_dweight, impl):
    dx, dweight = _run_bwd(dy, ds, s, weight, rstd, need_dweight, impl)
    return dx, s.new_empty(0) if dweight is None else dweight


def _bwd_fake(dy, ds, s, weight, rstd, need_dweight, impl):
    return _rows.fake_rows(s), torch.empty_like(weight) if need_dweight else s.new_empty(0)


_fwd = register(
    "rms_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, float eps, str impl) -> (Tensor y, Tensor s, Tensor rstd)",
    launch=_fwd_launch,
    fake=_fwd_fake,
)
# What most calls are, with one output: the dispatcher's part grows with arguments and outputs.
_infer = register(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    launch=_infer_launch,
    cpu_launch=_infer_cpu,
    fake=lambda x, weight, eps: _rows.fake_rows(x),
)
_bwd = register(
    "rms_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor rstd, bool need_dweight, str impl)"
    " -> (Tensor dx, Tensor dweight)",
    launch=_bwd_launch,
    fake=_bwd_fake,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, impl):
        run = _run_fwd if direct(x, residual, weight) else _fwd
        y, s, rstd = run(x, residual, weight, eps, impl)
        ctx.eps, ctx.impl = eps, impl
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else s, weight, rstd)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, dy, ds=None):
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        if dy is None:  # only s was used
            return ds if need_x else None, ds if need_residual else None, None, None, None
        args = (dy, ds, *ctx.saved_tensors, need_weight, ctx.impl)
        if create_graph():
            dx, dweight = _RmsNormGrad.apply(ctx.eps, *args)
        else:
            dx, dweight = (_run_bwd if direct(*args[:5]) else _bwd)(*args)
        return dx if need_x else None, dx if need_residual else None, dweight if need_weight else None, None, None


class _RmsNormLean(_RmsNorm):
    """_RmsNorm for what lean() lets through."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, impl):
        y, rstd = _empty_like(x), _rows.new_lean_statistic(x)
        _cpu_fwd(x, None, weight, eps, y, None, rstd)
        ctx.eps, ctx.impl = eps, impl
        ctx.save_for_backward(x, weight, rstd)
        return y


_lean_apply = direct_apply(_RmsNormLean)


class _RmsNormGrad(torch.autograd.Function):
    """The backward pass as a function that can be differentiated once more."""

    @staticmethod
    def forward(ctx, eps, dy, ds, s, weight, rstd, need_dweight, impl):
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, s, weight)
        return _bwd(dy, ds, s, weight, rstd, need_dweight, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, ddx, ddweight):
        dy, *inputs = ctx.saved_tensors

        def norm(s, weight):
            return rms_norm_ref.rms_norm(s, weight, None, ctx.eps)[0]

        grad_dy, grad_s, grad_weight = _rows.second_order(norm, dy, inputs, (ddx, ddweight))
        grad_ds = ddx if ctx.needs_input_grad[2] else None
        return None, grad_dy, grad_ds, grad_s, grad_weight, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMS normalisation over the last dimension (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization").

    y = s / sqrt(mean(s^2) + eps) * weight, with s = x + residual. Statistics and sums are float32.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 and other devices: the reference).
        weight: (C), x's dtype or float32; None is all ones.
        residual: x's shape and dtype; added first.
        eps: added to the mean square, not negative.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        y (..., C) in x's dtype; with a residual the pair (y, s), s being the next residual. Both are differentiable.

    Raises:
        ValueError: shapes, dtypes or eps break the rules above, or impl can't serve the call.
    """
    if residual is None and impl is None and (way := lean(x, weight)):
        try:
            return _infer_lean(x, weight, eps) if way == 1 else _lean_apply(x, None, weight, eps, "cpu")
        except ValueError:  # refused by the kernel: the checks below say it in torch's terms
            pass
    x, residual, backend = _rows.norm_args(_OP, x, weight, None, residual, eps, impl)
    if backend == "reference":
        y, s = rms_norm_ref.rms_norm(x, weight, residual, eps)
    elif needs_grad(x, residual, weight):
        out = _RmsNorm.apply(x, residual, weight, eps, backend)
        y, s = (out, None) if residual is None else out
    elif residual is None and impl is None:
        y, s = (_infer_launch if direct(x, weight) else _infer)(x, weight, eps), None
    else:
        run = _run_fwd if direct(x, residual, weight) else _fwd
        y, s, _ = run(x, residual, weight, eps, backend)
    return y if residual is None else (y, s)
