"""Pooling as the lectures have it: the maximum, the mean or the minimum of a window, by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class MinPool2d(nn.MaxPool2d):
    """The smallest element of each window: torch.nn.MaxPool2d's signature, padded with +inf."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.return_indices:
            out, indices = super().forward(-input)
            return -out, indices
        return -F.max_pool2d(-input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


_KINDS = {"max": nn.MaxPool2d, "mean": nn.AvgPool2d, "min": MinPool2d}


def pool2d(kind: str, kernel_size: int, stride: int | None = None, padding: int = 0) -> nn.Module:
    """The pooling layer named kind: "max", "mean" or "min".

    Raises:
        ValueError: another kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"pool2d: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    return _KINDS[kind](kernel_size, stride, padding)
