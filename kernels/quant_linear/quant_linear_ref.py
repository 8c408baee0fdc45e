"""quant_linear in plain torch: the oracle of the tests and the fallback for dtypes and devices without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
}


def quantize_rows(x):
    """(a, s) with x ~ a * s: a (..., K) whole numbers up to 127, s (..., 1), NaN where the row isn't finite."""
    peak = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = x.isfinite().all(-1, keepdim=True)
    usable = finite & (peak > 1e-35)
    a = torch.where(usable, (x * (127 / torch.where(usable, peak, 1.0))).round(), 0.0)
    return a, torch.where(finite, torch.where(usable, peak / 127, 0.0), torch.nan)


def round_codebook(codebook):
    """(table, step) with codebook ~ table * step: whole numbers up to 127, step (T, 1)."""
    peak = codebook.abs().amax(1, keepdim=True)
    return (codebook / torch.where(peak == 0, 1.0, peak) * 127).round(), peak / 127


def finish(y, bias, activation, residual):
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def quant_linear(x, weight, bias=None, activation=None, residual=None):
    """The equation of quant_linear.h for weights (N, K) that are already dequantized."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = finish(wide @ weight.to(wide.dtype).T, bias, activation, residual)
    return y.to(x.dtype)


def quant_linear_int8(x, values, scales, group_size, bias=None, activation=None, residual=None):
    """The same with x rounded to int8 by rows: values (N, K) whole numbers (q - z), scales (N, G)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, s = quantize_rows(wide)
    y = wide.new_zeros(*x.shape[:-1], values.shape[0])
    for g in range(scales.shape[1]):
        part = slice(g * group_size, (g + 1) * group_size)
        dot = a[..., part].double() @ values[:, part].double().T  # exact: below 2^53
        y = y + dot.to(wide.dtype) * scales[:, g].to(wide.dtype)
    return finish(y * s, bias, activation, residual).to(x.dtype)
