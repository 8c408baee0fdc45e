"""Depthwise convolutions as layers: torch.nn.Conv1d/2d/3d's signatures and state_dicts, and the separable pair of MobileNet."""

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


class DepthwiseSeparableConv2d(nn.Module):
    """The block of MobileNet (Howard et al. 2017): a depthwise convolution that filters each channel, then a pointwise one
    that mixes them, each followed by batch norm and an activation.

    forward(x (N, in_channels, H, W)) -> (N, out_channels, Ho, Wo), plus x itself with residual=True.

    Args:
        in_channels, out_channels: of the block.
        kernel_size, stride, dilation: of the depthwise convolution.
        padding: of the depthwise convolution; None keeps the size at stride 1 and an odd kernel: dilation * (k - 1) // 2.
        multiplier: filters a channel.
        bias: of both convolutions; the norms make it redundant.
        norm: a module's constructor that takes the channels, or None.
        activation: a module's constructor, or None for none.
        residual: add x; in_channels must be out_channels and stride 1.

    Raises:
        ValueError: residual with other channels or a stride.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        stride=1,
        padding=None,
        dilation=1,
        multiplier=1,
        bias=False,
        norm=nn.BatchNorm2d,
        activation=nn.ReLU,
        residual=False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if residual and (in_channels != out_channels or stride not in (1, (1, 1))):
            raise ValueError(
                "DepthwiseSeparableConv2d: residual needs in_channels = out_channels and stride 1; "
                f"got {in_channels}, {out_channels} and {stride}"
            )
        factory = {"device": device, "dtype": dtype}
        inner = in_channels * multiplier
        sizes = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
        gaps = (dilation,) * 2 if isinstance(dilation, int) else dilation
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(sizes, gaps, strict=True))

        def normed(channels):
            return nn.Identity() if norm is None else norm(channels, **factory)

        def activated():
            return nn.Identity() if activation is None else activation()

        self.depthwise = DepthwiseConv2d(in_channels, inner, kernel_size, stride, padding, dilation, bias=bias, **factory)
        self.depthwise_norm = normed(inner)
        self.depthwise_activation = activated()
        self.pointwise = nn.Conv2d(inner, out_channels, 1, bias=bias, **factory)
        self.pointwise_norm = normed(out_channels)
        self.pointwise_activation = activated()
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.depthwise_activation(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_activation(self.pointwise_norm(self.pointwise(h)))
        return x + y if self.residual else y
