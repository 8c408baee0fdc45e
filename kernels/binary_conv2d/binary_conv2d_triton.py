"""The Triton kernels of binary_conv2d and their launchers; the equations are in binary_conv2d.h.

A program counts a tile of BM pixels by BN channels of y, BK words of its taps at a time. A tap outside of the image has no
valid bits, so that padding adds nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import triton_signs as signs


@triton.jit
def pack_planes_kernel(x, words, scale, C, HW, W, BP: tl.constexpr):
    """BP pixels of an image of contiguous planes, a word of channels at a time."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    b = tl.program_id(1).to(tl.int64)
    bit = tl.arange(0, 32)
    total = tl.zeros([BP], tl.float32)
    for w in range(0, W):
        c = w * 32 + bit % 8 * 4 + bit // 8
        inside = (p < HW)[:, None] & (c < C)[None, :]
        v = tl.load(x + (b * C + c[None, :]) * HW + p[:, None], mask=inside, other=0.0).to(tl.float32)
        word = tl.sum(tl.where((c < C)[None, :] & ~(v < 0), 1, 0) << bit[None, :], 1)
        tl.store(words + (b * HW + p) * W + w, word, mask=p < HW)
        total += tl.sum(tl.abs(v), 1)
    if scale is not None:
        tl.store(scale + b * HW + p, total / tl.maximum(C, 1), mask=p < HW)


@triton.jit
def product_kernel(
    words, codes, scales, pixel_scale, bias, y, B, O, C, H, W, Ho, Wo, kh, kw, sh, sw, dh, dw, ph, pw, cw, tail, y_image,
    y_channel, y_pixel, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y, or where that is int32 the words of its signs. cw: words of a pixel."""
    M = B * Ho * Wo
    rows = tl.cdiv(M, BM)
    m = tl.program_id(0) % rows * BM + tl.arange(0, BM)
    n = tl.program_id(0) // rows * BN + tl.arange(0, BN)
    b, top, left = m // Wo // Ho, m // Wo % Ho * sh - ph, m % Wo * sw - pw
    image = words + b.to(tl.int64) * H * W * cw
    all_words = kh * kw * cw
    counts = tl.zeros([BM, BN], tl.int32)
    bits = tl.zeros([BM], tl.int32)
    for first in range(0, all_words, BK):
        k = first + tl.arange(0, BK)
        tap, c = k // cw, k % cw
        h, w = top[:, None] + (tap // kw * dh)[None, :], left[:, None] + (tap % kw * dw)[None, :]
        there = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (m < M)[:, None] & (k < all_words)[None, :]
        a = tl.load(image[:, None] + (h.to(tl.int64) * W + w) * cw + c[None, :], mask=there, other=0)
        valid = tl.where(there, tl.where(c == cw - 1, tail, -1)[None, :], 0)
        counts += signs.count(a, signs.load_columns(codes, n, k, O, all_words), valid)
        bits += tl.sum(tl.where(there & (c == 0)[None, :], C, 0), 1)
    scale = None
    if pixel_scale is not None:
        scale = tl.load(pixel_scale + m, mask=m < M, other=0.0)
    v = signs.finish(bits[:, None] - 2 * counts, scales, scale, bias, n, O)
    if y.dtype.element_ty == tl.int32:
        signs.store_words(v, y, m, n, M, O, BM, BN)
    else:
        at = y + b.to(tl.int64) * y_image + m % (Ho * Wo) * y_pixel
        inside = (m < M)[:, None] & (n < O)[None, :]
        tl.store(at[:, None] + n.to(tl.int64)[None, :] * y_channel, v.to(y.dtype.element_ty), mask=inside)


def pack(x, words, scale) -> None:
    """As mlc_binary_conv2d_pack."""
    B, C, H, W = x.shape
    with torch.cuda.device_of(x):
        if x.is_contiguous():
            if B * H * W:
                grid = triton.cdiv(H * W, 64), B
                pack_planes_kernel[grid](x, words, scale, C, H * W, words.shape[3], BP=64)
        else:  # channels_last
            signs.pack_rows(
                x.permute(0, 2, 3, 1).view(-1, C), words.view(-1, words.shape[3]), None if scale is None else scale.view(-1)
            )


def fwd(
    words, codes, scales, pixel_scale, bias, O, C, kh, kw, sh, sw, dh, dw, ph, pw, y,
) -> None:  # fmt: skip
    """As mlc_binary_conv2d_fwd."""
    B, H, W, cw = words.shape
    if not y.numel():
        return
    Ho, Wo = y.shape[1:3] if y.dtype == torch.int32 else y.shape[2:]
    strides = (0, 0, 0) if y.dtype == torch.int32 else (O * Ho * Wo, Ho * Wo, 1) if y.is_contiguous() else (O * Ho * Wo, 1, O)
    how = signs.tile(B * Ho * Wo, 32)
    grid = (triton.cdiv(B * Ho * Wo, how["BM"]) * triton.cdiv(O, how["BN"]),)
    with torch.cuda.device_of(words):
        product_kernel[grid](
            words, signs.words_of(codes), scales, pixel_scale, bias, y, B, O, C, H, W, Ho, Wo, kh, kw, sh, sw, dh, dw, ph, pw,
            cw, signs.tail_of(C), *strides, **how, **signs.OPTIONS,
        )  # fmt: skip


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    return [
        signs.spec(product_kernel, "bf16", ("pixel_scale", "bias"), y_pixel=1, **signs.tile(5000, 32)),
        signs.spec(product_kernel, "fp32", y_channel=1, **signs.tile(9, 32)),
        signs.spec(product_kernel, "i32", ("bias",), y_image=0, y_channel=0, y_pixel=0, **signs.tile(5000, 32)),
        signs.spec(pack_planes_kernel, "bf16", ("scale",), BP=64),
        signs.spec(pack_planes_kernel, "fp32", BP=64),
        signs.spec(signs.pack_rows_kernel, "fp16", ("scale",), BW=8),
    ]
