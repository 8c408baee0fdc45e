"""layer_norm: registration and the public function. The equations are in kernels/layer_norm/layer_norm.h."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import _C
from .._backend import choose
from .._registry import create_graph, direct, direct_apply, kernel, lean, needs_grad, register
from ..kernels.layer_norm import layer_norm_ref
from . import _rows

_OP = "layer_norm"
_cpu_fwd = _C.launch.layer_norm_fwd
_empty_like = torch.empty_like


def _run_fwd(x, residual, weight, bias, eps, impl, statistics=True):
    rows = _rows.rows_of(x)  # (R, C)
    y = _rows.new_rows(rows)
    mean, rstd = (_rows.new_statistic(rows), _rows.new_statistic(rows)) if statistics else (None, None)
    s = None if residual is None else _rows.new_rows(rows)
    fwd = kernel(_OP, "fwd", impl)
    fwd(rows, _rows.rows_of(residual), _rows.contiguous(weight), _rows.contiguous(bias), eps, y, s, mean, rstd)
    return _rows.shaped(y, x), None if s is None else _rows.shaped(s, x), mean, rstd


def _infer_lean(x, weight, bias, eps):
    y = _empty_like(x)
    _cpu_fwd(x, None, weight, bias, eps, y, None, None, None)
    return y


def _infer_launch(x, weight, bias, eps):
    impl = choose(_OP, None, x)
    if impl == "reference":
        return layer_norm_ref.layer_norm(x, weight, bias, None, eps)[0].contiguous()
    return _run_fwd(x, None, weight, bias, eps, impl, statistics=False)[0]


def _infer_cpu(x, weight, bias, eps):
    try:
        return _infer_lean(x, weight, bias, eps)
    except ValueError:  # strides that take a copy; what is wrong is refused once more
        return _infer_launch(x, weight, bias, eps)


def _run_bwd(dy, ds, s, weight, bias, mean, rstd, need_dweight, need_dbias, impl):
    rows = _rows.rows_of(s)  # (R, C)
    dx = _rows.new_rows(rows)
    dweight = torch.empty_like(weight) if need_dweight else None
    dbias = torch.empty_like(bias) if need_dbias else None
    partial = _rows.new_partials(rows, 2) if need_dweight or need_dbias else None
    bwd = kernel(_OP, "bwd", impl)
    bwd(_rows.rows_of(dy), _rows.rows_of(ds), rows, _rows.contiguous(weight), mean, rstd, dx, dweight, dbias, partial)
    return _rows.shaped(dx, s), dweight, dbias


# A schema has a fixed number of outputs: what was not asked for is an empty tensor there.
def _fwd_launch(x, residual, weight, bias, eps, impl):
    y, s, mean, rstd = _run_fwd(x, residual, weight, bias, eps, impl)
    return y, x.new_empty(0) if s is None else s, mean, rstd


def _fwd_fake(x, residual, weight, bias, eps, impl):
    s = x.new_empty(0) if residual is None else _rows.fake_rows(x)
    return _rows.fake_rows(x), s, _rows.fake_statistic(x), _rows.fake_statistic(x)


def _bwd_launch(dy, ds, s, weight, bias, mean, rstd, need_dweight, need_dbias, impl):
    dx, dweight, dbias = _run_bwd(dy, ds, s, weight, bias, mean, rstd, need_dweight, need_dbias, impl)
    return dx, s.new_empty(0) if dweight is None else dweight, s.new_empty(0) if dbias is None else dbias


def _bwd_fake(dy, ds, s, weight, bias, mean, rstd, need_dweight, need_dbias, impl):
    dweight = torch.empty_like(weight) if need_dweight else s.new_empty(0)
    return _rows.fake_rows(s), dweight, torch.empty_like(bias) if need_dbias else s.new_empty(0)


_fwd = register(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str impl)"
    " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    launch=_fwd_launch,
    fake=_fwd_fake,
)
# What most calls are, with one output: the dispatcher's part grows with arguments and outputs.
_infer = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    launch=_infer_launch,
    cpu_launch=_infer_cpu,
    fake=lambda x, weight, bias, eps: _rows.fake_rows(x),
)
_bwd = register(
    "layer_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool need_dweight, bool need_dbias, str impl) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    launch=_bwd_launch,
    fake=_bwd_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, impl):
        run = _run_fwd if direct(x, residual, weight, bias) else _fwd
        y, s, mean, rstd = run(x, residual, weight, bias, eps, impl)
        ctx.eps, ctx.impl = eps, impl
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else s, weight, bias, mean, rstd)
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx, dy, ds=None):
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if dy is None:  # only s was used
            return ds if need_x else None, ds if need_residual else None, None, None, None, None
        args = (dy, ds, *ctx.saved_tensors, need_weight, need_bias, ctx.impl)
        if create_graph():
            dx, dweight, dbias = _LayerNormGrad.apply(ctx.eps, *args)
        else:
            dx, dweight, dbias = (_run_bwd if direct(*args[:7]) else _bwd)(*args)
        dx, dresidual = dx if need_x else None, dx if need_residual else None
        return dx, dresidual, dweight if need_weight else None, dbias if need_bias else None, None, None


class _LayerNormLean(_LayerNorm):
    """_LayerNorm for what lean() lets through."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, impl):
        y, mean, rstd = _empty_like(x), _rows.new_lean_statistic(x), _rows.new_lean_statistic(x)
        _cpu_fwd(x, None, weight, bias, eps, y, None, mean, rstd)
        ctx.eps, ctx.impl = eps, impl
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y


