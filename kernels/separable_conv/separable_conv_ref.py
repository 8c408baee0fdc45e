"""separable_conv in plain torch: the oracle of the tests and the fallback for dtypes and devices without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Names and codes of f and g.
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3}
_FUNCTIONS = (lambda x: x, F.relu, F.relu6, F.silu)


def activate(x, code):
    return _FUNCTIONS[code](x)


def hidden(x, depthwise, stride, dilation, pad):
    """h of separable_conv.h: depthwise (C, KH, KW) or None, pad (top, bottom, left, right)."""
    if depthwise is None:
        return F.pad(x, (pad[2], pad[3], pad[0], pad[1]))[:, :, :: stride[0], :: stride[1]]
    padded = F.pad(x, (pad[2], pad[3], pad[0], pad[1]))
    if padded.is_cpu:
        padded = padded.contiguous()
    return F.conv2d(padded, depthwise[:, None], None, stride, 0, dilation, x.shape[1])


def finish(h, scale, shift, pointwise, bias, f, g, residual):
    """y from h; pointwise (J, C), or None for a."""
    channels = (1, -1, 1, 1)
    a = h if scale is None else h * scale.view(channels)
    a = activate(a if shift is None else a + shift.view(channels), f)
    if pointwise is None:
        return a
    y = activate(F.conv2d(a, pointwise[:, :, None, None], bias), g)
    return y if residual is None else y + residual


def separable_conv(x, depthwise, scale, shift, pointwise, bias, residual, stride, dilation, pad, f, g):
    """The equations of separable_conv.h, computed in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, depthwise, scale, shift, pointwise, bias, residual = (
        None if t is None else t.to(wide) for t in (x, depthwise, scale, shift, pointwise, bias, residual)
    )
    h = hidden(x_, depthwise, stride, dilation, pad)
    return finish(h, scale, shift, pointwise, bias, f, g, residual).to(x.dtype)


def batch_norm_moments(h):
    """Mean and (biased) variance of h over everything but channels."""
    return h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
