"""Numbers of a convolution as torch's users give them: checked, and one for each dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def each(op: str, name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """`value` as one integer a dimension."""
    values = (value,) * dims if isinstance(value, (int, torch.SymInt)) else tuple(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or any(not isinstance(v, (int, torch.SymInt)) or v < least for v in values):
        raise ValueError(f"{op}: {name} must be an integer >= {least}, or {dims} of them; got {value!r}")
    return values


def _padding(op, value, kernel_size, stride, dilation):
    dims = len(kernel_size)
    if value == "valid":
        return (0,) * (2 * dims)
    if value == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f'{op}: padding="same" needs stride 1; got {tuple(stride)}')
        totals = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple(n for t in totals for n in (t // 2, t - t // 2))
    if isinstance(value, str):
        raise ValueError(f'{op}: padding must be "same", "valid", or numbers; got {value!r}')
    if not isinstance(value, (int, torch.SymInt)) and any(isinstance(v, Sequence) for v in value):
        if len(value) != dims:
            raise ValueError(f"{op}: padding must have {dims} pairs (before, after); got {value!r}")
        return tuple(n for v in value for n in each(op, "padding", v, 2, 0))
    return tuple(n for p in each(op, "padding", value, dims, 0) for n in (p, p))


def geometry(op: str, size, kernel_size, stride, padding, dilation) -> tuple[tuple, tuple, tuple]:
    """(stride, dilation, padding) of a convolution over an image of `size`, all with one number a dimension but padding, which
    has (before, after) of each in a row. Raises ValueError where one breaks a rule or the kernel doesn't fit.

    padding: an integer, one a dimension, a pair (before, after) a dimension, "same" (stride 1) or "valid".
    """
    dims = len(kernel_size)
    stride, dilation = each(op, "stride", stride, dims, 1), each(op, "dilation", dilation, dims, 1)
    pad = _padding(op, padding, kernel_size, stride, dilation)
    axes = "L" if dims == 1 else "DHW"[3 - dims :]
    for axis, n, k, d, before, after in zip(axes, size, kernel_size, dilation, pad[::2], pad[1::2], strict=True):
        span, have = (k - 1) * d + 1, n + before + after
        if have < span:
            raise ValueError(f"{op}: the kernel spans {span} along {axis}, where x with its padding has {have}")
    return stride, dilation, pad