_lean_apply = direct_apply(_LayerNormLean)


class _LayerNormGrad(torch.autograd.Function):
    """The backward pass as a function that can be differentiated once more."""

    @staticmethod
    def forward(ctx, eps, dy, ds, s, weight, bias, mean, rstd, need_dweight, need_dbias, impl):
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, s, weight, bias)
        return _bwd(dy, ds, s, weight, bias, mean, rstd, need_dweight, need_dbias, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, ddx, ddweight, ddbias):
        dy, *inputs = ctx.saved_tensors

        def norm(s, weight, bias):
            return layer_norm_ref.layer_norm(s, weight, bias, None, ctx.eps)[0]

        grad_dy, grad_s, grad_weight, grad_bias = _rows.second_order(norm, dy, inputs, (ddx, ddweight, ddbias))
        grad_ds = ddx if ctx.needs_input_grad[2] else None
        return None, grad_dy, grad_ds, grad_s, grad_weight, grad_bias, None, None, None, None, None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimension (Ba, Kiros & Hinton 2016, "Layer Normalization").

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = x + residual and the biased variance of the centred row.
    Statistics and sums are float32.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 and other devices: the reference).
        weight, bias: (C), x's dtype or float32, each by itself; None is all ones and all zeros.
        residual: x's shape and dtype; added first.
        eps: added to the variance, not negative.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        y (..., C) in x's dtype; with a residual the pair (y, s), s being the next residual. Both are differentiable.

    Raises:
        ValueError: shapes, dtypes or eps break the rules above, or impl can't serve the call.
    """
    if residual is None and impl is None and (way := lean(x, weight, bias)):
        try:
            return _infer_lean(x, weight, bias, eps) if way == 1 else _lean_apply(x, None, weight, bias, eps, "cpu")
        except ValueError:  # refused by the kernel: the checks below say it in torch's terms
            pass
    x, residual, backend = _rows.norm_args(_OP, x, weight, bias, residual, eps, impl)
    if backend == "reference":
        y, s = layer_norm_ref.layer_norm(x, weight, bias, residual, eps)
    elif needs_grad(x, residual, weight, bias):
        out = _LayerNorm.apply(x, residual, weight, bias, eps, backend)
        y, s = (out, None) if residual is None else out
    elif residual is None and impl is None:
        y, s = (_infer_launch if direct(x, weight, bias) else _infer)(x, weight, bias, eps), None
    else:
        run = _run_fwd if direct(x, residual, weight, bias) else _fwd
        y, s, *_ = run(x, residual, weight, bias, eps, backend)
    return y if residual is None else (y, s)
