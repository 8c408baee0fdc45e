"""depthwise_conv in plain torch: the oracle of the tests and the fallback for dtypes and devices without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def depthwise_conv(x, weight, bias=None, stride=(1, 1, 1), dilation=(1, 1, 1), pad=((0, 0), (0, 0), (0, 0))):
    """The equations of depthwise_conv.h, computed in float32 or, for float64 tensors, in float64.

    x (N, C, D, H, W), weight (C*M, KD, KH, KW), pad: (before, after) for each dimension.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(wide), [n for pair in reversed(pad) for n in pair])
    bias = None if bias is None else bias.to(wide)
    return F.conv3d(padded, weight[:, None].to(wide), bias, stride, 0, dilation, x.shape[1]).to(x.dtype)
