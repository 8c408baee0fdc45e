"""The Triton kernels of layer_norm and their launchers; the equations are in layer_norm.h.

Rows of up to MAX_BLOCK elements stay in registers and backward reads them once; longer rows are read again, piece by piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import compile_spec, load_g, load_sum, row_shape, stride_of, sum_partials, sum_partials_spec


@triton.jit
def store_affine(y, weight, bias, xhat, c, inside):
    """y[c] = xhat * weight[c] + bias[c]."""
    v = xhat
    if weight is not None:
        v *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + c, v, mask=inside)


@triton.jit
def statistics(first, rest, squares, cols, eps):
    """(mean, rstd) from a first mean and the sums over the row centred by it, as in layer_norm_cpu.inl."""
    left = rest / cols
    return first + left, 1.0 / tl.sqrt(tl.maximum(squares / cols - left * left, 0.0) + eps)


@triton.jit
def fwd_kernel(
    x, residual, weight, bias, y, s, mean, rstd, cols, eps, x_stride, residual_stride, y_stride, s_stride,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    r = tl.program_id(0).to(tl.int64)
    x += r * x_stride
    y += r * y_stride
    if residual is not None:
        residual += r * residual_stride
        s += r * s_stride
    c = tl.arange(0, BLOCK)  # (BLOCK)
    if ONE_BLOCK:
        v = load_sum(x, residual, s, c, c < cols)  # (BLOCK)
        first_mean = tl.sum(v) / cols
        d = tl.where(c < cols, v - first_mean, 0.0)
        centre, scale = statistics(first_mean, tl.sum(d), tl.sum(d * d), cols, eps)
        store_affine(y, weight, bias, (v - centre) * scale, c, c < cols)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, cols, BLOCK):
            total += load_sum(x, residual, s, first + c, first + c < cols)
        first_mean = tl.sum(total) / cols
        rest = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, cols, BLOCK):  # s again from x: another thread may have written it
            v = load_sum(x, residual, s, first + c, first + c < cols)
            d = tl.where(first + c < cols, v - first_mean, 0.0)
            rest += d
            squares += d * d
        centre, scale = statistics(first_mean, tl.sum(rest), tl.sum(squares), cols, eps)
        for first in range(0, cols, BLOCK):
            v = load_sum(x, residual, s, first + c, first + c < cols)
            store_affine(y, weight, bias, (v - centre) * scale, first + c, first + c < cols)
    if mean is not None:
        tl.store(mean + r, centre)
    if rstd is not None:
        tl.store(rstd + r, scale)


@triton.jit
def load_xhat(s, centre, scale, c, inside):
    """(s[c] - mean) * rstd, 0 outside."""
    v = (tl.load(s + c, mask=inside, other=0.0).to(tl.float32) - centre) * scale
    return tl.where(inside, v, 0.0)


@triton.jit
def store_dx(dx, ds, g, xhat, mean_g, mean_gx, rstd, c, inside):
    """dx[c] = rstd * (g - mean_g - xhat * mean_gx) + ds[c]."""
    v = (g - mean_g - xhat * mean_gx) * rstd
    if ds is not None:
        v += tl.load(ds + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + c, v, mask=inside)


@triton.jit
def bwd_kernel(
    dy, ds, s, weight, mean, rstd, dx, weight_partial, bias_partial, rows, cols, dy_stride, ds_stride, s_stride, dx_stride,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of rows a program: dx, and with ONE_BLOCK the block's sums in the partials (programs, cols)."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.arange(0, BLOCK)  # (BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for r in range(block * rows // blocks, (block + 1) * rows // blocks):
        dy_row, s_row, dx_row = dy + r * dy_stride, s + r * s_stride, dx + r * dx_stride
        ds_row = ds
        if ds is not None:
            ds_row = ds + r * ds_stride
        centre, scale = tl.load(mean + r), tl.load(rstd + r)
        if ONE_BLOCK:
            inside = c < cols
            d, g = load_g(dy_row, weight, c, inside)  # (BLOCK)
            xhat = load_xhat(s_row, centre, scale, c, inside)  # (BLOCK)
            mean_g, mean_gx = tl.sum(g) / cols, tl.sum(g * xhat) / cols
            store_dx(dx_row, ds_row, g, xhat, mean_g, mean_gx, scale, c, inside)
            dweight += d * xhat
            dbias += d
        else:
            total_g = tl.zeros([BLOCK], tl.float32)
            total_gx = tl.zeros([BLOCK], tl.float32)
            for first in range(0, cols, BLOCK):
                inside = first + c < cols
                d, g = load_g(dy_row, weight, first + c, inside)
                total_g += g
                total_gx += g * load_xhat(s_row, centre, scale, first + c, inside)
            mean_g, mean_gx = tl.sum(total_g) / cols, tl.sum(total_gx) / cols
            for first in range(0, cols, BLOCK):
                inside = first + c < cols
                d, g = load_g(dy_row, weight, first + c, inside)
                xhat = load_xhat(s_row, centre, scale, first + c, inside)
                store_dx(dx_row, ds_row, g, xhat, mean_g, mean_gx, scale, first + c, inside)
    if ONE_BLOCK:
        if weight_partial is not None:
            tl.store(weight_partial + block * cols + c, dweight, mask=c < cols)
        if bias_partial is not None:
            tl.store(bias_partial + block * cols + c, dbias, mask=c < cols)


@triton.jit
def column_sums_kernel(dy, s, mean, rstd, weight_partial, bias_partial, rows, cols, dy_stride, s_stride, BLOCK: tl.constexpr):
    """The sums over a block of rows, for a piece of long rows."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK)
    inside = c < cols
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for r in range(block * rows // blocks, (block + 1) * rows // blocks):
        d = tl.load(dy + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        dweight += d * load_xhat(s + r * s_stride, tl.load(mean + r), tl.load(rstd + r), c, inside)
        dbias += d
    if weight_partial is not None:
        tl.store(weight_partial + block * cols + c, dweight, mask=inside)
    if bias_partial is not None:
        tl.store(bias_partial + block * cols + c, dbias, mask=inside)


def fwd(x, residual, weight, bias, eps, y, s, mean, rstd) -> None:
    """As mlc_layer_norm_fwd."""
    rows, cols = x.shape
    if rows == 0:
        return
    block, warps = row_shape(cols)
    strides = stride_of(x), stride_of(residual), stride_of(y), stride_of(s)
    with torch.cuda.device_of(x):
        fwd_kernel[(rows,)](
            x, residual, weight, bias, y, s, mean, rstd, cols, eps, *strides,
            BLOCK=block, ONE_BLOCK=cols <= block, num_warps=warps,
        )  # fmt: skip


def bwd(dy, ds, s, weight, mean, rstd, dx, dweight, dbias, partial) -> None:
    """As mlc_layer_norm_bwd; partial may have any number of row blocks."""
    rows, cols = s.shape
    sums = dweight is not None or dbias is not None
    weight_partial = None if dweight is None else partial[0]
    bias_partial = None if dbias is None else partial[1]
    with torch.cuda.device_of(s):
        if rows > 0:
            block, warps = row_shape(cols)
            fused = sums and cols <= block
            grid = (partial.shape[1] if fused else rows,)
            strides = stride_of(dy), stride_of(ds), stride_of(s), stride_of(dx)
            bwd_kernel[grid](
                dy, ds, s, weight, mean, rstd, dx, weight_partial if fused else None, bias_partial if fused else None,
                rows, cols, *strides, BLOCK=block, ONE_BLOCK=cols <= block, num_warps=warps,
            )  # fmt: skip
            if sums and not fused:
                grid = (partial.shape[1], triton.cdiv(cols, 512))
                strides = stride_of(dy), stride_of(s)
                column_sums_kernel[grid](dy, s, mean, rstd, weight_partial, bias_partial, rows, cols, *strides, BLOCK=512)
        for part, out in ((weight_partial, dweight), (bias_partial, dbias)):
            if out is not None:
                sum_partials(part, out)


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    specs = [compile_spec(column_sums_kernel, "bf16", 512), sum_partials_spec("bf16")]
    for dtype, cols in (("fp32", 4096), ("bf16", 4096), ("bf16", 10000)):
        one_block = cols <= row_shape(cols)[0]
        absent = {"ds": None} if one_block else {"weight_partial": None, "bias_partial": None}
        specs.append(compile_spec(fwd_kernel, dtype, cols, ONE_BLOCK=one_block))
        specs.append(compile_spec(bwd_kernel, dtype, cols, ONE_BLOCK=one_block, **absent))
    return specs
