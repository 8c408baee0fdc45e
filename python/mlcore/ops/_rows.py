"""What the row-wise norms share: argument checks, (rows, columns) views, outputs, and second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .._backend import choose
from .._registry import autocasting, reference_if_transformed

_MAX_ROW_BLOCKS = 64  # as csrc/core/row_blocks.h


def norm_args(op, x, weight, bias, residual, eps, impl) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """(x, residual, backend) of a norm's call, or one clear error for arguments that break its contract.

    Under torch.autocast x and residual are promoted as x + residual would be; weight and bias are taken as they are.
    """
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape:
        raise ValueError(f"{op}: x must have at least one dimension; got shape ()")
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: x must be a floating-point tensor; got {dtype}")
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"{op}: residual must have x's shape {tuple(shape)}; got {tuple(residual.shape)}")
        if residual.dtype != dtype and autocasting(device.type):
            dtype = torch.promote_types(dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        if residual.dtype != dtype or residual.device != device:
            raise ValueError(f"{op}: residual must be {dtype} on {device} as x; got {residual.dtype} on {residual.device}")
    if weight is not None:
        _check_vector(op, "weight", weight, shape[-1], dtype, device)
    if bias is not None:
        _check_vector(op, "bias", bias, shape[-1], dtype, device)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative; got {eps}")
    return x, residual, choose(op, reference_if_transformed(op, impl), x)


def _check_vector(op, name, t, cols, dtype, device) -> None:
    if t.shape != (cols,):
        raise ValueError(f"{op}: {name} must have shape ({cols},), x's last dimension; got {tuple(t.shape)}")
    if t.dtype != dtype and t.dtype != torch.float32:
        raise ValueError(f"{op}: {name} must be {dtype} as x, or torch.float32; got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on {device} as x; got {t.device}")


def rows_of(t: torch.Tensor | None) -> torch.Tensor | None:
    """t as (R, C) with contiguous rows; a copy only where the strides force one. None stays None."""
    if t is None:
        return None
    if t.dim() != 2:
        if t.is_contiguous() and t.shape[-1]:
            return t.view(-1, t.shape[-1])
        t = t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)  # (R, C)
    return t if t.stride(1) == 1 else t.contiguous()


def new_rows(rows: torch.Tensor) -> torch.Tensor:
    """An output for rows: (R, C), contiguous."""
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def new_statistic(rows: torch.Tensor) -> torch.Tensor:
    """An output with one float32 number a row: (R)."""
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


def new_lean_statistic(x: torch.Tensor) -> torch.Tensor:
    """new_statistic() for contiguous x of any rank: (R). Naming a dtype that x has costs 0.4 us."""
    rows = x.shape[:-1].numel()
    return x.new_empty(rows) if x.dtype is torch.float32 else x.new_empty(rows, dtype=torch.float32)


def shaped(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Contiguous rows in the shape that they were made from."""
    return rows if like.dim() == 2 else rows.view(like.shape)


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    """A weight or bias as the kernels take it."""
    return None if vector is None else vector.contiguous()


def new_partials(rows: torch.Tensor, *count: int) -> torch.Tensor:
    """Scratch for deterministic sums over rows: (*count, P, C) float32, one partial row a row block."""
    return rows.new_empty(*count, min(rows.shape[0], _MAX_ROW_BLOCKS), rows.shape[1], dtype=torch.float32)


def fake_rows(x: torch.Tensor) -> torch.Tensor:
    """The fake of a (..., C) output of x's shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fake_statistic(x: torch.Tensor) -> torch.Tensor:
    """The fake of a float32 output with one number a row."""
    return x.new_empty(functools.reduce(lambda a, b: a * b, x.shape[:-1], 1), dtype=torch.float32)


def second_order(norm: Callable, dy, inputs, cotangents) -> tuple[torch.Tensor | None, ...]:
    """Gradients, with respect to dy and each input, of the sum of <cotangent, gradient of norm(*inputs) for that input>.

    What autograd asks of a norm's backward pass after create_graph=True (gradient penalties). No backend has a kernel for
    it: norm is the reference, the first-order gradients stay the kernel's.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (dy, *inputs)]
        given = [t for t in leaves[1:] if t is not None]
        grads = iter(torch.autograd.grad(norm(*leaves[1:]), given, leaves[0], create_graph=True))
        grads = [None if t is None else next(grads) for t in leaves[1:]]
    pairs = [(g, c) for g, c in zip(grads, cotangents) if g is not None and c is not None]
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([g for g, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True))
    return tuple(None if t is None else next(found) for t in leaves)
