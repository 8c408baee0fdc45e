"""binary_linear: registration and the public functions. The equations are in kernels/binary_linear/binary_linear.h."""

from __future__ import annotations

import torch

from .._backend import choose
from .._registry import autocast, create_graph, direct, graph_gradients, kernel, needs_grad, reference_if_transformed, register
from ..kernels.binary_linear import binary_linear_ref as ref
from ..quant import PackedWeight
from ._rows import rows_of
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

_OP = "binary_linear"


def _run_pack(x, scaled, impl):
    words, scale = new_words(x, x.shape[:-1], x.shape[-1], scaled)
    rows = rows_of(x)
    flat = None if scale is None else scale.view(-1)
    kernel(_OP, "pack", impl)(rows, words.view(rows.shape[0], words.shape[-1]), flat)
    return words, scale


def _fwd_fake(words, codes, scales, row_scale, bias, N, K, dtype, impl):
    return words.new_empty(*words.shape[:-1], -(-N // 32) if dtype == torch.int32 else N, dtype=dtype)


def _run_fwd(words, codes, scales, row_scale, bias, N, K, dtype, impl):
    y = _fwd_fake(words, codes, scales, row_scale, bias, N, K, dtype, impl)
    M = words.shape[:-1].numel()
    flat = None if row_scale is None else row_scale.reshape(-1).contiguous()
    rows = words.reshape(M, words.shape[-1]).contiguous()
    kernel(_OP, "fwd", impl)(rows, codes, scales, flat, bias, N, K, y.view(M, y.shape[-1]))
    return y


_pack, _packed = register_pack(_OP, _run_pack, lambda x: (x.shape[:-1], x.shape[-1]))
_fwd = register(
    "binary_linear_fwd(Tensor words, Tensor codes, Tensor scales, Tensor? row_scale, Tensor? bias, SymInt N, SymInt K,"
    " ScalarType dtype, str impl) -> Tensor",
    launch=_run_fwd,
    fake=_fwd_fake,
)


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, codes, scales, N, scaled, estimator, dtype, impl):
        words, row_scale = _packed(x, scaled, impl)
        ctx.save_for_backward(x, codes, scales, words, row_scale)
        ctx.numbers = N, estimator, impl
        return (_run_fwd if direct(x, bias) else _fwd)(words, codes, scales, row_scale, bias, N, x.shape[-1], dtype, impl)

    @staticmethod
    def backward(ctx, dy):
        x, codes, scales, words, row_scale = ctx.saved_tensors
        N, estimator, impl = ctx.numbers
        if create_graph():  # the reference's, which differentiates without end
            return *_differentiable_gradients(ctx, dy), *(None,) * 7
        K, wide, g = x.shape[-1], x.float(), dy.float()
        dx = dbias = None
        if ctx.needs_input_grad[1]:
            dbias = g.sum_to_size(N)
        if ctx.needs_input_grad[0]:
            dot = g * scales.reshape(-1)[:N]  # of the sums, before the rows' scale
            of_signs = dot if row_scale is None else dot * row_scale[..., None]
            db = of_signs @ weight_signs(codes, N, K, max(K, 1)).to(g.device)
            dx = db * ESTIMATORS[estimator](wide)
            if row_scale is not None:
                sums = _fwd(words, codes, torch.ones_like(scales), None, None, N, K, torch.float32, impl)
                dx = dx + (dot * sums).sum(-1, keepdim=True) * wide.sign() / max(K, 1)
            dx = dx.to(x.dtype)
        return dx, dbias, *(None,) * 7


def _scales(packed):
    """(P, 1, 16), also where K = 0 leaves no group to have one."""
    return packed.scales if packed.shape[1] else packed.scales.new_zeros(packed.scales.shape[0], 1, 16)


def _reference(x, packed, bias, scaled, estimator, dtype):
    return _formula(x, packed.codes, _scales(packed), bias, *packed.shape, scaled, estimator, dtype)


def _formula(x, codes, scales, bias, N, K, scaled, estimator, dtype):
    if isinstance(x, PackedSigns):
        b, row_scale = words_to_signs(x.words, K), x.scale
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        b = binarize(wide, estimator)
        row_scale = wide.abs().sum(-1) / max(K, 1) if scaled else None
    return ref.binary_linear(b, weight_signs(codes, N, K, max(K, 1)), scales.reshape(-1)[:N], row_scale, bias, dtype)


def _differentiable_gradients(ctx, dy):
    """Of x and bias, with a graph."""
    x, codes, scales, _, row_scale = ctx.saved_tensors
    N, estimator, _ = ctx.numbers
    with torch.enable_grad():
        bias = dy.new_zeros(N, dtype=torch.float32).requires_grad_()  # its gradient doesn't depend on it
        y = _formula(x, codes, scales, bias, N, x.shape[-1], row_scale is not None, estimator, dy.dtype)
        return graph_gradients(ctx.needs_input_grad, (x, bias), (y,), (dy,))


def _check(x, packed, *others):
    K = packed.shape[1]
    check_weight(_OP, packed, max(K, 1))
    if isinstance(x, PackedSigns):
        if x.features != K:
            raise ValueError(f"{_OP}: x must have the weight's K = {K} features; got {x.features}")
    elif x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{_OP}: x must be (..., K) with the weight's K = {K}; got {tuple(x.shape)}")
    check_others(_OP, x, packed, *others)


def pack_signs(x: torch.Tensor, *, scale: bool = False, impl: str | None = None) -> PackedSigns:
    """Activations as bits, for binary_linear: -1 where x < 0, else +1 (NaN too).

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 and other devices: the reference). Any strides.
        scale: also keep mean_k |x|, which results are multiplied with (Rastegari et al. 2016, "XNOR-Net").
        impl: as binary_linear's.

    Raises:
        ValueError: x isn't floating or has no dimension, or impl can't serve the call.
    """
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"pack_signs: x must be floating, (..., K); got {x.dtype} {tuple(x.shape)}")
    K, x = x.shape[-1], x.detach()
    backend = choose(_OP, reference_if_transformed(_OP, impl), x)
    if backend == "reference":
        return PackedSigns(signs_to_words(x), K, (x.abs().sum(-1) / max(K, 1)).float() if scale else None)
    words, row_scale = _packed(x, scale, backend)
    return PackedSigns(words, K, row_scale)


