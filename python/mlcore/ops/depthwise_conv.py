"""depthwise_conv: registration and the public functions. The equations are in kernels/depthwise_conv/depthwise_conv.h.

One op serves one, two and three dimensions: tensors get the absent ones, of size 1, as views; but D may be missing, so that the
commonest call needs none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .._backend import choose
from .._registry import autocast, create_graph, direct, graph_gradients, kernel, needs_grad, reference_if_transformed, register
from ..kernels.depthwise_conv import depthwise_conv_ref
from ._geometry import geometry

_OP = "depthwise_conv"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MODES = ("zeros", "reflect", "replicate", "circular")
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _channels_last(x) -> bool:
    """True where x (N, C, [D,] H, W) is served with C contiguous: then so are the results."""
    return x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[-1] <= 1 or x.stride(-1) != 1)


def _laid_out(t, channels_last: bool):
    """t with unit stride in C or in W; a copy only where the strides force one."""
    if channels_last:
        return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous(memory_format=_LAST[t.dim()])
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _new(x, shape, channels_last: bool, dtype=None):
    if not channels_last:
        return x.new_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=_LAST[len(shape)])


def _output_shape(x, weight, stride, dilation, pad):
    at = 5 - x.dim()  # the first dimension of stride, dilation and pad that x has
    sizes = [
        (n + pad[2 * d] + pad[2 * d + 1] - (weight.shape[d + 1] - 1) * dilation[d] - 1) // stride[d] + 1
        for d, n in enumerate(x.shape[2:], at)
    ]
    return (x.shape[0], weight.shape[0], *sizes)


def _wide(t):
    return None if t is None else t.to(torch.float32).contiguous()


def _native(pass_name, impl, *tensors):
    """The kernel and the tensors as it takes them: all but the CPU's ask for a D."""
    if impl != "cpu":
        tensors = tuple(t.unsqueeze(2) if t is not None and t.dim() == 4 else t for t in tensors)
    return kernel(_OP, pass_name, impl), tensors


def _run_fwd(x, weight, bias, stride, dilation, pad, impl):
    last = _channels_last(x)
    x = _laid_out(x, last)
    y = _new(x, _output_shape(x, weight, stride, dilation, pad), last)
    run, (x, out) = _native("fwd", impl, x, y)
    run(x, _wide(weight), _wide(bias), *stride, *dilation, *pad[::2], out)
    return y


