"""The Triton kernels of depthwise_conv and their launchers; the equations are in depthwise_conv.h.

A program owns BC channels by BP pixels and gathers over the taps through the cache. Forward and backward-data are one kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import sum_partials, sum_partials_spec


@triton.jit
def source(i, k, size, stride, dilation, pad, TRANSPOSED: tl.constexpr):
    """(the element that tap k of the results at i meets along an axis, whether there is one)."""
    if TRANSPOSED:
        s = i + pad - k * dilation
        there = (s >= 0) & (s % stride == 0)
        s = s // stride
    else:
        s = i * stride + k * dilation - pad
        there = s >= 0
    return s, there & (s < size)


@triton.jit
def gather_kernel(
    x, weight, bias, y, N, C, M, KD, KH, KW, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
    pad_d, pad_h, pad_w, D, H, W, xn, xc, xd, xh, xw, Do, Ho, Wo, yn, yc, yd, yh, yw,
    TRANSPOSED: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y (N, C, Do, Ho, Wo) from x (D, H, W). TRANSPOSED: y is dx, x is dy, whose channels are the M filters of each of C."""
    groups, pieces = tl.cdiv(C, BC), tl.cdiv(Wo, BP)
    program = tl.program_id(0).to(tl.int64)
    c = program % groups * BC + tl.arange(0, BC)[:, None]
    w = program // groups % pieces * BP + tl.arange(0, BP)[None, :]
    line = program // groups // pieces
    h, d, n = line % Ho, line // Ho % Do, line // Ho // Do
    inside = (c < C) & (w < Wo)
    total = tl.zeros([BC, BP], tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=c < C, other=0.0)
    taps = KD * KH * KW
    for m in range(M if TRANSPOSED else 1):
        filters = c * M + m if TRANSPOSED else c
        channel = filters if TRANSPOSED else c // M
        for kd in range(KD):
            sd, there_d = source(d + w * 0, kd, D, stride_d, dilation_d, pad_d, TRANSPOSED)
            for kh in range(KH):
                sh, there_h = source(h + w * 0, kh, H, stride_h, dilation_h, pad_h, TRANSPOSED)
                for kw in range(KW):
                    sw, there_w = source(w, kw, W, stride_w, dilation_w, pad_w, TRANSPOSED)
                    there = inside & there_d & there_h & there_w
                    at = x + n * xn + channel * xc + sd * xd + sh * xh + sw * xw
                    value = tl.load(at, mask=there, other=0.0).to(tl.float32)
                    tap = tl.load(weight + filters * taps + ((kd * KH + kh) * KW + kw), mask=c < C, other=0.0)
                    total += tl.where(there, tap * value, 0.0)
    tl.store(y + n * yn + c * yc + d * yd + h * yh + w * yw, total, mask=inside)


