"""Convolutions of signs: one to train, with real weights behind the signs, and the one it becomes, with one bit a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops import PackedSigns, binarize, binary_conv2d, pack_binary_conv
from ..quant import PackedWeight
from .binary_linear import PackedSignsModule, check_binary, describe


class BinaryConv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d, its parameters and its state_dict, with binary input and weights: y = conv(sign(x), sign(W)) * alpha * K
    + bias, with alpha the mean magnitude of each filter (Rastegari et al. 2016, "XNOR-Net"). Padding is 0, neither -1 nor 1.
    Gradients of sign are straight-through estimates. pack() gives the layer to serve.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as torch.nn.Conv2d's; one group, zero padding.
        activation_scale: K is the mean magnitude of x over each window, padding counted as 0; False: K is 1.
        estimator: of sign(x)'s gradient, see mlcore.ops.binarize; that of sign(W) is "clipped".

    Shape: x (B, in_channels, H, W), y (B, out_channels, Ho, Wo).

    Raises:
        ValueError: an unknown estimator.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        bias: bool = True,
        *,
        activation_scale: bool = False,
        estimator: str = "clipped",
        device=None,
        dtype=None,
    ) -> None:
        where = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, **where)
        check_binary("BinaryConv2d", True, activation_scale, estimator)
        self.activation_scale, self.estimator = activation_scale, estimator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, geometry = binarize(self.weight, "clipped").to(wide.dtype), (self.stride, self.padding, self.dilation)
        y = F.conv2d(binarize(wide, self.estimator), weight, None, *geometry) * self.scale[:, None, None]
        if self.activation_scale:
            box = wide.new_full((1, 1, *self.kernel_size), 1 / (self.kernel_size[0] * self.kernel_size[1]))
            y = y * F.conv2d(wide.abs().mean(-3, keepdim=True), box, None, *geometry)
        return (y if self.bias is None else y + self.bias[:, None, None]).to(x.dtype)

    @property
    def scale(self) -> torch.Tensor:
        """alpha (out_channels)."""
        return self.weight.abs().mean((1, 2, 3))

    def pack(self) -> PackedBinaryConv2d:
        """The layer that computes the same with one bit a weight: bit by bit the same numbers in float32, but for
        activation_scale, whose sums are rounded in another order.
        """
        packed = pack_binary_conv(self.weight, self.scale)
        bias = None if self.bias is None else self.bias.detach().clone()
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        how = {"activation_scale": self.activation_scale, "estimator": self.estimator}
        return PackedBinaryConv2d(packed, bias, kernel_size=self.kernel_size, **geometry, **how).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


class PackedBinaryConv2d(PackedSignsModule):
    """y = conv(sign(x), sign(w)) * scale * K + bias, counted in bits (mlcore.ops.binary_conv2d). The weight is fixed, bias can
    be trained, and gradients reach x.

    Args:
        packed: mlcore.ops.pack_binary_conv(weight).
        bias: (O) or None; becomes a Parameter.
        kernel_size, stride, padding, dilation: as mlcore.ops.binary_conv2d's.
        activation_scale, estimator: as BinaryConv2d's.

    Shape: x (B, C, H, W), or PackedSigns with C features; y (B, O, Ho, Wo), or with packed_output PackedSigns of O features.

    Raises:
        ValueError: the weight isn't binary, bias has another shape, or an unknown estimator.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        activation_scale: bool = False,
        estimator: str = "clipped",
    ) -> None:
        super().__init__(packed, bias, activation_scale, estimator)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation

    def forward(self, x: torch.Tensor | PackedSigns, packed_output: bool = False) -> torch.Tensor | PackedSigns:
        geometry = self.stride, self.padding, self.dilation
        return binary_conv2d(x, self.packed, self.bias, *geometry, kernel_size=self.kernel_size, **self.how(x, packed_output))

    def extra_repr(self) -> str:
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        return f"{self.packed.shape[0]} channels, {geometry}, bias={self.bias is not None}, {describe(self)}"
