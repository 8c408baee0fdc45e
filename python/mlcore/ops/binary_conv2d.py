"""binary_conv2d: registration and the public functions. The equations are in kernels/binary_conv2d/binary_conv2d.h."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from .._backend import choose
from .._registry import autocast, create_graph, direct, graph_gradients, kernel, needs_grad, reference_if_transformed, register
from ..kernels.binary_conv2d import binary_conv2d_ref as ref
from ..quant import PackedWeight, pack_codes
from ._geometry import each, geometry
from ._signs import (
    FLOATS,
    PackedSigns,
    check_others,
    check_weight,
    new_words,
    register_pack,
    signs_to_words,
    weight_signs,
    words_to_signs,
)
from ._straight_through import ESTIMATORS, binarize

_OP = "binary_conv2d"


def _channels_last(x) -> bool:
    """True where x (B, C, H, W) is served with C contiguous: then so is y."""
    return x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[3] <= 1 or x.stride(3) != 1)


def _run_pack(x, scaled, impl):
    B, C, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
    words, scale = new_words(x, (B, H, W), C, scaled)
    kernel(_OP, "pack", impl)(x, words, scale)
    return words, scale


def _pixels(x):
    B, C, H, W = x.shape
    return (B, H, W), C


def _output_size(size, kernel_size, stride, dilation, pad):
    axes = zip(size, kernel_size, stride, dilation, (pad[0] + pad[1], pad[2] + pad[3]), strict=True)
    return [(n + p - (k - 1) * d - 1) // s + 1 for n, k, s, d, p in axes]


def _fwd_fake(words, codes, scales, pixel_scale, bias, O, C, kernel_size, stride, dilation, pad, dtype, last, impl):
    Ho, Wo = _output_size(words.shape[1:3], kernel_size, stride, dilation, pad)
    if dtype == torch.int32:
        return words.new_empty(words.shape[0], Ho, Wo, -(-O // 32))
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(words.shape[0], O, Ho, Wo, dtype=dtype, device=words.device, memory_format=layout)


def _run_fwd(words, codes, scales, pixel_scale, bias, O, C, kernel_size, stride, dilation, pad, dtype, last, impl):
    y = _fwd_fake(words, codes, scales, pixel_scale, bias, O, C, kernel_size, stride, dilation, pad, dtype, last, impl)
    scales = scales[:, :1].contiguous()
    pixel_scale = None if pixel_scale is None else pixel_scale.contiguous()
    numbers = (O, C, *kernel_size, *stride, *dilation, pad[0], pad[2])
    kernel(_OP, "fwd", impl)(words.contiguous(), codes, scales, pixel_scale, bias, *numbers, y)
    return y


_pack, _packed = register_pack(_OP, _run_pack, _pixels)
_fwd = register(
    "binary_conv2d_fwd(Tensor words, Tensor codes, Tensor scales, Tensor? pixel_scale, Tensor? bias, SymInt O, SymInt C,"
    " SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, SymInt[] pad, ScalarType dtype, bool channels_last, str impl)"
    " -> Tensor",
    launch=_run_fwd,
    fake=_fwd_fake,
)


def _uncrop(size, pad):
    """Sizes of an image with its padding."""
    return size[0] + pad[0] + pad[1], size[1] + pad[2] + pad[3]


def _input_gradient(dy, weight, size, stride, dilation, pad):
    """Of a convolution's input (B, C, *size) without its padding."""
    H, W = size
    shape = (dy.shape[0], weight.shape[1], *_uncrop(size, pad))
    return torch.nn.grad.conv2d_input(shape, weight, dy, stride, 0, dilation)[:, :, pad[0] : pad[0] + H, pad[2] : pad[2] + W]


