"""A pointwise or depthwise convolution with a quantized weight."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..ops import _separable as fused
from ..ops import depthwise_conv2d, quant_linear
from ..ops.quant_linear import ACTIVATIONS
from ..quant import PackedWeight, pack
from .quant_linear import PackedLinear

_FUSED = {None: 0, "relu": 1, "relu6": 2, "silu": 3}  # the depthwise kernel's own activations
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def conv_kind(conv: nn.Conv2d) -> str | None:
    """ "pointwise", "depthwise", or None: neither."""
    if conv.kernel_size == (1, 1) and conv.groups == 1:
        return "pointwise"
    return "depthwise" if conv.groups == conv.in_channels else None


def norm_affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) of a batch norm with fixed moments, float32."""
    scale = (norm.running_var.float() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else norm.weight.float() * scale
    shift = -norm.running_mean.float() * scale
    return scale, shift if norm.bias is None else norm.bias.float() + shift


def scale_rows(packed: PackedWeight, factor: torch.Tensor) -> PackedWeight:
    """The weight with row n times factor[n]: the same codes, other scales."""
    padded = nn.functional.pad(factor.float(), (0, -len(factor) % packed.scales.shape[2])).view(len(packed.scales), 1, -1)
    return dataclasses.replace(packed, scales=(packed.scales * padded).contiguous())


def serves_filter(x: torch.Tensor, taps: int, activation: str | None) -> bool:
    """Whether filtered() takes x and is worth it: inference on the CPU with contiguous channels and up to 3 x 3 taps (7 x 7:
    0.28 ms at (1,96,56,56), 0.21 by depthwise_conv2d and ReLU6 behind it).
    """
    if taps > 9:
        return False
    plain = x.is_cpu and x.dtype in _FLOATS and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return plain and activation in _FUSED and not torch.is_autocast_enabled("cpu") and x.dim() == 4 and x.stride(1) == 1


def filtered(x, weight, shift, stride, padding, dilation, activation, residual=None) -> torch.Tensor:
    """activation(depthwise convolution + shift) + residual in one pass over x, where serves_filter() says so.
    weight (C, KH, KW) and shift (C) are float32; padding is (top, bottom, left, right)."""
    numbers = (*stride, *dilation, *padding)
    return fused.hidden(x, weight, None, shift, residual, numbers, _FUSED[activation], "cpu")


class QuantConv2d(PackedLinear):
    """torch.nn.Conv2d with a weight of 1 to 8 bits, for pointwise convolutions (kernel 1x1, groups 1) and depthwise ones
    (groups = in_channels): y = activation(convolution(x) + bias). The weight is fixed, bias can be trained, and gradients
    reach x.

    A pointwise convolution is mlcore.ops.quant_linear of the pixels: with dynamic_int8 each pixel's channels are rounded to
    127ths of their largest magnitude, the finest scale that still leaves whole sums over channels, and a pixel's bits depend
    on nothing but the pixel. A depthwise one takes x as it is, with float32 products: its sums run over pixels, which would
    have to share a scale, and rounding x takes longer than whole products would save (kernels/quant_linear/README.md).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as torch.nn.Conv2d's; the
            weight is initialized as there, then packed.
        format, group_size, symmetric: as mlcore.quant.pack's, of the weight as a matrix (out_channels, in_channels), or
            (out_channels, taps); None: one scale a filter.
        activation: None, "relu", "gelu", "gelu_tanh", "silu" or "relu6", fused.
        dynamic_int8: x is rounded to int8 by pixels; None: where the convolution is pointwise.

    Shape: x (N, C, H, W) or (C, H, W). channels_last is native; another layout of a pointwise convolution's x is copied to it
    once, and y is channels_last then too, so that layers behind it copy nothing.

    Raises:
        ValueError: neither pointwise nor depthwise; dynamic_int8 of a depthwise one; as pack and quant_linear.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size=1,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        format: str = "int8",
        group_size: int | None = None,
        symmetric: bool = True,
        activation: str | None = None,
        dynamic_int8: bool | None = None,
        device=None,
    ) -> None:
        args = (stride, padding, dilation, groups, bias, padding_mode)
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, *args, device=device)
        how = {"format": format, "group_size": group_size, "symmetric": symmetric}
        self._build_conv(conv, pack(conv.weight.flatten(1), **how), conv.bias, activation, dynamic_int8)

    def _build_conv(self, conv, packed, bias, activation, dynamic_int8, input_scale=None) -> None:
        kind = conv_kind(conv)
        if kind is None:
            got = f"{conv.kernel_size} with {conv.groups} groups of {conv.in_channels} channels"
            raise ValueError(f"QuantConv2d: the convolution must be pointwise or depthwise; got kernel {got}")
        if dynamic_int8 and kind == "depthwise":
            raise ValueError("QuantConv2d: dynamic_int8 belongs to pointwise convolutions; got a depthwise one")
        if input_scale is not None and kind == "depthwise":
            raise ValueError("QuantConv2d: input_scale belongs to pointwise convolutions; got a depthwise one")
        if activation not in ACTIVATIONS:
            names = ", ".join(map(str, ACTIVATIONS))
            raise ValueError(f"QuantConv2d: activation must be one of {names}; got {activation!r}")
        self._build(packed, bias, activation, kind == "pointwise" if dynamic_int8 is None else dynamic_int8, input_scale)
        for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            setattr(self, name, getattr(conv, name))
        self._around = tuple(conv._reversed_padding_repeated_twice)  # left, right, top, bottom
        self._kept: tuple | None = None  # of _dense()

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        conv: nn.Conv2d,
        *,
        norm: nn.BatchNorm2d | None = None,
        activation: str | None = None,
        dynamic_int8: bool | None = None,
        input_scale: torch.Tensor | None = None,
    ) -> QuantConv2d:
        """The layer with this weight, (out_channels, in_channels * taps / groups), and conv's numbers and bias. norm: a batch
        norm behind it whose fixed moments go into scales and bias.
        """
        if packed.shape != tuple(conv.weight.flatten(1).shape):
            raise ValueError(f"QuantConv2d: packed must be {tuple(conv.weight.flatten(1).shape)}; got {packed.shape}")
        bias = conv.bias
        if norm is not None:
            if norm.training or norm.running_mean is None or norm.running_var is None:
                raise ValueError("QuantConv2d: norm must have fixed moments; got one that takes the batch's")
            with torch.no_grad():
                scale, shift = norm_affine(norm)
                shift = shift if bias is None else shift + bias.float() * scale
            packed, bias = scale_rows(packed, scale), nn.Parameter(shift)
        layer = cls.__new__(cls)
        layer._build_conv(conv, packed, bias, activation, dynamic_int8, input_scale)
        return layer.train(conv.training)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, format: str = "int8", *, norm=None, activation=None, dynamic_int8=None, **how):
        """The layer with a torch.nn.Conv2d's weight packed by mlcore.quant.pack(weight, format, **how), and its own bias; norm
        and activation as from_packed has them.
        """
        packed = pack(conv.weight.flatten(1), format, **how)
        return cls.from_packed(packed, conv, norm=norm, activation=activation, dynamic_int8=dynamic_int8)

    @property
    def out_channels(self) -> int:
        return self.packed.shape[0]

    @property
    def depthwise(self) -> bool:
        return conv_kind(self) == "depthwise"

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"QuantConv2d: x must be (N, {self.in_channels}, H, W), or without N; got {tuple(x.shape)}")
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)).squeeze(0)
        return self._filter(x, residual) if self.depthwise else self._mix(x, residual)

    def _mix(self, x, residual):
        if any(self._around):
            x = nn.functional.pad(x, self._around, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        rows = x.permute(0, 2, 3, 1)
        if self.input_scale is not None:
            rows = rows * self.input_scale.to(x.dtype)
        residual = None if residual is None else residual.permute(0, 2, 3, 1)
        words = {"residual": residual, "dynamic_int8": self.dynamic_int8}
        return quant_linear(rows, self.packed, self.bias, self.activation, **words).permute(0, 3, 1, 2)

    def _filter(self, x, residual):
        weight, bias = self._dense(), self.bias
        left, right, top, bottom = self._around
        if serves_filter(x, weight[0].numel(), self.activation) and self.padding_mode == "zeros" and len(weight) == x.shape[1]:
            around = (top, bottom, left, right)
            return filtered(x, weight.squeeze(1), bias, self.stride, around, self.dilation, self.activation, residual)
        pairs, mode = ((top, bottom), (left, right)), self.padding_mode
        weight = weight.to(torch.promote_types(x.dtype, torch.float32))
        bias = bias if bias is None or bias.dtype in (x.dtype, torch.float32) else bias.to(x.dtype)
        y = depthwise_conv2d(x, weight, bias, self.stride, pairs, self.dilation, padding_mode=mode)
        y = ACTIVATIONS[self.activation](y)
        return y if residual is None else y + residual

    def _dense(self) -> torch.Tensor:
        """The depthwise weight in float32, (out_channels, 1, KH, KW); kept while the packed one is the same."""
        packed = self.packed
        if torch.compiler.is_compiling():
            return packed.dequantize().view(-1, 1, *self.kernel_size)
        now = [(t, 0 if t.is_inference() else t._version) for t in packed.tensors().values()]
        before = [] if self._kept is None else self._kept[0]
        if len(before) != len(now) or any(a is not b or m != n for (a, m), (b, n) in zip(before, now)):
            self._kept = now, packed.dequantize().view(-1, 1, *self.kernel_size)
        return self._kept[1]

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            parts += [f"{name}={getattr(self, name)}"] if getattr(self, name) != default else []
        parts += ["bias=False"] * (self.bias is None) + [f"activation={self.activation}"] * (self.activation is not None)
        return ", ".join(parts + self._format_words())
