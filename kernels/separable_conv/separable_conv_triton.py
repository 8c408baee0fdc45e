"""The Triton kernels of separable_conv and their launchers; the equations are in separable_conv.h.

The product's program makes BK channels of h for its pixels and multiplies them at once, for all channels; h is never written.
Moments are sums about the first pixel of each tile of pixels, put together in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

APPLY, MOMENTS, SUMS, NORM, GRADIENT = (tl.constexpr(i) for i in range(5))  # what hidden_kernel does with h


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, F: tl.constexpr):
    if F == 3:
        x = x * sigmoid(x)
    elif F != 0:
        x = tl.where(x < 0.0, 0.0, x)
        if F == 2:
            x = tl.where(x > 6.0, 6.0, x)
    return x


@triton.jit
def through(d, x, F: tl.constexpr):
    """d * f'(x); at the corners of relu and relu6 the derivative is 0, as torch has it."""
    if F == 3:
        s = sigmoid(x)
        d = d * (s * (1.0 + x * (1.0 - s)))
    elif F == 2:
        d = tl.where((x > 0.0) & (x < 6.0), d, 0.0)
    elif F == 1:
        d = tl.where(x > 0.0, d, 0.0)
    return d


@triton.jit
def place(m, Ho, Wo):
    """Image, row and column of pixels m, in int64."""
    return (m // Wo // Ho).to(tl.int64), (m // Wo % Ho).to(tl.int64), (m % Wo).to(tl.int64)


@triton.jit
def make_hidden(
    x, depthwise, n, oh, ow, there, c, C, Cx, H, W, xn, xc, xh, xw, KH, KW, stride_h, stride_w, dilation_h, dilation_w,
    pad_h, pad_w, PATCHES: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """h (BP, BC) in float32 for the pixels (n, oh, ow) that are `there`. An element outside of x has no product."""
    image, top, left = x + n * xn, oh * stride_h - pad_h, ow * stride_w - pad_w
    h = tl.zeros([BP, BC], tl.float32)
    if PATCHES:
        tap = c // Cx
        y, z = top[:, None] + (tap // KW * dilation_h)[None, :], left[:, None] + (tap % KW * dilation_w)[None, :]
        inside = there[:, None] & (c < C)[None, :] & (y >= 0) & (y < H) & (z >= 0) & (z < W)
        at = image[:, None] + y * xh + z * xw + (c % Cx)[None, :] * xc
        h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        for kh in range(KH):
            y = top + kh * dilation_h
            for kw in range(KW):
                z = left + kw * dilation_w
                seen = there & (y >= 0) & (y < H) & (z >= 0) & (z < W)
                at = (image + y * xh + z * xw)[:, None] + c[None, :]
                value = tl.load(at, mask=seen[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
                if depthwise is not None:
                    weight = tl.load(depthwise + c * (KH * KW) + kh * KW + kw, mask=c < C, other=0.0)
                    value = tl.where(seen[:, None], value * weight[None, :], 0.0)
                h += value
    return h


@triton.jit
def affine(h, scale, shift, c, C):
    if scale is not None:
        h = h * tl.load(scale + c, mask=c < C, other=0.0)[None, :]
    if shift is not None:
        h = h + tl.load(shift + c, mask=c < C, other=0.0)[None, :]
    return h


@triton.jit
def store_moments(v, there, partial, tile, c, C):
    """partial (tiles, 3, C) of this tile: sums of v - v0 and (v - v0)^2, and v0, the first pixel."""
    first = tl.arange(0, v.shape[0])[:, None] == 0
    origin = tl.sum(tl.where(first, v, 0.0), 0)
    off = tl.where(there[:, None], v - origin[None, :], 0.0)
    at = partial + tile.to(tl.int64) * 3 * C + c
    tl.store(at, tl.sum(off, 0), mask=c < C)
    tl.store(at + C, tl.sum(off * off, 0), mask=c < C)
    tl.store(at + 2 * C, origin, mask=c < C)


@triton.jit
def product_kernel(
    x, depthwise, scale, shift, pointwise, bias, residual, y, partial, pixels, C, Cx, J, H, W, Ho, Wo, xn, xc, xh, xw, yn, yh,
    yw, rn, rh, rw, KH, KW, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w,
    F: tl.constexpr, G: tl.constexpr, PATCHES: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr = "tf32x3",
):  # fmt: skip
    """BP pixels by BN columns of y. BN and BK divide 64, the blocks of the pointwise weights."""
    tile = tl.program_id(0)
    m = tile * BP + tl.arange(0, BP)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    there = m < pixels
    n, oh, ow = place(m, Ho, Wo)
    acc = tl.zeros([BP, BN], tl.float32)
    for c0 in range(0, C, BK):
        c = c0 + tl.arange(0, BK)
        h = make_hidden(
            x, depthwise, n, oh, ow, there, c, C, Cx, H, W, xn, xc, xh, xw, KH, KW, stride_h, stride_w, dilation_h, dilation_w,
            pad_h, pad_w, PATCHES, BP, BK,
        )  # fmt: skip
        a = tl.where((c < C)[None, :], activate(affine(h, scale, shift, c, C), F), 0.0)
        block = (j // 64).to(tl.int64) * tl.cdiv(C, 64) + c0 // 64
        w = tl.load(pointwise + block[None, :] * 4096 + (c % 64 * 64)[:, None] + (j % 64)[None, :], mask=(j < J)[None, :])
        w = tl.where((j < J)[None, :], w, 0.0)
        acc = tl.dot(a.to(x.dtype.element_ty), w.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    if partial is not None:
        store_moments(acc, there, partial, tile, j, J)
    if bias is not None:
        acc += tl.load(bias + j, mask=j < J, other=0.0)[None, :]
    acc = activate(acc, G)
    inside = there[:, None] & (j < J)[None, :]
    if residual is not None:
        at = (residual + n * rn + oh * rh + ow * rw)[:, None] + j[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store((y + n * yn + oh * yh + ow * yw)[:, None] + j[None, :], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def hidden_kernel(
    x, depthwise, scale, shift, other, mean, sums, a, partial, pixels, C, H, W, Ho, Wo, xn, xc, xh, xw, gn, gh, gw, an, ah, aw,
    KH, KW, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w,
    PASS: tl.constexpr, F: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A pass over h of BP pixels and BC channels. other: the residual, or da; a: a, or d."""
    tile = tl.program_id(0)
    m = tile * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = m < pixels
    n, oh, ow = place(m, Ho, Wo)
    h = make_hidden(
        x, depthwise, n, oh, ow, there, c, C, C, H, W, xn, xc, xh, xw, KH, KW, stride_h, stride_w, dilation_h, dilation_w,
        pad_h, pad_w, False, BP, BC,
    )  # fmt: skip
    if PASS == MOMENTS:
        store_moments(h, there, partial, tile, c, C)
    else:
        inside = there[:, None] & (c < C)[None, :]
        v = affine(h, scale, shift, c, C)
        given = tl.zeros([BP, BC], tl.float32)
        if other is not None:
            at = (other + n * gn + oh * gh + ow * gw)[:, None] + c[None, :]
            given = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if PASS == APPLY:
            out = activate(v, F) + given
        else:
            e = through(given, v, F)
            factor = tl.full([BC], 1.0, tl.float32)
            if scale is not None:
                factor = tl.load(scale + c, mask=c < C, other=0.0)
            out = factor[None, :] * e
            if PASS == NORM:
                by_h = tl.load(sums + 2 * C + c, mask=c < C, other=0.0)
                constant = tl.load(sums + 3 * C + c, mask=c < C, other=0.0)
                out += by_h[None, :] * h + constant[None, :]
            else:
                e, about = tl.where(there[:, None], e, 0.0), h
                if mean is not None:
                    about = h - tl.load(mean + c, mask=c < C, other=0.0)[None, :]
                at = partial + tile.to(tl.int64) * 3 * C + c
                tl.store(at, tl.sum(e, 0), mask=c < C)
                tl.store(at + C, tl.sum(tl.where(there[:, None], e * about, 0.0), 0), mask=c < C)
        if PASS != SUMS:
            tl.store((a + n * an + oh * ah + ow * aw)[:, None] + c[None, :], out.to(a.dtype.element_ty), mask=inside)


@triton.jit
def moments_kernel(partial, moments, pixels, tiles, C, BP: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr):
    """Mean and biased variance (2, C) from the tiles' sums."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([ROWS, BC], tl.float64)
    for begin in range(0, tiles, ROWS):
        b = begin + tl.arange(0, ROWS)
        at = partial + b.to(tl.int64)[:, None] * 3 * C + c[None, :]
        inside, size = (b < tiles)[:, None] & (c < C)[None, :], tl.minimum(pixels - b * BP, BP).to(tl.float64)[:, None]
        origin = tl.load(at + 2 * C, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, origin * size, 0.0) + tl.load(at, mask=inside, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / pixels
    total = tl.zeros([ROWS, BC], tl.float64)
    for begin in range(0, tiles, ROWS):
        b = begin + tl.arange(0, ROWS)
        at = partial + b.to(tl.int64)[:, None] * 3 * C + c[None, :]
        inside, size = (b < tiles)[:, None] & (c < C)[None, :], tl.minimum(pixels - b * BP, BP).to(tl.float64)[:, None]
        off = tl.load(at + 2 * C, mask=inside, other=0.0).to(tl.float64) - mean[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        square = tl.load(at + C, mask=inside, other=0.0).to(tl.float64) + off * (2.0 * first + off * size)
        total += tl.where(inside, square, 0.0)
    variance = tl.sum(total, 0) / pixels
    tl.store(moments + c, mean.to(tl.float32), mask=c < C)
    tl.store(moments + C + c, tl.where(variance < 0.0, 0.0, variance).to(tl.float32), mask=c < C)


@triton.jit
def sums_kernel(partial, scale, moments, sums, pixels, tiles, C, BC: tl.constexpr, ROWS: tl.constexpr):
    """sums (4, C) of mlc_separable_conv_bwd from the tiles' sums of e and e (h - mean)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    shifts, scales = tl.zeros([ROWS, BC], tl.float64), tl.zeros([ROWS, BC], tl.float64)
    for begin in range(0, tiles, ROWS):
        b = begin + tl.arange(0, ROWS)
        at = partial + b.to(tl.int64)[:, None] * 3 * C + c[None, :]
        inside = (b < tiles)[:, None] & (c < C)[None, :]
        shifts += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        scales += tl.load(at + C, mask=inside, other=0.0).to(tl.float64)
    by_shift, scaled = tl.sum(shifts, 0), tl.sum(scales, 0)
    factor = tl.full([BC], 1.0, tl.float64) / pixels
    if scale is not None:
        factor *= tl.load(scale + c, mask=c < C, other=0.0).to(tl.float64)
    by_h, mean = -factor * scaled, tl.zeros([BC], tl.float64)
    if moments is not None:
        mean = tl.load(moments + c, mask=c < C, other=0.0).to(tl.float64)
        rstd = tl.load(moments + C + c, mask=c < C, other=0.0).to(tl.float64)
        by_h *= rstd * rstd
        scaled *= rstd
    tl.store(sums + c, scaled.to(tl.float32), mask=c < C)
    tl.store(sums + C + c, by_shift.to(tl.float32), mask=c < C)
    tl.store(sums + 2 * C + c, by_h.to(tl.float32), mask=c < C)
    tl.store(sums + 3 * C + c, (-factor * by_shift - by_h * mean).to(tl.float32), mask=c < C)


#: Pixels, columns of y and channels of h of a product's program; pixels and channels of a pass over h. Not measured.
PRODUCT = {"BP": 64, "BN": 64, "BK": 32}
HIDDEN = {"BP": 32, "BC": 64}
SUMS_OF = {"BC": 32, "ROWS": 16}


def _pixel_strides(t) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(2), t.stride(3))


def _x_strides(x) -> tuple[int, int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def _tiles(pixels: int, how: dict, t: torch.Tensor, channels: int) -> tuple[int, torch.Tensor]:
    """How many tiles of pixels there are, and memory for their sums."""
    count = triton.cdiv(pixels, how["BP"])
    return count, t.new_empty(count, 3, channels)


def _moments(partial, moments, pixels: int, how: dict) -> None:
    tiles, _, C = partial.shape
    moments_kernel[(triton.cdiv(C, SUMS_OF["BC"]),)](partial, moments, pixels, tiles, C, BP=how["BP"], **SUMS_OF)


def fwd(
    x, depthwise, scale, shift, pointwise, bias, residual, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w, patch_h,
    patch_w, f, g, y, partial, moments,
) -> None:  # fmt: skip
    """As mlc_separable_conv_fwd; partial tells alone that moments are wanted, sums of tiles have memory of their own."""
    (N, Cx, H, W), (_, J, Ho, Wo) = x.shape, y.shape
    KH, KW = (patch_h, patch_w) if patch_h else (1, 1) if depthwise is None else depthwise.shape[1:]
    C, pixels = Cx * (KH * KW if patch_h else 1), N * Ho * Wo
    if not y.numel():
        return
    tiles, sums = _tiles(pixels, PRODUCT, pointwise, J if partial is not None else 0)
    with torch.cuda.device_of(x):
        product_kernel[tiles, triton.cdiv(J, PRODUCT["BN"])](
            x, depthwise, scale, shift, pointwise, bias, residual, y, None if partial is None else sums, pixels, C, Cx, J, H, W,
            Ho, Wo, *_x_strides(x), *_pixel_strides(y), *_pixel_strides(residual), KH, KW, stride_h, stride_w, dilation_h,
            dilation_w, pad_h, pad_w, F=f, G=g, PATCHES=patch_h > 0, **PRODUCT,
        )  # fmt: skip
        if moments is not None:
            _moments(sums, moments, pixels, PRODUCT)


def _hidden(PASS, x, depthwise, scale, shift, other, mean, sums, numbers, f, size, a, partial) -> None:
    (N, C, H, W), (Ho, Wo) = x.shape, size
    pixels, kernel_size = N * Ho * Wo, (1, 1) if depthwise is None else depthwise.shape[1:]
    grid = triton.cdiv(pixels, HIDDEN["BP"]), triton.cdiv(C, HIDDEN["BC"])
    if pixels and C:
        hidden_kernel[grid](
            x, depthwise, scale, shift, other, mean, sums, a, partial, pixels, C, H, W, Ho, Wo, *_x_strides(x),
            *_pixel_strides(other), *_pixel_strides(a), *kernel_size, *numbers, PASS=PASS.value, F=f, **HIDDEN,
        )  # fmt: skip


def hidden(
    x, depthwise, scale, shift, residual, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w, f, out_h, out_w, a, partial,
    moments,
) -> None:  # fmt: skip
    """As mlc_separable_conv_hidden."""
    numbers, size = (stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w), (out_h, out_w)
    pixels, weights = x.shape[0] * out_h * out_w, (x, depthwise, scale, shift)
    with torch.cuda.device_of(x):
        if moments is None:
            _hidden(APPLY, *weights, residual, None, None, numbers, f, size, a, None)
        elif pixels and x.shape[1]:
            _, sums = _tiles(pixels, HIDDEN, moments, x.shape[1])
            _hidden(MOMENTS, *weights, None, None, None, numbers, 0, size, None, sums)
            _moments(sums, moments, pixels, HIDDEN)


def bwd(
    da, x, depthwise, scale, shift, moments, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w, f, d, sums, partial,
) -> None:  # fmt: skip
    """As mlc_separable_conv_bwd."""
    numbers, size = (stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w), d.shape[2:]
    pixels, weights, C = d.shape[0] * size[0] * size[1], (x, depthwise, scale, shift, da), x.shape[1]
    if not C:
        return
    with torch.cuda.device_of(x):
        tiles, parts = _tiles(pixels, HIDDEN, sums, C)
        _hidden(GRADIENT if moments is None else SUMS, *weights, moments, None, numbers, f, size, d, parts)
        sums_kernel[(triton.cdiv(C, SUMS_OF["BC"]),)](parts, scale, moments, sums, max(pixels, 1), tiles, C, **SUMS_OF)
        if moments is not None:
            _hidden(NORM, *weights, moments, sums, numbers, f, size, d, None)


_WIDE = ("depthwise", "scale", "shift", "pointwise", "bias", "mean", "sums", "partial", "moments")
_POINTERS = ("x", "residual", "y", "other", "a")


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""

    def spec(kernel, dtype, **constexprs):
        def type_of(name):
            if name in constexprs:
                return "constexpr"
            return "*fp32" if name in _WIDE else f"*{dtype}" if name in _POINTERS else "i32"

        return kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs, {"num_warps": 4}

    product = {"PATCHES": False, "PRECISION": "tf32x3", "xc": 1, **PRODUCT}
    plain = {"depthwise": None, "scale": None, "shift": None, "KH": 1, "KW": 1, "xc": 1, **HIDDEN}
    return [
        spec(product_kernel, "bf16", F=2, G=3, partial=None, **product),
        spec(product_kernel, "fp32", F=1, G=0, bias=None, residual=None, rn=0, rh=0, rw=0, **product),
        spec(product_kernel, "fp16", F=0, G=2, depthwise=None, scale=None, shift=None, **product | {"PATCHES": True}),
        spec(hidden_kernel, "bf16", PASS=APPLY.value, F=2, mean=None, sums=None, partial=None, xc=1, **HIDDEN),
        spec(hidden_kernel, "fp32", PASS=MOMENTS.value, F=0, other=None, mean=None, sums=None, a=None, **plain),
        spec(hidden_kernel, "bf16", PASS=SUMS.value, F=3, sums=None, a=None, xc=1, **HIDDEN),
        spec(hidden_kernel, "fp16", PASS=NORM.value, F=1, partial=None, xc=1, **HIDDEN),
        spec(hidden_kernel, "fp32", PASS=GRADIENT.value, F=1, mean=None, sums=None, xc=1, **HIDDEN),
        spec(moments_kernel, "fp32", BP=64, **SUMS_OF),
        spec(sums_kernel, "fp32", **SUMS_OF),
    ]
