"""Depthwise convolutions as layers: torch.nn.Conv1d/2d/3d's signatures and state_dicts."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops

# Subclasses without state of their own: parameters, initialisation, padding modes and repr are torch's, and an existing
# layer can become one by its class alone (mlcore.accelerate).


def _groups(name, in_channels, out_channels, groups):
    if groups not in (None, in_channels):
        raise ValueError(f"{name}: groups must be in_channels = {in_channels}, or left out; got {groups}")
    return in_channels, in_channels if out_channels is None else out_channels


def _padding(layer, mode):
    # torch keeps "same" as a word; with another mode it has already been turned into numbers of torch.nn.functional.pad.
    if mode == "zeros":
        return layer.padding
    reversed_pairs = layer._reversed_padding_repeated_twice
    pairs = list(zip(reversed_pairs[::2], reversed_pairs[1::2], strict=True))
    return tuple(reversed(pairs))


class _Depthwise:
    def __init__(
        self,
        in_channels,
        out_channels=None,
        kernel_size=3,
        stride=1,
        padding=0,
        dilation=1,
        groups=None,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
    ) -> None:
        groups, out_channels = _groups(type(self).__name__, in_channels, out_channels, groups)
        args = (stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, kernel_size, *args, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padding = _padding(self, self.padding_mode)
        mode = {"padding_mode": self.padding_mode}
        return self._function(input, self.weight, self.bias, self.stride, padding, self.dilation, **mode)


class DepthwiseConv1d(_Depthwise, nn.Conv1d):
    """torch.nn.Conv1d with groups = in_channels, computed by mlcore.ops.depthwise_conv1d; out_channels is a multiple of
    in_channels, and in_channels where it is left out.
    """

    _function = staticmethod(ops.depthwise_conv1d)


class DepthwiseConv2d(_Depthwise, nn.Conv2d):
    """torch.nn.Conv2d with groups = in_channels, computed by mlcore.ops.depthwise_conv2d; out_channels is a multiple of
    in_channels, and in_channels where it is left out.
    """

    _function = staticmethod(ops.depthwise_conv2d)


class DepthwiseConv3d(_Depthwise, nn.Conv3d):
    """torch.nn.Conv3d with groups = in_channels, computed by mlcore.ops.depthwise_conv3d; out_channels is a multiple of
    in_channels, and in_channels where it is left out.
    """

    _function = staticmethod(ops.depthwise_conv3d)