def _run_bwd(dy, x, weight, stride, dilation, pad, need_x, need_params, impl):
    last = _channels_last(x)
    x, dy = _laid_out(x, last), _laid_out(dy, last)
    dx = _new(x, x.shape, last) if need_x else None
    dweight = dbias = partial = None
    if need_params:
        dweight, dbias = (x.new_empty(s, dtype=torch.float32) for s in (weight.shape, weight.shape[:1]))
        taps = weight.shape[1] * weight.shape[2] * weight.shape[3]
        pixels = dy.shape[0] * math.prod(dy.shape[2:])
        partial = x.new_empty(min(max(pixels // 256, 1), 16), taps + 1, weight.shape[0], dtype=torch.float32)
    run, (dy, x, to) = _native("bwd", impl, dy, x, dx)
    run(dy, x, _wide(weight), *stride, *dilation, *pad[::2], to, dweight, dbias, partial)
    return dx, dweight, dbias


def _fwd_fake(x, weight, bias, stride, dilation, pad, impl):
    return _new(x, _output_shape(x, weight, stride, dilation, pad), _channels_last(x))


# A schema has a fixed number of outputs: what was not asked for is an empty tensor there.
def _bwd_launch(dy, x, *args):
    return tuple(x.new_empty(0) if t is None else t for t in _run_bwd(dy, x, *args))


def _bwd_fake(dy, x, weight, stride, dilation, pad, need_x, need_params, impl):
    shapes = (weight.shape, weight.shape[:1]) if need_params else ((0,), (0,))
    dweight, dbias = (x.new_empty(s, dtype=torch.float32 if need_params else x.dtype) for s in shapes)
    return _new(x, x.shape, _channels_last(x)) if need_x else x.new_empty(0), dweight, dbias


_fwd = register(
    "depthwise_conv_fwd(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] dilation, SymInt[] pad, str impl)"
    " -> Tensor",
    launch=_run_fwd,
    fake=_fwd_fake,
)
_bwd = register(
    "depthwise_conv_bwd(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] dilation, SymInt[] pad, bool need_x,"
    " bool need_params, str impl) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    launch=_bwd_launch,
    fake=_bwd_fake,
)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, dilation, pad, impl):
        ctx.numbers = stride, dilation, pad
        ctx.impl = impl
        ctx.save_for_backward(x, weight, bias)
        return (_run_fwd if direct(x, weight, bias) else _fwd)(x, weight, bias, stride, dilation, pad, impl)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if create_graph():
            return *_differentiable_gradients(ctx, dy), None, None, None, None
        run = _run_bwd if direct(dy, x, weight) else _bwd
        dx, dweight, dbias = run(dy, x, weight, *ctx.numbers, need_x, need_weight or need_bias, ctx.impl)
        return (
            dx if need_x else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            *(None,) * 4,
        )


def _reference(x, weight, bias, stride, dilation, pad):
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if x.dim() == 5:
        return depthwise_conv_ref.depthwise_conv(x, weight, bias, stride, dilation, pairs)
    return depthwise_conv_ref.depthwise_conv(x.unsqueeze(2), weight, bias, stride, dilation, pairs).squeeze(2)


def _differentiable_gradients(ctx, dy):
    """Gradients with a graph, for create_graph=True: the reference's, which differentiates without end."""
    tensors = ctx.saved_tensors
    stride, dilation, pad = ctx.numbers
    with torch.enable_grad():
        out = _reference(*tensors, stride, dilation, pad)
        return graph_gradients(ctx.needs_input_grad, tensors, (out,), (dy,))


def _checked(dims, x, weight, bias, stride, padding, dilation, padding_mode):
    """What geometry() gives, after every argument was checked."""
    op, axes = f"depthwise_conv{dims}d", "DHW"[3 - dims :] if dims > 1 else "L"
    C = x.shape[1]
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: x must be a floating-point tensor; got {x.dtype}")
    if weight.dim() != dims + 2 or weight.shape[1] != 1 or C == 0 or weight.shape[0] % C or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight must be (C * multiplier, 1, {', '.join('K' + a for a in axes)}) with C = {C} >= 1; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype not in (x.dtype, torch.float32) or t.device != x.device):
            raise ValueError(
                f"{op}: {name} must be {x.dtype} as x, or torch.float32, on {x.device}; got {t.dtype} on {t.device}"
            )
    if padding_mode not in _MODES:
        raise ValueError(f"{op}: padding_mode must be one of {', '.join(_MODES)}; got {padding_mode!r}")
    stride, dilation, pad = geometry(op, x.shape[2:], weight.shape[2:], stride, padding, dilation)
    most = {"reflect": -1, "circular": 0}.get(padding_mode)  # a reflection leaves out the edge itself
    if most is not None:
        for size, *around in zip(x.shape[2:], pad[::2], pad[1::2], strict=True):
            if max(around) > max(size + most, 0):
                rule = "at most the size" if most == 0 else "below the size"
                raise ValueError(f"{op}: padding_mode={padding_mode!r} needs padding {rule} of x; got {max(around)} for {size}")
    return stride, dilation, pad


#: Calls of depthwise_conv2d that passed every check -> what kernels take of their numbers: strides, dilations, paddings.
_passed: dict[tuple, tuple] = {}


def _call_key(x, weight, bias, stride, padding, dilation, padding_mode):
    """What _checked() looks at, where it can be looked up; None else."""
    given = None if bias is None else (bias.shape, bias.dtype)
    key = (x.shape, x.dtype, weight.shape, weight.dtype, given, stride, padding, dilation, padding_mode)
    try:
        hash(key)
    except TypeError:  # lists of numbers
        return None
    return key


def _depthwise_conv(dims, x, weight, bias, stride, padding, dilation, padding_mode, impl):
    if dims == 2 and impl is None and direct(x, weight, bias) and x.is_cpu and not torch.is_autocast_enabled("cpu"):
        key = _call_key(x, weight, bias, stride, padding, dilation, padding_mode)
        numbers = _passed.get(key)
        if numbers is not None and weight.is_cpu and (bias is None or bias.is_cpu):
            if needs_grad(x, weight, bias):
                return _DepthwiseConv.apply(x, weight, bias, *numbers, "cpu")
            return _run_fwd(x, weight, bias, *numbers, "cpu")
    else:
        key = None
    op = f"depthwise_conv{dims}d"
    if x.dim() == dims + 1:  # no batch, as torch's convolutions take it
        out = _depthwise_conv(dims, x.unsqueeze(0), weight, bias, stride, padding, dilation, padding_mode, impl)
        return out.squeeze(0)
    if x.dim() != dims + 2:
        axes = "DHW"[3 - dims :] if dims > 1 else "L"
        raise ValueError(f"{op}: x must be (N, C, {', '.join(axes)}); got shape {tuple(x.shape)}")
    x, weight, bias = autocast(x.device.type, x, weight, bias)
    stride, dilation, pad = _checked(dims, x, weight, bias, stride, padding, dilation, padding_mode)
    if padding_mode != "zeros":  # torch's own padding, a copy
        x = F.pad(x, [n for i in reversed(range(dims)) for n in pad[2 * i : 2 * i + 2]], mode=padding_mode)
        pad = (0,) * (2 * dims)
    backend = choose(_OP, reference_if_transformed(op, impl), x)
    absent = 3 - dims
    ones = (1,) * absent
    stride, dilation = (*ones, *stride), (*ones, *dilation)
    pad = (0,) * (2 * absent) + pad
    if dims == 1:
        x = x.unsqueeze(2)
        weight = weight.unsqueeze(2)
    elif dims == 3:
        weight = weight.squeeze(1)
    if backend == "reference":
        y = _reference(x, weight, bias, stride, dilation, pad)
    elif needs_grad(x, weight, bias):
        y = _DepthwiseConv.apply(x, weight, bias, stride, dilation, pad, backend)
    else:
        y = (_run_fwd if direct(x, weight, bias) else _fwd)(x, weight, bias, stride, dilation, pad, backend)
    if key is not None and padding_mode == "zeros" and backend == "cpu":
        if len(_passed) >= 1024:
            _passed.clear()
        _passed[key] = (stride, dilation, pad)
    return y.squeeze(2) if dims == 1 else y


_DOC = """Depthwise convolution in {dims} dimension{s}: torch.nn.functional.conv{dims}d(..., groups=C), cross-correlation of
    each channel with its own filters. Sums are float32. y lies in memory as x does: contiguous and channels_last are both
    native.

    Args:
        x: (N, C, {axes}) or (C, {axes}), float32, bfloat16 or float16 (float64 and other devices: the reference). Any strides;
            a copy is made where neither the last dimension nor C is contiguous.
        weight: (C * multiplier, 1, {kernel}), x's dtype or float32; output channel i filters channel i // multiplier.
        bias: (C * multiplier), x's dtype or float32.
        stride, dilation: an integer, or one a dimension.
        padding: an integer, one a dimension, a pair (before, after) a dimension, "same" (stride 1) or "valid".
        padding_mode: "zeros", "reflect", "replicate" or "circular"; all but zeros make a padded copy of x.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain, op "depthwise_conv").

    Returns:
        y (N, C * multiplier, ...) in x's dtype. Differentiable; second derivatives go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """


def _public(dims: int, axes: str):
    def depthwise_conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence = 0,
        dilation: int | Sequence[int] = 1,
        *,
        padding_mode: str = "zeros",
        impl: str | None = None,
    ) -> torch.Tensor:
        return _depthwise_conv(dims, x, weight, bias, stride, padding, dilation, padding_mode, impl)

    kernel_shape = ", ".join(f"K{a}" for a in axes.split(", "))
    depthwise_conv.__doc__ = _DOC.format(dims=dims, s="s" if dims > 1 else "", axes=axes, kernel=kernel_shape)
    depthwise_conv.__name__ = depthwise_conv.__qualname__ = f"depthwise_conv{dims}d"
    return depthwise_conv


depthwise_conv1d, depthwise_conv2d, depthwise_conv3d = _public(1, "L"), _public(2, "H, W"), _public(3, "D, H, W")
