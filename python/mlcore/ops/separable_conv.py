"""separable_conv: registration and the public function. The equations are in kernels/separable_conv/separable_conv.h.

The kernels take x with contiguous channels and the pointwise weights in blocks; a norm between the two convolutions reaches
them as one scale and shift a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._backend import choose
from .._registry import autocast, create_graph, direct, kernel, needs_grad, reference_if_transformed, register
from ..kernels.separable_conv import separable_conv_ref as ref

_OP = "separable_conv"
_BLOCK, _ROWS = 64, 16  # kBlock and kPartialRows of separable_conv_kernels.h


class BatchNorm(NamedTuple):
    """The norm between the convolutions, with the arguments of torch.nn.functional.batch_norm. training: normalise by the
    batch's moments, and move the running ones (where given) towards them, in place.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _blocks(matrix):
    K, N = matrix.shape
    padded = torch.nn.functional.pad(matrix.to(torch.float32), (0, -N % _BLOCK, 0, -K % _BLOCK))
    return padded.view(-(-K // _BLOCK), _BLOCK, -(-N // _BLOCK), _BLOCK).transpose(1, 2).contiguous()


def _channels_last(t):
    return t if t is None or t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def _new(x, shape, dtype=None):
    N, C, H, W = shape
    return x.new_empty(N, H, W, C, dtype=dtype).permute(0, 3, 1, 2)


def _wide(t):
    return None if t is None else t.to(torch.float32).contiguous()


def _hidden_size(x, depthwise, numbers):
    kernel_size = (1, 1) if depthwise is None else depthwise.shape[1:]
    stride, dilation, pad = numbers[:2], numbers[2:4], numbers[4:]
    return tuple(
        (n + pad[2 * i] + pad[2 * i + 1] - (k - 1) * dilation[i] - 1) // stride[i] + 1
        for i, (n, k) in enumerate(zip(x.shape[2:], kernel_size, strict=True))
    )


def _geometry(numbers):
    """What kernels take of numbers: strides, dilations and the padding before."""
    return (*numbers[:4], numbers[4], numbers[6])


def _run_fwd(x, depthwise, scale, shift, blocks, bias, residual, channels, numbers, f, g, impl):
    x, residual = _channels_last(x), _channels_last(residual)
    y = _new(x, (x.shape[0], channels, *_hidden_size(x, depthwise, numbers)))
    tensors = (x, _wide(depthwise), _wide(scale), _wide(shift), blocks, _wide(bias), residual)
    kernel(_OP, "fwd", impl)(*tensors, *_geometry(numbers), f, g, y)
    return y


def _partial_shapes(x, size):
    P = -(-x.shape[0] * size[0] // _ROWS)
    return (P, 2, x.shape[1]), (P, x.shape[1])


def _run_hidden(x, depthwise, scale, shift, numbers, f, want_a, impl):
    """a, or with want_a=False what moments() needs."""
    x, size = _channels_last(x), _hidden_size(x, depthwise, numbers)
    a = _new(x, (*x.shape[:2], *size)) if want_a else None
    partial, origin = (None, None) if want_a else (x.new_empty(s, dtype=torch.float32) for s in _partial_shapes(x, size))
    tensors = (x, _wide(depthwise), _wide(scale), _wide(shift))
    kernel(_OP, "hidden", impl)(*tensors, *_geometry(numbers), f, *size, a, partial, origin)
    return tuple(x.new_empty(0) if t is None else t for t in (a, partial, origin))


def _run_bwd(d, x, depthwise, scale, shift, by_h, constant, numbers, f, impl):
    x = _channels_last(x)
    partial = x.new_empty(_partial_shapes(x, d.shape[2:])[0] if by_h is None else 0, dtype=torch.float32)
    tensors = (x, _wide(depthwise), _wide(scale), _wide(shift), _wide(by_h), _wide(constant))
    kernel(_OP, "bwd", impl)(d, *tensors, *_geometry(numbers), f, partial if by_h is None else None)
    return partial


def _fwd_fake(x, depthwise, scale, shift, blocks, bias, residual, channels, numbers, f, g, impl):
    return _new(x, (x.shape[0], channels, *_hidden_size(x, depthwise, numbers)))


def _hidden_fake(x, depthwise, scale, shift, numbers, f, want_a, impl):
    size = _hidden_size(x, depthwise, numbers)
    if want_a:
        return _new(x, (*x.shape[:2], *size)), x.new_empty(0), x.new_empty(0)
    return x.new_empty(0), *(x.new_empty(s, dtype=torch.float32) for s in _partial_shapes(x, size))


def _bwd_fake(d, x, depthwise, scale, shift, by_h, constant, numbers, f, impl):
    return x.new_empty(_partial_shapes(x, d.shape[2:])[0] if by_h is None else 0, dtype=torch.float32)


_HIDDEN = "Tensor x, Tensor? depthwise, Tensor? scale, Tensor? shift"
_fwd = register(
    f"separable_conv_fwd({_HIDDEN}, Tensor blocks, Tensor? bias, Tensor? residual, SymInt channels, SymInt[] numbers, int f,"
    " int g, str impl) -> Tensor",
    launch=_run_fwd,
    fake=_fwd_fake,
)
_hidden = register(
    f"separable_conv_hidden({_HIDDEN}, SymInt[] numbers, int f, bool want_a, str impl)"
    " -> (Tensor a, Tensor partial, Tensor origin)",
    launch=_run_hidden,
    fake=_hidden_fake,
)
_bwd = register(
    f"separable_conv_bwd(Tensor(a!) d, {_HIDDEN}, Tensor? by_h, Tensor? constant, SymInt[] numbers, int f, str impl) -> Tensor",
    launch=_run_bwd,
    fake=_bwd_fake,
)


def _moments(x, depthwise, numbers, impl):
    """Mean and biased variance of h, float32: sums of 16 rows about their first pixel, put together in float64."""
    run = _run_hidden if direct(x, depthwise) else _hidden
    _, partial, origin = run(x, depthwise, None, None, numbers, 0, False, impl)
    height, width = _hidden_size(x, depthwise, numbers)
    rows, P = x.shape[0] * height, partial.shape[0]
    counts = torch.full((P, 1), _ROWS * width, dtype=torch.float64, device=x.device)
    counts[-1] -= (P * _ROWS - rows) * width
    first, second = partial.double().unbind(1)
    means = origin.double() + first / counts
    mean = (means * counts).sum(0) / (rows * width)
    total = (second - first.square() / counts + counts * (means - mean).square()).sum(0)
    return mean.float(), (total / (rows * width)).clamp_min(0).float()


class _SeparableConv(torch.autograd.Function):
    """z = pointwise * f(scale * h + shift); with `moments` (mean, rstd) scale and shift are a batch norm's, whose weight and
    bias they were made of, and gradients pass through the moments too.
    """

    @staticmethod
    def forward(ctx, x, depthwise, weight, bias, pointwise, moments, numbers, f, impl):
        scale, shift = weight, bias
        if moments is not None:
            mean, rstd = moments
            scale = rstd if weight is None else weight * rstd
            shift = -mean * scale if bias is None else bias - mean * scale
        ctx.numbers, ctx.f, ctx.impl, ctx.moments = numbers, f, impl, moments
        ctx.save_for_backward(x, depthwise, weight, bias, pointwise, scale, shift)
        run = _run_fwd if direct(x, depthwise, pointwise) else _fwd
        blocks = _blocks(pointwise.detach().t())
        return run(x, depthwise, scale, shift, blocks, None, None, pointwise.shape[0], numbers, f, 0, impl)

    @staticmethod
    def backward(ctx, dz):
        if create_graph():
            return *_differentiable_gradients(ctx, dz), None, None, None, None
        x, depthwise, weight, bias, pointwise, scale, shift = ctx.saved_tensors
        plain = direct(dz, x, pointwise)
        hidden, back = (_run_hidden, _run_bwd) if plain else (_hidden, _bwd)
        J, C = pointwise.shape
        dz_pixels = _channels_last(dz).permute(0, 2, 3, 1).reshape(-1, J)
        dpointwise = None
        if ctx.needs_input_grad[4]:
            a, _, _ = hidden(x, depthwise, scale, shift, ctx.numbers, ctx.f, True, ctx.impl)
            dpointwise = (dz_pixels.t() @ a.permute(0, 2, 3, 1).reshape(-1, C)).to(pointwise.dtype)
            del a
        if not any(ctx.needs_input_grad[:4]):
            return None, None, None, None, dpointwise, None, None, None, None
        d = (dz_pixels @ pointwise.to(dz.dtype)).view(dz.shape[0], *dz.shape[2:], C).permute(0, 3, 1, 2)
        sums = back(d, x, depthwise, scale, shift, None, None, ctx.numbers, ctx.f, ctx.impl).double().sum(0)
        dshift, dscale = sums[0], sums[1]
        if ctx.moments is not None:
            mean, rstd = (t.double() for t in ctx.moments)
            dscale = rstd * (dscale - mean * dshift)
            n = max(d.numel() // max(C, 1), 1)
            by_h = -scale * rstd * dscale / n
            constant = -scale * dshift / n - by_h * mean
            back(d, x, depthwise, scale, shift, by_h, constant, ctx.numbers, ctx.f, ctx.impl)
            scale = None
        dx, ddepthwise = _hidden_gradients(ctx, d, x, depthwise, scale)
        return (
            dx,
            ddepthwise,
            None if weight is None else dscale.to(weight.dtype),
            None if bias is None else dshift.to(bias.dtype),
            dpointwise,
            *(None,) * 4,
        )


def _hidden_gradients(ctx, d, x, depthwise, scale):
    """Of x and the depthwise weights from d, the gradient of scale * h (of h where scale is None)."""
    need_x, need_weight = ctx.needs_input_grad[:2]
    if depthwise is None:
        by = d if scale is None else d * scale.view(1, -1, 1, 1).to(d.dtype)
        return by if need_x else None, None
    stride, dilation, pad = ([1, *ctx.numbers[i : i + 2]] for i in (0, 2, 4))
    scaled = _wide(depthwise if scale is None else depthwise * scale.view(-1, 1, 1))
    pad = [0, 0, *ctx.numbers[4:]]
    args = (d.unsqueeze(2), x.unsqueeze(2), scaled.unsqueeze(1), stride, dilation, pad, need_x, need_weight, ctx.impl)
    dx, dweight, _ = torch.ops.mlcore.depthwise_conv_bwd(*args)
    if need_weight:
        dweight = dweight.squeeze(1) if scale is None else dweight.squeeze(1) * scale.view(-1, 1, 1)
    return dx.squeeze(2) if need_x else None, dweight.to(depthwise.dtype) if need_weight else None


def _differentiable_gradients(ctx, dz):
    """Gradients with a graph, for create_graph=True: the reference's, which differentiates without end."""
    tensors = ctx.saved_tensors[:5]
    with torch.enable_grad():
        z = _reference(*tensors, ctx.moments, ctx.numbers, ctx.f)
        wanted = [(i, t) for i, t in enumerate(tensors) if ctx.needs_input_grad[i]]
        found = torch.autograd.grad(z, [t for _, t in wanted], dz, create_graph=True)
    grads = dict(zip((i for i, _ in wanted), found, strict=True))
    return tuple(grads.get(i) for i in range(5))


def _reference(x, depthwise, weight, bias, pointwise, moments, numbers, f):
    """z as _SeparableConv has it, in plain torch; moments is (mean, rstd), taken again with their graph, or None."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = ref.hidden(x.to(wide), None if depthwise is None else depthwise.to(wide), numbers[:2], numbers[2:4], numbers[4:])
    if moments is not None:
        mean, variance = ref.batch_norm_moments(h)
        eps = moments[1].to(wide).pow(-2).sub(variance).detach()
        rstd = (variance + eps).rsqrt()
        scale = rstd if weight is None else weight.to(wide) * rstd
        bias = -mean * scale if bias is None else bias.to(wide) - mean * scale
        weight = scale
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return ref.finish(h, weight, bias, pointwise.to(wide), None, f, 0, None).to(x.dtype)


def _pair(name, value, least):
    values = (value, value) if isinstance(value, (int, torch.SymInt)) else tuple(value)
    if len(values) != 2 or any(not isinstance(v, (int, torch.SymInt)) or v < least for v in values):
        raise ValueError(f"separable_conv2d: {name} must be an integer >= {least}, or 2 of them; got {value!r}")
    return values


def _numbers(x, depthwise_weight, stride, padding, dilation):
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    size = (1, 1) if depthwise_weight is None else depthwise_weight.shape[2:]
    if padding == "same" and stride != (1, 1):
        raise ValueError(f'separable_conv2d: padding="same" needs stride 1; got {stride}')
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f'separable_conv2d: padding must be "same", "valid", or numbers; got {padding!r}')
    if padding == "same":
        totals = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
        pad = [n for t in totals for n in (t // 2, t - t // 2)]
    else:
        pad = [n for p in _pair("padding", 0 if padding == "valid" else padding, 0) for n in (p, p)]
    for i, axis in enumerate("HW"):
        span, have = (size[i] - 1) * dilation[i] + 1, x.shape[2 + i] + pad[2 * i] + pad[2 * i + 1]
        if have < span:
            raise ValueError(f"separable_conv2d: the kernel spans {span} along {axis}, where x with its padding has {have}")
    return (*stride, *dilation, *pad)


def _code(name, activation):
    if activation not in ref.ACTIVATIONS:
        allowed = ", ".join(map(repr, ref.ACTIVATIONS))
        raise ValueError(f"separable_conv2d: {name} must be one of {allowed}; got {activation!r}")
    return ref.ACTIVATIONS[activation]


def _check(x, depthwise_weight, pointwise_shape, depthwise_bias, pointwise_bias, norm, residual):
    op = "separable_conv2d"
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point tensor (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    C = hidden = x.shape[1]
    if depthwise_weight is not None:
        shape = depthwise_weight.shape
        if len(shape) != 4 or shape[1] != 1 or C == 0 or shape[0] % C or 0 in shape:
            raise ValueError(
                f"{op}: depthwise_weight must be (C * multiplier, 1, KH, KW) with C = {C} >= 1; got {tuple(shape)}"
            )
        hidden = shape[0]
    if pointwise_shape[2:] not in ((), (1, 1)) or pointwise_shape[1:2] != (hidden,) or 0 in pointwise_shape:
        raise ValueError(f"{op}: pointwise_weight must be (J, {hidden}, 1, 1); got {tuple(pointwise_shape)}")
    vectors = [("depthwise_bias", depthwise_bias, hidden), ("pointwise_bias", pointwise_bias, pointwise_shape[0])]
    vectors += [] if norm is None else [(f"norm.{n}", getattr(norm, n), hidden) for n in norm._fields[:4]]
    for name, t, size in vectors:
        if t is not None and t.shape != (size,):
            raise ValueError(f"{op}: {name} must have shape ({size},); got {tuple(t.shape)}")
    if norm is not None and not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{op}: norm needs running_mean and running_var where it is not training")
    tensors = [("residual", residual, (x.dtype,)), ("depthwise_weight", depthwise_weight, (x.dtype, torch.float32))]
    for name, t, dtypes in tensors:
        if t is not None and (t.dtype not in dtypes or t.device != x.device):
            raise ValueError(f"{op}: {name} must be {dtypes[0]} as x, on {x.device}; got {t.dtype} on {t.device}")


def _fold(norm, depthwise_bias):
    """scale and shift of a norm with fixed moments, and of the bias before it."""
    if norm is None:
        return None, depthwise_bias
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else norm.weight * scale
    mean = norm.running_mean if depthwise_bias is None else norm.running_mean - depthwise_bias
    return scale, -mean * scale if norm.bias is None else norm.bias - mean * scale


def _batch_moments(x, depthwise, norm, depthwise_bias, numbers, backend):
    """(mean, rstd) of this batch's h; moves the running moments."""
    n = x.shape[0] * _hidden_size(x, depthwise, numbers)[0] * _hidden_size(x, depthwise, numbers)[1]
    if n <= 1:
        raise ValueError(f"separable_conv2d: a training norm needs more than one value a channel; got {n}")
    with torch.no_grad():
        if backend == "reference":
            wide = torch.promote_types(x.dtype, torch.float32)
            h = ref.hidden(
                x.to(wide), None if depthwise is None else depthwise.to(wide), numbers[:2], numbers[2:4], numbers[4:]
            )
            mean, variance = ref.batch_norm_moments(h)
        else:
            mean, variance = _moments(x.detach(), None if depthwise is None else depthwise.detach(), numbers, backend)
        if norm.running_mean is not None:
            norm.running_mean.lerp_(
                (mean if depthwise_bias is None else mean + depthwise_bias).to(norm.running_mean.dtype), norm.momentum
            )
        if norm.running_var is not None:
            norm.running_var.lerp_((variance * (n / (n - 1))).to(norm.running_var.dtype), norm.momentum)
        return mean, (variance + norm.eps).rsqrt()


def separable_conv2d(
    x: torch.Tensor,
    depthwise_weight: torch.Tensor | None,
    pointwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None = None,
    pointwise_bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | str | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    norm: BatchNorm | None = None,
    activation: str | None = None,
    pointwise_activation: str | None = None,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """A depthwise and a pointwise convolution in one pass (the block of MobileNet, Howard et al. 2017):
    pointwise_activation(pointwise(activation(norm(depthwise(x))))) + residual. What the depthwise convolution makes is never
    kept: a strip of it is multiplied while it is in the cache, and backward computes it again.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16 (float64 and other devices: the reference). channels_last is native; other
            layouts are copied to it. A multiplier makes a copy of x with repeated channels.
        depthwise_weight: (C * multiplier, 1, KH, KW), or None: a pointwise convolution alone.
        pointwise_weight: (J, C * multiplier, 1, 1). It is packed in every call; PackedSeparable does so once.
        depthwise_bias, pointwise_bias: (C * multiplier), (J). A training norm cancels depthwise_bias: it moves running_mean and
            gets no gradient.
        stride, padding, dilation: as depthwise_conv2d has them, zeros outside; padding may be "same" (stride 1) or "valid".
        norm: a BatchNorm between the convolutions; with training=True it takes the batch's moments.
        activation, pointwise_activation: None, "relu", "relu6" or "silu".
        residual: (N, J, Ho, Wo), added last.
        impl: "cpu" or "reference"; None chooses (see mlcore.explain, op "separable_conv").

    Returns:
        y (N, J, Ho, Wo) in x's dtype, channels_last. Differentiable; second derivatives go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    x, depthwise_weight, pointwise_weight, residual = autocast(x.device.type, x, depthwise_weight, pointwise_weight, residual)
    shape = tuple(pointwise_weight.shape)
    _check(x, depthwise_weight, shape, depthwise_bias, pointwise_bias, norm, residual)
    numbers = _numbers(x, depthwise_weight, stride, padding, dilation)
    f, g = _code("activation", activation), _code("pointwise_activation", pointwise_activation)
    backend = choose(_OP, reference_if_transformed("separable_conv2d", impl), x)
    depthwise = None if depthwise_weight is None else depthwise_weight.squeeze(1)
    if depthwise is None:  # then stride and padding are torch's, with their gradients
        top, bottom, left, right = numbers[4:]
        x = torch.nn.functional.pad(x, (left, right, top, bottom)) if any(numbers[4:]) else x
        x, numbers = x[:, :, :: numbers[0], :: numbers[1]], (1, 1, 1, 1, 0, 0, 0, 0)
    elif depthwise.shape[0] != x.shape[1]:
        x = x.repeat_interleave(depthwise.shape[0] // x.shape[1], 1)
    training = norm is not None and norm.training
    moments = _batch_moments(x, depthwise, norm, depthwise_bias, numbers, backend) if training else None
    scale, shift = (norm.weight, norm.bias) if training else _fold(norm, depthwise_bias)
    matrix = pointwise_weight.reshape(shape[:2])
    if backend == "reference":
        return _finish(_reference(x, depthwise, scale, shift, matrix, moments, numbers, f), pointwise_bias, g, residual)
    if needs_grad(x, depthwise, scale, shift, matrix):
        z = _SeparableConv.apply(x, depthwise, scale, shift, matrix, moments, numbers, f, backend)
        return _finish(z, pointwise_bias, g, residual)
    if training:
        mean, rstd = moments
        scale = rstd if scale is None else scale * rstd
        shift = -mean * scale if shift is None else shift - mean * scale
    run = _run_fwd if direct(x, depthwise, residual) else _fwd
    kept = (x, depthwise, scale, shift, _blocks(matrix.t()))
    if needs_grad(pointwise_bias, residual):  # of these alone: the rest is a constant
        return _finish(run(*kept, None, None, shape[0], numbers, f, 0, backend), pointwise_bias, g, residual)
    return run(*kept, pointwise_bias, residual, shape[0], numbers, f, g, backend)


def _finish(z, bias, g, residual):
    y = ref.activate(z if bias is None else z + bias.view(1, -1, 1, 1).to(z.dtype), g)
    return y if residual is None else y + residual


class PackedSeparable:
    """separable_conv2d with everything that inference knows beforehand done once: both norms folded into the weights, the
    pointwise ones packed. Without gradients, on the CPU.

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
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        norm: BatchNorm | None = None,
        pointwise_norm: BatchNorm | None = None,
        activation: str | None = None,
        pointwise_activation: str | None = None,
    ) -> None:
        if any(n is not None and n.training for n in (norm, pointwise_norm)):
            raise ValueError("PackedSeparable: norms must have fixed moments; got training=True")
        with torch.no_grad():
            self._scale, self._shift = (_wide(t) for t in _fold(norm, depthwise_bias))
            scale, bias = _fold(pointwise_norm, pointwise_bias)
            matrix = pointwise_weight.reshape(pointwise_weight.shape[:2]).float()
            self._blocks = _blocks((matrix if scale is None else matrix * scale[:, None]).t())
            self._bias, self._depthwise = _wide(bias), None
            if depthwise_weight is not None:
                kernel_weight = _wide(depthwise_weight).squeeze(1)
                self._depthwise = kernel_weight if self._scale is None else kernel_weight * self._scale[:, None, None]
                self._scale = None
        self._channels, self._hidden = pointwise_weight.shape[:2]
        self._words = (stride, padding, dilation)
        self._f, self._g = _code("activation", activation), _code("pointwise_activation", pointwise_activation)
        self._kernel, self._geometries = kernel(_OP, "fwd", "cpu"), {}

    def _geometry(self, x):
        found = self._geometries.get(x.shape)
        if found is None:
            multiplier = self._hidden // max(x.shape[1], 1)
            if x.dim() != 4 or multiplier * x.shape[1] != self._hidden or (multiplier != 1 and self._depthwise is None):
                raise ValueError(f"separable_conv2d: x must be (N, C, H, W) with C of the weights; got {tuple(x.shape)}")
            weight = None if self._depthwise is None else self._depthwise.unsqueeze(1)
            numbers = _numbers(x, weight, *self._words)
            size = (x.shape[0], self._channels, *_hidden_size(x, self._depthwise, numbers))
            found = self._geometries[x.shape] = multiplier, _geometry(numbers), size
        return found

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if needs_grad(x, residual):
            raise ValueError("PackedSeparable: it has no gradients; call it under torch.no_grad(), or separable_conv2d")
        multiplier, geometry, size = self._geometry(x)
        if multiplier != 1:
            x = x.repeat_interleave(multiplier, 1)
        x, residual = _channels_last(x), _channels_last(residual)
        y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        tensors = (x, self._depthwise, self._scale, self._shift, self._blocks, self._bias, residual)
        self._kernel(*tensors, *geometry, self._f, self._g, y)
        return y
