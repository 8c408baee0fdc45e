"""Depthwise-separable and pointwise convolutions with their norms and activations, as blocks that run as one op."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from .depthwise_conv import DepthwiseConv2d
from .quant_conv2d import QuantConv2d, filtered, norm_affine, serves_filter

_ACTIVATIONS = {nn.Identity: None, nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PATCH = 64  # numbers of a filter up to which a convolution counts as narrow


def _batch_norm(norm, training):
    """ops.BatchNorm of a torch.nn.BatchNorm2d, None of an Identity."""
    if type(norm) is nn.Identity:
        return None
    if training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    moments = (norm.running_mean, norm.running_var)
    return ops.BatchNorm(norm.weight, norm.bias, *moments, training, norm.momentum, norm.eps)


def _stock(conv):
    """Whether conv is a convolution by its float weight and nothing else: low-bit layers and their training aren't."""
    return type(conv) in (nn.Conv2d, DepthwiseConv2d)


def _hooked(*modules):
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def _narrow(conv):
    return _stock(conv) and conv.weight[0].numel() <= _PATCH and conv.groups == 1 and conv.padding_mode == "zeros"


def _takes_batch(norm):
    return type(norm) is nn.BatchNorm2d and (norm.training or norm.running_mean is None)


def _fusable(norm, activation):
    """Whether the op knows both; a cumulative moving average (momentum None) is left to torch."""
    known = type(norm) is nn.Identity or (type(norm) is nn.BatchNorm2d and norm.momentum is not None)
    return known and type(activation) in _ACTIVATIONS and not _hooked(norm, activation)


class _Packed:
    """A block's ops.PackedSeparable, for as long as its tensors don't change. Writes that torch doesn't count (through .data,
    NumPy or within inference mode) are seen after the block's next train() or eval().
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self):
        self._made_of = self._value = self._kept = None

    def __call__(self, block, make):
        layers = block._modules.values()  # changes of their tensors show in versions, identities and addresses
        tensors = [t for m in layers for part in (m._parameters, m._buffers) for t in part.values() if t is not None]
        made_of = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        made_of += [(id(m), getattr(m, "eps", 0)) for m in layers]
        if made_of != self._made_of:
            self._value, self._made_of = make(), made_of
            self._kept = tensors, [t.data for t in tensors], list(layers)  # so that ids and addresses stay their own
        return self._value

    def __deepcopy__(self, memo):  # it holds nothing that can't be made again
        return _Packed()

    def __reduce__(self):
        return _Packed, ()


def _inference(x):
    """True where weights can be folded and kept: on the CPU, and nobody records or transforms the call."""
    return (
        x.is_cpu
        and x.dtype in _FLOATS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def _chainable(conv, norm, activation):
    """Whether a convolution and what is behind it fold into packed weights in inference."""
    known = _stock(conv) and conv.padding_mode == "zeros" and not _takes_batch(norm)
    return known and _fusable(norm, activation)


class _Packing(nn.Module):
    """A module with self._packed."""

    def train(self, mode: bool = True):
        self._packed.forget()
        return super().train(mode)


class ConvNorm2d(_Packing, nn.Sequential):
    """Sequential(convolution, batch norm, activation) in channels_last. In training norm and activation are one op
    (mlcore.ops.batch_norm2d) behind torch's convolution; in inference everything is (mlcore.ops.PackedConv) where the
    convolution sees few channels, as a network's first one.

    forward(x (N, in_channels, H, W)) -> (N, out_channels, Ho, Wo)

    Args:
        conv: a torch.nn.Conv2d.
        norm: a torch.nn.BatchNorm2d of its channels; others run as they are.
        activation: a module; ReLU, ReLU6, SiLU and Identity are fused.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__(conv, norm, activation)
        self._packed = _Packed()

    def __getitem__(self, index):
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, norm, activation = self
        if type(norm) is not nn.BatchNorm2d or not _fusable(norm, activation) or _hooked(conv):
            return super().forward(x)
        if _takes_batch(norm):
            x = x.contiguous(memory_format=torch.channels_last)
            return ops.batch_norm2d(conv(x), _batch_norm(norm, True), activation=_ACTIVATIONS[type(activation)])
        if not _narrow(conv) or not _inference(x):
            return super().forward(x)
        return self._packed(self, self._pack)(x)

    def chain_links(self):
        """The one layer of an InferenceChain."""
        if not _chainable(*self) or type(self[1]) is not nn.BatchNorm2d or not _narrow(self[0]):
            raise LookupError(type(self).__name__)
        return [(self._pack, None)]

    def _pack(self):
        conv, norm, activation = self
        numbers = (conv.stride, conv.padding, conv.dilation)
        words = {"norm": _batch_norm(norm, False), "activation": _ACTIVATIONS[type(activation)]}
        return ops.PackedConv(conv.weight, conv.bias, *numbers, **words)


