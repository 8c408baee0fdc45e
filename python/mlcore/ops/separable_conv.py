"""separable_conv2d, batch_norm2d and PackedSeparable, the public functions. The equations are in
kernels/separable_conv/separable_conv.h, what torch is told of them in _separable.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._backend import choose
from .._registry import autocast, direct, kernel, needs_grad, reference_if_transformed
from ..kernels.separable_conv import separable_conv_ref as ref
from . import _separable as op
from ._geometry import geometry
from ._separable import OP, PLAIN


class BatchNorm(NamedTuple):
    """A batch norm with the arguments of torch.nn.functional.batch_norm. training: normalise by the batch's moments, and move
    the running ones (where given) towards them, in place.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _numbers(function, x, kernel_size, stride, padding, dilation):
    """stride, dilation and padding (before, after) along H and W, in a row."""
    stride, dilation, pad = geometry(function, x.shape[2:], kernel_size, stride, padding, dilation)
    return (*stride, *dilation, *pad)


def _code(function, name, activation):
    if activation not in ref.ACTIVATIONS:
        allowed = ", ".join(map(repr, ref.ACTIVATIONS))
        raise ValueError(f"{function}: {name} must be one of {allowed}; got {activation!r}")
    return ref.ACTIVATIONS[activation]


def _check_norm(name, norm, channels):
    for field in norm._fields[:4]:
        t = getattr(norm, field)
        if t is not None and t.shape != (channels,):
            raise ValueError(f"{name}.{field} must have shape ({channels},); got {tuple(t.shape)}")
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{name} needs running_mean and running_var where it is not training")