@triton.jit
def dweight_kernel(
    x, dy, partial, N, C, M, KD, KH, KW, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w,
    pad_d, pad_h, pad_w, D, H, W, xn, xc, xd, xh, xw, Do, Ho, Wo, yn, yc, yd, yh, yw,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """partial[part, tap, co] for tap program_id(2), of C filters; the tap behind the last one sums dy for the bias."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)[:, None]
    part, parts, tap = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(2)
    taps = KD * KH * KW
    kd, kh, kw = tap // KW // KH, tap // KW % KH, tap % KW
    pixels = N * Do * Ho * Wo
    begin, end = part * pixels // parts, (part + 1) * pixels // parts
    total = tl.zeros([BC, BP], tl.float32)
    for first in range(begin, end, BP):
        i = first + tl.arange(0, BP)[None, :]
        inside = (c < C) & (i < end)
        w, h, d, n = i % Wo, i // Wo % Ho, i // Wo // Ho % Do, i // Wo // Ho // Do
        g = tl.load(dy + n * yn + c * yc + d * yd + h * yh + w * yw, mask=inside, other=0.0).to(tl.float32)
        if tap < taps:
            sd, there_d = source(d, kd, D, stride_d, dilation_d, pad_d, False)
            sh, there_h = source(h, kh, H, stride_h, dilation_h, pad_h, False)
            sw, there_w = source(w, kw, W, stride_w, dilation_w, pad_w, False)
            there = inside & there_d & there_h & there_w
            value = tl.load(x + n * xn + c // M * xc + sd * xd + sh * xh + sw * xw, mask=there, other=0.0).to(tl.float32)
            g = tl.where(there, g * value, 0.0)
        total += g
    at = partial + (part * (taps + 1) + tap) * C + c
    tl.store(at, tl.sum(total, 1)[:, None], mask=c < C)


def _blocks(x: torch.Tensor) -> dict[str, int]:
    """The tile: along W where that is contiguous, along C where that is."""
    last = x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[4] <= 1 or x.stride(4) != 1)
    return {"BC": 64, "BP": 8} if last else {"BC": 4, "BP": 64}


def _gather(x, weight, bias, y, M, numbers, transposed: bool) -> None:
    """y from x, or with transposed dx (y) from dy (x)."""
    blocks, (N, C) = _blocks(y), y.shape[:2]
    grid = (N * y.shape[2] * y.shape[3] * triton.cdiv(y.shape[4], blocks["BP"]) * triton.cdiv(C, blocks["BC"]),)
    shapes = *x.shape[2:], *x.stride(), *y.shape[2:], *y.stride()
    if y.numel():
        gather_kernel[grid](x, weight, bias, y, N, C, M, *weight.shape[1:], *numbers, *shapes, TRANSPOSED=transposed, **blocks)


def fwd(
    x, weight, bias, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, pad_d, pad_h, pad_w, y
) -> None:  # fmt: skip
    """As mlc_depthwise_conv_fwd."""
    numbers = stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, pad_d, pad_h, pad_w
    with torch.cuda.device_of(x):
        _gather(x, weight, bias, y, y.shape[1] // max(x.shape[1], 1), numbers, False)


def bwd(
    dy, x, weight, stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, pad_d, pad_h, pad_w, dx, dweight, dbias,
    partial,
) -> None:  # fmt: skip
    """As mlc_depthwise_conv_bwd; partial may have any number of blocks of pixels."""
    numbers = stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w, pad_d, pad_h, pad_w
    M = weight.shape[0] // max(x.shape[1], 1)
    with torch.cuda.device_of(x):
        if dx is not None:
            _gather(dy, weight, None, dx, M, numbers, True)
        if dweight is not None and weight.shape[0]:
            blocks, (C, *kernel) = _blocks(x), weight.shape
            taps = partial.shape[1] - 1
            grid = triton.cdiv(C, blocks["BC"]), partial.shape[0], taps + 1
            shapes = *x.shape[2:], *x.stride(), *dy.shape[2:], *dy.stride()
            dweight_kernel[grid](x, dy, partial, x.shape[0], C, M, *kernel, *numbers, *shapes, **blocks)
            total = partial.new_empty(taps + 1, C)
            sum_partials(partial.flatten(1), total.view(-1))
            dweight.view(C, taps).copy_(total[:taps].t())
            dbias.copy_(total[taps])


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""

    def spec(kernel, dtype, **constexprs):
        def type_of(name):
            if name in constexprs:
                return "constexpr"
            return f"*{dtype}" if name in ("x", "y", "dy") else "*fp32" if name in ("weight", "bias", "partial") else "i32"

        return kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs, {"num_warps": 4}

    planar, last = {"BC": 4, "BP": 64}, {"BC": 64, "BP": 8}
    return [
        spec(gather_kernel, "bf16", TRANSPOSED=False, xw=1, yw=1, **planar),
        spec(gather_kernel, "fp32", TRANSPOSED=True, bias=None, xc=1, yc=1, **last),
        spec(dweight_kernel, "bf16", xw=1, yw=1, **planar),
        spec(dweight_kernel, "fp32", xc=1, yc=1, **last),
        sum_partials_spec("fp32"),
    ]