class _Block(_Packing):
    """What both blocks share: pointwise, pointwise_norm, pointwise_activation, and whether one op serves a call."""

    def _add_pointwise(self, inner, out_channels, bias, norm, activation, factory):
        self.pointwise = nn.Conv2d(inner, out_channels, 1, bias=bias, **factory)
        self.pointwise_norm = nn.Identity() if norm is None else norm(out_channels, **factory)
        self.pointwise_activation = nn.Identity() if activation is None else activation()
        self._packed = _Packed()

    def _whole(self, x):
        """True where everything runs as one op with folded weights: inference on the CPU."""
        known = _stock(self.pointwise) and not _hooked(self.pointwise) and not _takes_batch(self.pointwise_norm)
        return known and _inference(x) and _fusable(self.pointwise_norm, self.pointwise_activation)

    def _mixes(self):
        """Whether the second half folds into packed weights in inference."""
        known = _chainable(self.pointwise, self.pointwise_norm, self.pointwise_activation)
        return known and self.pointwise.groups == 1

    def _mix(self, h, residual):
        """The second half as its layers say."""
        after = self.pointwise_norm, self.pointwise_activation
        if type(self.pointwise) is QuantConv2d and all(type(m) is nn.Identity for m in after) and not _hooked(self.pointwise):
            return self.pointwise(h, residual)
        return self._finish(self.pointwise(h), residual)

    def _finish(self, z, residual):
        y = self.pointwise_activation(self.pointwise_norm(z))
        return y if residual is None else y + residual

    def _trained(self):
        """The op's arguments behind the second convolution where it serves its norm by the batch's moments; None else."""
        if _hooked(self.pointwise) or not _stock(self.pointwise) or not _takes_batch(self.pointwise_norm):
            return None
        if not _fusable(self.pointwise_norm, self.pointwise_activation):
            return None
        norm, g = _batch_norm(self.pointwise_norm, True), _ACTIVATIONS[type(self.pointwise_activation)]
        return {"pointwise_norm": norm, "pointwise_activation": g}


class PointwiseConv2d(_Block):
    """A 1x1 convolution with batch norm and an activation as one op, mlcore.ops.separable_conv2d without its depthwise half; in
    inference with the norm folded into packed weights.

    forward(x (N, in_channels, H, W), residual=None) -> (N, out_channels, H, W), plus the residual.

    Args:
        in_channels, out_channels, bias: of the convolution.
        norm: a module's constructor that takes the channels, or None.
        activation: a module's constructor, or None for none.
    """

    def __init__(
        self, in_channels, out_channels, bias=False, norm=nn.BatchNorm2d, activation=nn.ReLU, device=None, dtype=None
    ) -> None:
        super().__init__()
        self._add_pointwise(in_channels, out_channels, bias, norm, activation, {"device": device, "dtype": dtype})

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self._whole(x):
            return self._packed(self, self._pack)(x, residual)
        words = self._trained()
        if words is None:
            return self._mix(x, residual)
        return ops.separable_conv2d(x, None, self.pointwise.weight, None, self.pointwise.bias, **words, residual=residual)

    def chain_links(self):
        """The one layer of an InferenceChain."""
        if not self._mixes():
            raise LookupError(type(self).__name__)
        return [(self._pack, None)]

    def _pack(self):
        norm, g = _batch_norm(self.pointwise_norm, False), _ACTIVATIONS[type(self.pointwise_activation)]
        weights = (None, self.pointwise.weight, None, self.pointwise.bias)
        return ops.PackedSeparable(*weights, pointwise_norm=norm, pointwise_activation=g)