def _check(x, depthwise_weight, pointwise_shape, depthwise_bias, pointwise_bias, norms, residual):
    name = "separable_conv2d"
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{name}: x must be a floating-point tensor (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    C = hidden = x.shape[1]
    if depthwise_weight is not None:
        shape = depthwise_weight.shape
        if len(shape) != 4 or shape[1] != 1 or C == 0 or shape[0] % C or 0 in shape:
            raise ValueError(
                f"{name}: depthwise_weight must be (C * multiplier, 1, KH, KW) with C = {C} >= 1; got {tuple(shape)}"
            )
        hidden = shape[0]
    if pointwise_shape[2:] not in ((), (1, 1)) or pointwise_shape[1:2] != (hidden,) or 0 in pointwise_shape:
        raise ValueError(f"{name}: pointwise_weight must be (J, {hidden}, 1, 1); got {tuple(pointwise_shape)}")
    for word, t, size in (
        ("depthwise_bias", depthwise_bias, hidden),
        ("pointwise_bias", pointwise_bias, pointwise_shape[0]),
    ):
        if t is not None and t.shape != (size,):
            raise ValueError(f"{name}: {word} must have shape ({size},); got {tuple(t.shape)}")
    for word, norm, size in zip(("norm", "pointwise_norm"), norms, (hidden, pointwise_shape[0]), strict=True):
        if norm is not None:
            _check_norm(f"{name}: {word}", norm, size)
    tensors = [("residual", residual, (x.dtype,)), ("depthwise_weight", depthwise_weight, (x.dtype, torch.float32))]
    for word, t, dtypes in tensors:
        if t is not None and (t.dtype not in dtypes or t.device != x.device):
            raise ValueError(f"{name}: {word} must be {dtypes[0]} as x, on {x.device}; got {t.dtype} on {t.device}")


def _fold(norm, depthwise_bias):
    """scale and shift of a norm with fixed moments, and of the bias before it."""
    if norm is None:
        return None, depthwise_bias
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else norm.weight * scale
    mean = norm.running_mean if depthwise_bias is None else norm.running_mean - depthwise_bias
    return scale, -mean * scale if norm.bias is None else norm.bias - mean * scale


def _used(name, norm, moments, count, conv_bias):
    """(mean, rstd) of (mean, variance) over `count` values; moves the running moments, as a bias before the norm does."""
    if count <= 1:
        raise ValueError(f"{name}: a training norm needs more than one value a channel; got {count}")
    with torch.no_grad():
        mean, variance = moments.unbind(0)
        if norm.running_mean is not None:
            moved = mean if conv_bias is None else mean + conv_bias
            norm.running_mean.lerp_(moved.to(norm.running_mean.dtype), norm.momentum)
        if norm.running_var is not None:
            norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
        return torch.stack((mean, (variance + norm.eps).rsqrt()))


def _settled(name, norm, taken, count, conv_bias):
    """(mean, rstd), scale and shift of a training norm, whose running moments are moved as in _used: small tensors that would
    take torch ten calls.
    """
    tensors = [norm.weight, norm.bias, conv_bias, norm.running_mean, norm.running_var]
    if count <= 1 or any(t is not None and not (t.dtype is torch.float32 and t.is_contiguous()) for t in tensors):
        moments = _used(name, norm, taken, count, conv_bias)
        return moments, *op._affine(norm.weight, norm.bias, moments)
    out = torch.empty_like(taken), torch.empty_like(taken[0]), torch.empty_like(taken[0])
    kernel(OP, "norm", "cpu")(taken, *tensors[:3], norm.momentum, norm.eps, count, *tensors[3:], *out)
    torch.autograd.graph.increment_version([t for t in tensors[3:] if t is not None])
    return out


def _batch_moments(name, x, depthwise, norm, conv_bias, numbers, backend):
    """(mean, rstd) of this batch's h, as _used has them."""
    size = op.hidden_size(x, depthwise, numbers)
    with torch.no_grad():
        if backend == "reference":
            wide = torch.promote_types(x.dtype, torch.float32)
            h = ref.hidden(
                x.to(wide), None if depthwise is None else depthwise.to(wide), numbers[:2], numbers[2:4], numbers[4:]
            )
            moments = torch.stack(ref.batch_norm_moments(h))
        else:
            moments = op.moments_of(x.detach(), None if depthwise is None else depthwise.detach(), numbers, backend)
    return _used(name, norm, moments, x.shape[0] * size[0] * size[1], conv_bias)


def batch_norm2d(
    x: torch.Tensor,
    norm: BatchNorm,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Batch normalisation (Ioffe and Szegedy 2015) by the moments of this batch with an activation and a residual behind it, in
    two passes over x and one result: activation(weight * (x - mean) * rstd + bias) + residual.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16 (float64 and other devices: the reference); channels_last is native.
        norm: with training=True; running moments, where given, are moved in place.
        activation: None, "relu", "relu6" or "silu".
        residual: x's shape and dtype.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain, op "separable_conv").

    Returns:
        y (N, C, H, W) in x's dtype, channels_last. Differentiable; second derivatives go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"batch_norm2d: x must be a floating-point tensor (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    _check_norm("batch_norm2d: norm", norm, x.shape[1])
    if not norm.training:
        raise ValueError("batch_norm2d: norm must be training; got training=False")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm2d: residual must be {x.dtype} {tuple(x.shape)} as x; got {residual.dtype} {tuple(residual.shape)}"
        )
    f, backend = _code("batch_norm2d", "activation", activation), choose(OP, reference_if_transformed("batch_norm2d", impl), x)
    moments = _batch_moments("batch_norm2d", x, None, norm, None, PLAIN, backend)
    return _normalised(x, norm, moments, f, residual, backend)


def _normalised(x, norm, moments, f, residual, backend):
    if backend == "reference":
        y = op.reference(x, None, norm.weight, norm.bias, None, moments, PLAIN, f)
        return y if residual is None else y + residual
    return op.NormActivation.apply(x, norm.weight, norm.bias, residual, moments, f, backend)


def separable_conv2d(
    x: torch.Tensor,
    depthwise_weight: torch.Tensor | None,
    pointwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None = None,
    pointwise_bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | str | Sequence = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    norm: BatchNorm | None = None,
    activation: str | None = None,
    pointwise_norm: BatchNorm | None = None,
    pointwise_activation: str | None = None,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """A depthwise and a pointwise convolution in one pass (the block of MobileNet, Howard et al. 2017):
    pointwise_activation(pointwise_norm(pointwise(activation(norm(depthwise(x)))))) + residual. What the depthwise convolution
    makes is never kept: a strip of it is multiplied while it is in the cache, and backward computes it again.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16 (float64 and other devices: the reference). channels_last is native; other
            layouts are copied to it. A multiplier makes a copy of x with repeated channels.
        depthwise_weight: (C * multiplier, 1, KH, KW), or None: a pointwise convolution alone.
        pointwise_weight: (J, C * multiplier, 1, 1). It is packed in every call; PackedSeparable does so once.
        depthwise_bias, pointwise_bias: (C * multiplier), (J). A training norm behind them cancels them: they move running_mean
            and get no gradient.
        stride, padding, dilation: as depthwise_conv2d has them, zeros outside.
        norm, pointwise_norm: a BatchNorm behind each convolution; with training=True it takes the batch's moments.
        activation, pointwise_activation: None, "relu", "relu6" or "silu".
        residual: (N, J, Ho, Wo), added last.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain, op "separable_conv").

    Returns:
        y (N, J, Ho, Wo) in x's dtype, channels_last. Differentiable; second derivatives go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    x, depthwise_weight, pointwise_weight, residual = autocast(x.device.type, x, depthwise_weight, pointwise_weight, residual)
    name, shape, last = "separable_conv2d", tuple(pointwise_weight.shape), pointwise_norm
    _check(x, depthwise_weight, shape, depthwise_bias, pointwise_bias, (norm, last), residual)
    size = (1, 1) if depthwise_weight is None else depthwise_weight.shape[2:]
    numbers = _numbers(name, x, size, stride, padding, dilation)
    f, g = (_code(name, n, a) for n, a in (("activation", activation), ("pointwise_activation", pointwise_activation)))
    backend = choose(OP, reference_if_transformed(name, impl), x)
    depthwise = None if depthwise_weight is None else depthwise_weight.squeeze(1)
    if depthwise is None:  # then stride and padding are torch's, with their gradients
        top, bottom, left, right = numbers[4:]
        x = torch.nn.functional.pad(x, (left, right, top, bottom)) if any(numbers[4:]) else x
        x, numbers = x if tuple(numbers[:2]) == (1, 1) else x[:, :, :: numbers[0], :: numbers[1]], PLAIN
    elif depthwise.shape[0] != x.shape[1]:
        x = x.repeat_interleave(depthwise.shape[0] // x.shape[1], 1)
    training, last_training = (n is not None and n.training for n in (norm, last))
    watched = (x, depthwise_weight, pointwise_weight, residual)
    if last_training and backend == "cpu" and direct(*watched, *last[:4], *(norm or ())[:4], depthwise_bias, pointwise_bias):
        matrix, biases = pointwise_weight.reshape(shape[:2]), (depthwise_bias, pointwise_bias)
        return _block(x, depthwise, matrix, biases, norm, last, residual, numbers, f, g, backend)
    moments = _batch_moments(name, x, depthwise, norm, depthwise_bias, numbers, backend) if training else None
    scale, shift = (norm.weight, norm.bias) if training else _fold(norm, depthwise_bias)
    matrix = pointwise_weight.reshape(shape[:2])
    if last is not None and not last_training:
        factor, pointwise_bias = _fold(last, pointwise_bias)
        matrix = (matrix * factor[:, None]).to(matrix.dtype)
    if backend == "reference":
        z, taken = op.reference(x, depthwise, scale, shift, matrix, moments, numbers, f), None
    elif last_training or needs_grad(x, depthwise, scale, shift, matrix):
        args = (x, depthwise, scale, shift, matrix, moments, numbers, f, last_training, backend)
        z, taken = op.SeparableConv.apply(*args)
    else:
        if training:
            scale, shift = op._affine(scale, shift, moments)
        kept = (scale, shift, op.blocks_of(matrix.t()))
        if needs_grad(pointwise_bias, residual):  # of these alone: the rest is a constant
            y = op.forward(x, depthwise, None, *kept, None, shape[0], numbers, f, 0, False, backend)[0]
            return _finish(y, pointwise_bias, g, residual)
        return op.forward(x, depthwise, residual, *kept, pointwise_bias, shape[0], numbers, f, g, False, backend)[0]
    if not last_training:
        return _finish(z, pointwise_bias, g, residual)
    if taken is None:
        with torch.no_grad():
            taken = torch.stack(ref.batch_norm_moments(z.to(torch.promote_types(z.dtype, torch.float32))))
    moments = _used(name, last, taken, z.numel() // shape[0], pointwise_bias)
    return _normalised(z, last, moments, g, residual, backend)


def _block(x, depthwise, matrix, biases, norm, last, residual, numbers, f, g, backend):
    """Everything as one function of autograd, where the last norm is training and nothing watches the call."""
    name, affine = "separable_conv2d", None
    count = x.shape[0] * math.prod(op.hidden_size(x, depthwise, numbers))
    with torch.no_grad():
        if norm is not None and norm.training:
            affine = _settled(name, norm, op._run_moments(x, depthwise, numbers, backend), count, biases[0])
    weights = _fold(norm, biases[0]) if affine is None else norm[:2]

    def settle(taken):
        return _settled(name, last, taken, count, biases[1])

    tensors = (x, depthwise, *weights, matrix, *last[:2], residual)
    return op.SeparableBlock.apply(*tensors, affine, numbers, f, g, settle, backend)


def _finish(z, bias, g, residual):
    y = ref.activate(z if bias is None else z + bias.view(1, -1, 1, 1).to(z.dtype), g)
    return y if residual is None else y + residual


class _PackedProduct:
    """Weights of a product in the kernel's blocks, with the norm behind it folded in, and its epilogue."""

    def __init__(self, matrix, bias, norm, activation, norm_before=None) -> None:
        if any(n is not None and n.training for n in (norm, norm_before)):
            raise ValueError(f"{type(self).__name__}: norms must have fixed moments; got training=True")
        with torch.no_grad():
            scale, bias = _fold(norm, bias)
            self._blocks = op.blocks_of((matrix if scale is None else matrix * scale[:, None]).t())
            self._bias = op.wide(bias)
        backend = choose(OP, None, self._blocks)
        if backend == "reference":
            raise ValueError(
                f"{type(self).__name__}: {self._blocks.device} has no kernel; see mlcore.explain('separable_conv', x)"
            )
        self._kernel, self._geometries = kernel(OP, "fwd", backend), {}
        self._channels, self._g = matrix.shape[0], activation

    def _geometry(self, x):
        found = self._geometries.get(x.shape)
        if found is None:
            if len(self._geometries) >= 1024:
                self._geometries.clear()
            found = self._geometries[x.shape] = self._of(x)
        return found

    def _refuse_gradients(self, *tensors):
        if needs_grad(*tensors):
            raise ValueError(f"{type(self).__name__}: it has no gradients; call it under torch.no_grad()")


class PackedConv(_PackedProduct):
    """torch.nn.functional.conv2d for few input channels, with everything that inference knows beforehand done once: the norm
    folded into the weights, these packed. Without gradients.

    Args:
        weight: (J, C, KH, KW).
        bias: (J), or None.
        stride, padding, dilation: as separable_conv2d has them.
        norm: a BatchNorm with fixed moments behind the convolution.
        activation: None, "relu", "relu6" or "silu".

    Calling it with x (N, C, H, W) of any strides gives y (N, J, Ho, Wo), channels_last.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | str | Sequence = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        norm: BatchNorm | None = None,
        activation: str | None = None,
    ) -> None:
        matrix = weight.detach().permute(0, 2, 3, 1).reshape(weight.shape[0], -1).float()
        super().__init__(matrix, bias, norm, _code("PackedConv", "activation", activation))
        self._filter, self._words = weight[0, :1], (stride, padding, dilation)
        self._in_channels = weight.shape[1]

    def _of(self, x):
        if x.dim() != 4 or x.shape[1] != self._in_channels:
            raise ValueError(f"PackedConv: x must be (N, {self._in_channels}, H, W); got {tuple(x.shape)}")
        kernel_size = self._filter.shape[1:]
        numbers = _numbers("PackedConv", x, kernel_size, *self._words)
        size = (x.shape[0], self._channels, *op.hidden_size(x, self._filter, numbers))
        return (*op.geometry(numbers), *kernel_size), size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._refuse_gradients(x)
        geometry, size = self._geometry(x)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        self._kernel(x, None, None, None, self._blocks, self._bias, None, *geometry, 0, self._g, y, None, None)
        return y


class PackedSeparable(_PackedProduct):
    """separable_conv2d with everything that inference knows beforehand done once: both norms folded into the weights, the
    pointwise ones packed. Without gradients.

    Args: as separable_conv2d has them; norm and pointwise_norm with fixed moments.

    Calling it with x (N, C, H, W) and maybe a residual gives y (N, J, Ho, Wo), channels_last.
    """

    def __init__(
        self,
        depthwise_weight: torch.Tensor | None,
        pointwise_weight: torch.Tensor,
        depthwise_bias: torch.Tensor | None = None,
        pointwise_bias: torch.Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | str | Sequence = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        norm: BatchNorm | None = None,
        pointwise_norm: BatchNorm | None = None,
        activation: str | None = None,
        pointwise_activation: str | None = None,
    ) -> None:
        matrix = pointwise_weight.detach().reshape(pointwise_weight.shape[:2]).float()
        last = _code("PackedSeparable", "pointwise_activation", pointwise_activation)
        super().__init__(matrix, pointwise_bias, pointwise_norm, last, norm)
        with torch.no_grad():
            self._scale, self._shift = (op.wide(t) for t in _fold(norm, depthwise_bias))
            self._depthwise = None
            if depthwise_weight is not None:
                kernel_weight = op.wide(depthwise_weight).squeeze(1)
                self._depthwise = kernel_weight if self._scale is None else kernel_weight * self._scale[:, None, None]
                self._scale = None
        self._hidden, self._words = pointwise_weight.shape[1], (stride, padding, dilation)
        self._f = _code("PackedSeparable", "activation", activation)

    def _of(self, x):
        multiplier = self._hidden // max(x.shape[1], 1)
        if x.dim() != 4 or multiplier * x.shape[1] != self._hidden or (multiplier != 1 and self._depthwise is None):
            raise ValueError(f"separable_conv2d: x must be (N, C, H, W) with C of the weights; got {tuple(x.shape)}")
        kernel_size = (1, 1) if self._depthwise is None else self._depthwise.shape[1:]
        numbers = _numbers("PackedSeparable", x, kernel_size, *self._words)
        size = (x.shape[0], self._channels, *op.hidden_size(x, self._depthwise, numbers))
        return multiplier, op.geometry(numbers), size

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        self._refuse_gradients(x, residual)
        multiplier, geometry, size = self._geometry(x)
        if multiplier != 1:
            x = x.repeat_interleave(multiplier, 1)
        x, residual = op.channels_last(x), op.channels_last(residual)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        tensors = (x, self._depthwise, self._scale, self._shift, self._blocks, self._bias, residual)
        self._kernel(*tensors, *geometry, 0, 0, self._f, self._g, y, None, None)
        return y
