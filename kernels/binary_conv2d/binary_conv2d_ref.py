"""binary_conv2d in plain torch: the oracle of the tests and the fallback for dtypes and devices without a kernel."""

from __future__ import annotations

import torch.nn.functional as F


def binary_conv2d(b, weight_signs, scale, pixel_scale, bias, stride, dilation, pad, dtype):
    """The equation of binary_conv2d.h for b (B, C, H, W) and weight_signs (O, C, kh, kw) of -1 and 1, with its roundings.

    pad: (before, after) along H, then along W. pixel_scale: (B, Ho, Wo) or None.
    """
    top, bottom, left, right = pad
    O, weight = len(weight_signs), weight_signs.to(b.dtype)
    filters = weight if O else weight.new_ones(1, *weight.shape[1:])  # torch takes no convolution without filters
    y = F.conv2d(F.pad(b, (left, right, top, bottom)), filters, stride=stride, dilation=dilation)[:, :O]
    y = y * scale.to(b.dtype)[:, None, None]
    if pixel_scale is not None:
        y = y * pixel_scale.to(b.dtype)[:, None]
    if bias is not None:
        y = y + bias.to(b.dtype)[:, None, None]
    return y.to(dtype)


def window_mean(scale, kernel_size, stride, dilation, pad):
    """(B, Ho, Wo): the mean of scale (B, H, W) over each window; padding counts as 0."""
    top, bottom, left, right = pad
    kh, kw = kernel_size
    wide = scale.double() if scale.is_cuda else scale  # torch's convolution of float32 may round to tf32 there
    box = wide.new_full((1, 1, kh, kw), 1 / (kh * kw))
    means = F.conv2d(F.pad(wide[:, None], (left, right, top, bottom)), box, stride=stride, dilation=dilation)
    return means[:, 0].to(scale.dtype)


def to_pixels(x):
    """(B, C, H, W) to (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def to_planes(x):
    """(B, H, W, C) to (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def pixels_to_taps(weight):
    """(O, C, kh, kw) to (O, kh * kw * C), the order of the packed weight."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def taps_to_planes(rows, C, kernel_size):
    """(O, kh * kw * C) to (O, C, kh, kw)."""
    return rows.reshape(rows.shape[0], *kernel_size, C).permute(0, 3, 1, 2)