def unpack_signs(packed: PackedSigns, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The signs themselves, (..., features) of -1 and 1; without the scale."""
    return words_to_signs(packed.words, packed.features, dtype)


def binary_linear(
    x: torch.Tensor | PackedSigns,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    activation_scale: bool = False,
    estimator: str = "clipped",
    packed_output: bool = False,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> torch.Tensor | PackedSigns:
    """A linear layer of signs (Rastegari et al. 2016, "XNOR-Net"): y = (sign(x) · sign(w)) * scale + bias, counted in bits. The
    sums are exact integers. Real x with binary weights is quant_linear's: it takes the same packed weight.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 and other devices: the reference), any strides; or PackedSigns.
            sign is -1 below 0, else +1.
        packed: the weight (N, K), mlcore.quant.pack(w, "binary"): one scale a row.
        bias: (N), any floating dtype.
        activation_scale: multiply each row with mean_k |x|, XNOR-Net's K. PackedSigns bring theirs.
        estimator: how gradients pass sign: "identity", "clipped", "approx" or "swish", see binarize.
        packed_output: give the signs of y as PackedSigns, for the next layer.
        dtype: of y; default x's, float32 for PackedSigns.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        y (..., N), or PackedSigns with N features. Differentiable in x and bias unless packed. Without activation_scale NaN
        counts as +1; with it, it makes its row NaN.

    Raises:
        ValueError: shapes, dtypes or devices break the rules above, or impl can't serve the call.
    """
    given = isinstance(x, PackedSigns)
    if not given:
        (x,) = autocast(x.device.type, x)
    _check(x, packed, bias, activation_scale, estimator, packed_output, dtype)
    recorded = needs_grad(None if given else x, bias)
    if packed_output and recorded:
        raise ValueError(f"{_OP}: packed_output has no gradient; call it under torch.no_grad()")
    N, K = packed.shape
    out = torch.int32 if packed_output else dtype or (torch.float32 if given else x.dtype)
    backend = choose(_OP, reference_if_transformed(_OP, impl), packed.scales if given else x)
    if backend == "reference":
        y = _reference(x, packed, bias, activation_scale, estimator, torch.float32 if packed_output else out)
        return PackedSigns(signs_to_words(y), N) if packed_output else y
    scales, wide = _scales(packed), bias if bias is None or bias.dtype == torch.float32 else bias.float()
    if recorded and not given:
        return _BinaryLinear.apply(x, wide, packed.codes, scales, N, activation_scale, estimator, out, backend)
    words, row_scale = (x.words, x.scale) if given else _packed(x, activation_scale, backend)
    inner = None if recorded else wide
    run = _run_fwd if direct(words, inner, packed.codes) else _fwd
    y = run(words, packed.codes, scales, row_scale, inner, N, K, torch.float32 if recorded else out, backend)
    return PackedSigns(y, N) if packed_output else y if inner is wide else (y + wide).to(out)
