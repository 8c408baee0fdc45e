"""binary_linear in plain torch: the oracle of the tests and the fallback for dtypes and devices without a kernel."""

from __future__ import annotations


def binary_linear(b, weight_signs, scale, row_scale, bias, dtype):
    """The equation of binary_linear.h for b (..., K) and weight_signs (N, K) of -1 and 1, with its roundings."""
    y = (b @ weight_signs.to(b.dtype).T) * scale.to(b.dtype)
    if row_scale is not None:
        y = y * row_scale.to(b.dtype)[..., None]
    if bias is not None:
        y = y + bias.to(b.dtype)
    return y.to(dtype)
