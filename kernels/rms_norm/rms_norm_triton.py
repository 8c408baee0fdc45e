"""The Triton kernels of rms_norm and their launchers; the equations are in rms_norm.h.

Rows of up to MAX_BLOCK elements stay in registers and backward reads them once; longer rows are read again, piece by piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import compile_spec, load_g, load_sum, row_shape, stride_of, sum_partials, sum_partials_spec


@triton.jit
def store_scaled(y, weight, s, rstd, c, inside):
    """y[c] = s * rstd * weight[c]."""
    v = s * rstd
    if weight is not None:
        v *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + c, v, mask=inside)


@triton.jit
def fwd_kernel(
    x, residual, weight, y, s, rstd, cols, eps, x_stride, residual_stride, y_stride, s_stride,
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
        scale = 1.0 / tl.sqrt(tl.sum(v * v) / cols + eps)
        store_scaled(y, weight, v, scale, c, c < cols)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, cols, BLOCK):
            v = load_sum(x, residual, s, first + c, first + c < cols)
            total += v * v
        scale = 1.0 / tl.sqrt(tl.sum(total) / cols + eps)
        for first in range(0, cols, BLOCK):  # s again from x: another thread may have written it
            v = load_sum(x, residual, s, first + c, first + c < cols)
            store_scaled(y, weight, v, scale, first + c, first + c < cols)
    if rstd is not None:
        tl.store(rstd + r, scale)


@triton.jit
def store_dx(dx, ds, g, xhat, mean, rstd, c, inside):
    """dx[c] = rstd * (g - xhat * mean) + ds[c]."""
    v = (g - xhat * mean) * rstd
    if ds is not None:
        v += tl.load(ds + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + c, v, mask=inside)


@triton.jit
def bwd_kernel(
    dy, ds, s, weight, rstd, dx, partial, rows, cols, dy_stride, ds_stride, s_stride, dx_stride,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of rows a program: dx, and with ONE_BLOCK the block's sum of dy * xhat in partial (programs, cols)."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end = block * rows // blocks, (block + 1) * rows // blocks
    c = tl.arange(0, BLOCK)  # (BLOCK)
    dweight = tl.zeros([BLOCK], tl.float32)
    for r in range(begin, end):
        dy_row, s_row, dx_row = dy + r * dy_stride, s + r * s_stride, dx + r * dx_stride
        ds_row = ds
        if ds is not None:
            ds_row = ds + r * ds_stride
        scale = tl.load(rstd + r)
        if ONE_BLOCK:
            inside = c < cols
            d, g = load_g(dy_row, weight, c, inside)  # (BLOCK)
            xhat = tl.load(s_row + c, mask=inside, other=0.0).to(tl.float32) * scale  # (BLOCK)
            mean = tl.sum(g * xhat) / cols
            store_dx(dx_row, ds_row, g, xhat, mean, scale, c, inside)
            dweight += d * xhat
        else:
            total = tl.zeros([BLOCK], tl.float32)
            for first in range(0, cols, BLOCK):
                inside = first + c < cols
                d, g = load_g(dy_row, weight, first + c, inside)
                total += g * (tl.load(s_row + first + c, mask=inside, other=0.0).to(tl.float32) * scale)
            mean = tl.sum(total) / cols
            for first in range(0, cols, BLOCK):
                inside = first + c < cols
                d, g = load_g(dy_row, weight, first + c, inside)
                xhat = tl.load(s_row + first + c, mask=inside, other=0.0).to(tl.float32) * scale
                store_dx(dx_row, ds_row, g, xhat, mean, scale, first + c, inside)
    if ONE_BLOCK and partial is not None:
        tl.store(partial + block * cols + c, dweight, mask=c < cols)


@triton.jit
def dweight_kernel(dy, s, rstd, partial, rows, cols, dy_stride, s_stride, BLOCK: tl.constexpr):
    """partial[block, c] = the sum of dy * xhat over a block of rows, for a piece of long rows."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK)
    inside = c < cols
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(block * rows // blocks, (block + 1) * rows // blocks):
        d = tl.load(dy + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(s + r * s_stride + c, mask=inside, other=0.0).to(tl.float32)
        total += d * (v * tl.load(rstd + r))
    tl.store(partial + block * cols + c, total, mask=inside)


def fwd(x, residual, weight, eps, y, s, rstd) -> None:
    """As mlc_rms_norm_fwd."""
    rows, cols = x.shape
    if rows == 0:
        return
    block, warps = row_shape(cols)
    strides = stride_of(x), stride_of(residual), stride_of(y), stride_of(s)
    with torch.cuda.device_of(x):
        fwd_kernel[(rows,)](
            x, residual, weight, y, s, rstd, cols, eps, *strides, BLOCK=block, ONE_BLOCK=cols <= block, num_warps=warps
        )


def bwd(dy, ds, s, weight, rstd, dx, dweight, partial) -> None:
    """As mlc_rms_norm_bwd; partial may have any number of row blocks."""
    rows, cols = s.shape
    with torch.cuda.device_of(s):
        if rows > 0:
            block, warps = row_shape(cols)
            one_block = cols <= block
            fused = dweight is not None and one_block
            programs = partial.shape[0] if fused else rows
            strides = stride_of(dy), stride_of(ds), stride_of(s), stride_of(dx)
            bwd_kernel[(programs,)](
                dy, ds, s, weight, rstd, dx, partial if fused else None, rows, cols, *strides,
                BLOCK=block, ONE_BLOCK=one_block, num_warps=warps,
            )  # fmt: skip
            if dweight is not None and not fused:
                grid = (partial.shape[0], triton.cdiv(cols, 512))
                dweight_kernel[grid](dy, s, rstd, partial, rows, cols, stride_of(dy), stride_of(s), BLOCK=512)
        if dweight is not None:
            sum_partials(partial, dweight)


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    specs = [compile_spec(dweight_kernel, "bf16", 512), sum_partials_spec("bf16")]
    for dtype, cols in (("fp32", 4096), ("bf16", 4096), ("bf16", 10000)):
        one_block = cols <= row_shape(cols)[0]
        specs.append(compile_spec(fwd_kernel, dtype, cols, ONE_BLOCK=one_block))
        specs.append(compile_spec(bwd_kernel, dtype, cols, ONE_BLOCK=one_block, **{"ds" if one_block else "partial": None}))
    return specs