class _BinaryConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, codes, scales, O, numbers, scaled, estimator, dtype, impl):
        words, scale = _packed(x, scaled, impl)
        pixel_scale = None if scale is None else ref.window_mean(scale, *numbers)
        ctx.save_for_backward(x, codes, scales, words, pixel_scale)
        ctx.numbers, ctx.how = (O, *numbers), (estimator, impl)
        run = _run_fwd if direct(x, bias) else _fwd
        return run(words, codes, scales, pixel_scale, bias, O, x.shape[1], *numbers, dtype, _channels_last(x), impl)

    @staticmethod
    def backward(ctx, dy):
        x, codes, scales, words, pixel_scale = ctx.saved_tensors
        O, kernel_size, *geometry = ctx.numbers
        estimator, impl = ctx.how
        if create_graph():  # the reference's, which differentiates without end
            return *_differentiable_gradients(ctx, dy), *(None,) * 8
        C, wide, g = x.shape[1], x.float(), dy.float()
        dx = dbias = None
        if ctx.needs_input_grad[1]:
            dbias = g.sum((0, 2, 3))
        if ctx.needs_input_grad[0]:
            dot = g * scales[:, 0].reshape(-1)[:O, None, None]  # of the sums, before the pixels' scale
            of_signs = dot if pixel_scale is None else dot * pixel_scale[:, None]
            rows = weight_signs(codes, O, kernel_size[0] * kernel_size[1] * C, C)
            weight = ref.taps_to_planes(rows, C, kernel_size).contiguous()
            dx = _input_gradient(of_signs, weight, x.shape[2:], *geometry) * ESTIMATORS[estimator](wide)
            if pixel_scale is not None:
                ones = torch.ones_like(scales)
                sums = _fwd(words, codes, ones, None, None, O, C, kernel_size, *geometry, torch.float32, False, impl)
                dt = (dot * sums).sum(1, keepdim=True)
                box = dt.new_full((1, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
                dx = dx + _input_gradient(dt, box, x.shape[2:], *geometry) * wide.sign() / C
            dx = dx.to(x.dtype)
        return dx, dbias, *(None,) * 8


def _reference(x, packed, *others):
    return _formula(x, packed.codes, packed.scales, packed.shape[0], *others)


def _formula(x, codes, scales, O, bias, C, numbers, scaled, estimator, dtype):
    kernel_size = numbers[0]
    if isinstance(x, PackedSigns):
        b, scale = ref.to_planes(words_to_signs(x.words, C)), x.scale
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        b, scale = binarize(wide, estimator), wide.abs().mean(1) if scaled else None
    signs = ref.taps_to_planes(weight_signs(codes, O, kernel_size[0] * kernel_size[1] * C, C), C, kernel_size)
    pixel_scale = None if scale is None else ref.window_mean(scale, *numbers)
    alpha = scales[:, 0].reshape(-1)[:O]
    return ref.binary_conv2d(b, signs, alpha, pixel_scale, bias, *numbers[1:], dtype)


def _differentiable_gradients(ctx, dy):
    """Of x and bias, with a graph."""
    x, codes, scales, _, pixel_scale = ctx.saved_tensors
    O, *numbers = ctx.numbers
    with torch.enable_grad():
        bias = dy.new_zeros(O, dtype=torch.float32).requires_grad_()  # its gradient doesn't depend on it
        scaled, estimator = pixel_scale is not None, ctx.how[0]
        y = _formula(x, codes, scales, O, bias, x.shape[1], numbers, scaled, estimator, dy.dtype)
        return graph_gradients(ctx.needs_input_grad, (x, bias), (y,), (dy,))


#: Weights whose groups were seen to share a scale a row.
_seen: weakref.WeakSet[PackedWeight] = weakref.WeakSet()


def _check_weight(packed, kernel_size):
    """C, after the weight was checked."""
    taps, K = kernel_size[0] * kernel_size[1], packed.shape[1]
    if K == 0 or K % taps:
        raise ValueError(f"{_OP}: packed must be (O, kh * kw * C) for kernel_size {kernel_size}; got {packed.shape}")
    check_weight(_OP, packed, K // taps)
    if not torch.compiler.is_compiling() and packed not in _seen:
        if not torch.equal(packed.scales, packed.scales[:, :1].expand_as(packed.scales)):
            raise ValueError(f"{_OP}: packed must have one scale a row, the same in all of its groups; it has others")
        _seen.add(packed)
    return K // taps


def _check(x, C, *others):
    if isinstance(x, PackedSigns):
        if x.features != C or x.words.dim() != 4:
            got = f"{x.features} in {tuple(x.words.shape)}"
            raise ValueError(f"{_OP}: packed x must have words (B, H, W, ...) of the weight's C = {C} channels; got {got}")
    elif x.dim() != 4 or x.shape[1] != C:
        raise ValueError(f"{_OP}: x must be (B, C, H, W) or (C, H, W) with the weight's C = {C}; got {tuple(x.shape)}")
    check_others(_OP, x, *others)


def pack_binary_conv(weight: torch.Tensor, scale: torch.Tensor | None = None) -> PackedWeight:
    """A convolution's weight for binary_conv2d: its signs, -1 below 0, and a scale for each output channel.

    Args:
        weight: (O, C, kh, kw), floating and finite, C, kh and kw at least 1.
        scale: (O), finite; default the mean magnitude (Rastegari et al. 2016, "XNOR-Net").

    Returns:
        PackedWeight (O, kh * kw * C) of format "binary" in groups of C: a tap's channels stand together.

    Raises:
        ValueError: one of these rules is broken.
    """
    if weight.dim() != 4 or not weight.is_floating_point() or 0 in weight.shape[1:] or not bool(weight.isfinite().all()):
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"pack_binary_conv: weight must be floating and finite, (O, C, kh, kw), not empty; got {got}")
    O, C, kh, kw = weight.shape
    rows = ref.pixels_to_taps(weight.detach().float())
    scale = rows.abs().mean(1) if scale is None else scale.detach().float()
    if scale.shape != (O,):
        raise ValueError(f"pack_binary_conv: scale must be ({O},); got {tuple(scale.shape)}")
    scales = scale[:, None].expand(-1, kh * kw)
    return pack_codes((rows >= 0).byte(), scales, bits=1, group_size=C, codebook=rows.new_tensor([-1.0, 1.0]), format="binary")


def pack_pixels(x: torch.Tensor, *, scale: bool = False, impl: str | None = None) -> PackedSigns:
    """An image's channels as bits, for binary_conv2d: -1 where x < 0, else +1 (NaN too).

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16 (float64 and other devices: the reference). Any strides; a copy is made
            where x is neither contiguous nor channels_last.
        scale: also keep mean_c |x|.
        impl: as binary_conv2d's.

    Returns:
        PackedSigns with words (B, H, W, ceil(C / 32)).

    Raises:
        ValueError: x isn't floating, (B, C, H, W), or impl can't serve the call.
    """
    if x.dim() != 4 or x.dtype not in FLOATS:
        raise ValueError(f"pack_pixels: x must be floating, (B, C, H, W); got {x.dtype} {tuple(x.shape)}")
    C, x = x.shape[1], x.detach()
    backend = choose(_OP, reference_if_transformed(_OP, impl), x)
    if backend == "reference":
        return PackedSigns(signs_to_words(ref.to_pixels(x)), C, x.abs().mean(1).float() if scale else None)
    words, pixel_scale = _packed(x, scale, backend)
    return PackedSigns(words, C, pixel_scale)


def binary_conv2d(
    x: torch.Tensor | PackedSigns,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence = 0,
    dilation: int | Sequence[int] = 1,
    *,
    kernel_size: int | Sequence[int],
    activation_scale: bool = False,
    estimator: str = "clipped",
    packed_output: bool = False,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> torch.Tensor | PackedSigns:
    """A convolution of signs (Rastegari et al. 2016, "XNOR-Net"): y = conv(sign(x), sign(w)) * scale + bias, counted in bits.
    The sums are exact integers; padding is 0, neither -1 nor 1.

    Args:
        x: (B, C, H, W) or (C, H, W), float32, bfloat16 or float16 (float64 and other devices: the reference), any strides; or
            PackedSigns (pack_pixels). sign is -1 below 0, else +1.
        packed: pack_binary_conv(weight), (O, kh * kw * C).
        bias: (O), any floating dtype.
        stride, dilation: an integer or two.
        padding: an integer, two, two pairs (before, after), "same" (stride 1) or "valid".
        kernel_size: an integer or two, the weight's.
        activation_scale: multiply each pixel of y with the mean over its window of mean_c |x|, XNOR-Net's K. PackedSigns bring
            their mean_c |x|.
        estimator: how gradients pass sign: "identity", "clipped", "approx" or "swish", see binarize.
        packed_output: give the signs of y as PackedSigns, for the next layer.
        dtype: of y; default x's, float32 for PackedSigns.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        y (B, O, Ho, Wo), in channels_last where x is; or PackedSigns with O features. Differentiable in x and bias
        unless packed.

    Raises:
        ValueError: shapes, dtypes or devices break the rules above, or impl can't serve the call.
    """
    given = isinstance(x, PackedSigns)
    if not given:
        if x.dim() == 3 and not packed_output:
            y = binary_conv2d(x[None], packed, bias, stride, padding, dilation, kernel_size=kernel_size, dtype=dtype, impl=impl,
                              activation_scale=activation_scale, estimator=estimator)  # fmt: skip
            return y[0]
        (x,) = autocast(x.device.type, x)
    kernel_size = each(_OP, "kernel_size", kernel_size, 2, 1)
    C = _check_weight(packed, kernel_size)
    _check(x, C, packed, bias, activation_scale, estimator, packed_output, dtype)
    size = x.words.shape[1:3] if given else x.shape[2:]
    numbers = (kernel_size, *geometry(_OP, size, kernel_size, stride, padding, dilation))
    recorded = needs_grad(None if given else x, bias)
    if packed_output and recorded:
        raise ValueError(f"{_OP}: packed_output has no gradient; call it under torch.no_grad()")
    O = packed.shape[0]
    out = torch.int32 if packed_output else dtype or (torch.float32 if given else x.dtype)
    backend = choose(_OP, reference_if_transformed(_OP, impl), packed.scales if given else x)
    if backend == "reference":
        real = torch.float32 if packed_output else out
        y = _reference(x, packed, bias, C, numbers, activation_scale, estimator, real)
        return PackedSigns(signs_to_words(ref.to_pixels(y)), O) if packed_output else y
    wide = bias if bias is None or bias.dtype == torch.float32 else bias.float()
    if recorded and not given:
        args = (x, wide, packed.codes, packed.scales, O, numbers, activation_scale, estimator, out, backend)
        return _BinaryConv2d.apply(*args)
    words, scale = (x.words, x.scale) if given else _packed(x, activation_scale, backend)
    pixel_scale = None if scale is None else ref.window_mean(scale, *numbers)
    inner, last = None if recorded else wide, not given and _channels_last(x)
    run = _run_fwd if direct(words, inner, packed.codes) else _fwd
    real = torch.float32 if recorded else out
    y = run(words, packed.codes, packed.scales, pixel_scale, inner, O, C, *numbers, real, last, backend)
    return PackedSigns(y, O) if packed_output else y if inner is wide else (y + wide[:, None, None]).to(out)