class DepthwiseSeparableConv2d(_Block):
    """The block of MobileNet (Howard et al. 2017): a depthwise convolution that filters each channel, then a pointwise one
    that mixes them, each followed by batch norm and an activation. One op (mlcore.ops.separable_conv2d) where it knows the
    norms and the activations; in inference with all norms folded.

    forward(x (N, in_channels, H, W), residual=None) -> (N, out_channels, Ho, Wo), plus x itself with residual=True, or plus the
    tensor that is given.

    Args:
        in_channels, out_channels: of the block.
        kernel_size, stride, dilation: of the depthwise convolution.
        padding: of the depthwise convolution; None keeps the size at stride 1 and an odd kernel: dilation * (k - 1) // 2.
        multiplier: filters a channel.
        bias: of both convolutions; the norms make it redundant.
        norm: a module's constructor that takes the channels, or None.
        activation: a module's constructor, or None for none.
        residual: add x; in_channels must be out_channels and stride 1.
        pointwise_activation: of the second convolution; "same" as activation.

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
        pointwise_activation="same",
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
        self.depthwise = DepthwiseConv2d(in_channels, inner, kernel_size, stride, padding, dilation, bias=bias, **factory)
        self.depthwise_norm = nn.Identity() if norm is None else norm(inner, **factory)
        self.depthwise_activation = nn.Identity() if activation is None else activation()
        last = activation if pointwise_activation == "same" else pointwise_activation
        self._add_pointwise(inner, out_channels, bias, norm, last, factory)
        self.residual = residual

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None and self.residual:
            residual = x
        conv, hooked = self.depthwise, _hooked(self.depthwise, self.pointwise)
        if (
            hooked
            or not _stock(conv)
            or not _stock(self.pointwise)
            or not _fusable(self.depthwise_norm, self.depthwise_activation)
        ):
            return self._mix(self._filter(x), residual)
        training = _takes_batch(self.depthwise_norm)
        if not training and self._whole(x):
            return self._packed(self, self._pack)(x, residual)
        norm = _batch_norm(self.depthwise_norm, training)
        weights = (conv.weight, self.pointwise.weight, conv.bias, self.pointwise.bias)
        numbers, f = (conv.stride, conv.padding, conv.dilation), _ACTIVATIONS[type(self.depthwise_activation)]
        words = self._trained()
        if words is None:
            return self._finish(ops.separable_conv2d(x, *weights, *numbers, norm=norm, activation=f), residual)
        return ops.separable_conv2d(x, *weights, *numbers, norm=norm, activation=f, **words, residual=residual)

    def chain_links(self):
        """The one layer of an InferenceChain, which takes a filter a channel."""
        conv = self.depthwise
        filters = _chainable(conv, self.depthwise_norm, self.depthwise_activation)
        if not filters or not conv.groups == conv.in_channels == conv.out_channels or not self._mixes():
            raise LookupError(type(self).__name__)
        return [(self._pack, 1 if self.residual else None)]

    def _filter(self, x):
        """The first half as its layers say; in one pass where the second is a low-bit layer."""
        conv, norm, activation = self.depthwise, self.depthwise_norm, self.depthwise_activation
        word = _ACTIVATIONS.get(type(activation))
        plain = _stock(conv) and not _hooked(conv) and conv.padding_mode == "zeros" and conv.groups == conv.out_channels
        if not (
            plain and _fusable(norm, activation) and not _takes_batch(norm) and serves_filter(x, conv.weight[0].numel(), word)
        ):
            return activation(norm(conv(x)))
        weight, shift = self._packed(self, self._pack_filter)
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        return filtered(x, weight, shift, conv.stride, (top, bottom, left, right), conv.dilation, word)

    def _pack_filter(self):
        conv, weight, shift = self.depthwise, self.depthwise.weight.detach().squeeze(1).float(), self.depthwise.bias
        if type(self.depthwise_norm) is nn.BatchNorm2d:
            scale, moved = norm_affine(self.depthwise_norm)
            weight, shift = weight * scale[:, None, None], moved if conv.bias is None else moved + conv.bias.float() * scale
        return weight.contiguous(), None if shift is None else shift.detach().float()

    def _pack(self):
        conv, norms = self.depthwise, (_batch_norm(n, False) for n in (self.depthwise_norm, self.pointwise_norm))
        f, g = (_ACTIVATIONS[type(a)] for a in (self.depthwise_activation, self.pointwise_activation))
        weights = (conv.weight, self.pointwise.weight, conv.bias, self.pointwise.bias, conv.stride, conv.padding, conv.dilation)
        words = dict(zip(("norm", "pointwise_norm"), norms, strict=True))
        return ops.PackedSeparable(*weights, **words, activation=f, pointwise_activation=g)
