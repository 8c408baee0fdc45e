"""Layers in training for low bits: torch.nn's with their own parameters, that compute with what packing would leave of them.
mlcore.prepare_qat makes them of a model's layers, mlcore.convert makes QuantLinear and QuantEmbedding of them.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .._registry import autocast
from ..ops.quant_linear import round_codebook, round_rows
from ..quant._pack import Rounded, _grouped, _quotient
from ..quant._packed import spread


class _Straight(torch.autograd.Function):
    """What is left of a weight, with the weight's own gradient (straight-through estimator, Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx, weight, left):
        ctx.dtype = weight.dtype
        return left

    @staticmethod
    def backward(ctx, dy):
        return dy.to(ctx.dtype), None


class _LearnedStep(torch.autograd.Function):
    """(q - z) s with q the nearest code of w / s + z; gradients of w inside of the codes' range, and of s by LSQ (Esser et al.
    2020, "Learned Step Size Quantization", eq. 3), scaled by 1 / sqrt(weights of a group * largest code).
    """

    @staticmethod
    def forward(ctx, weight, scales, codes, zeros, bits, group_size):
        ctx.save_for_backward(weight, scales, codes, zeros)
        ctx.numbers = bits, group_size
        return (codes - spread(zeros, group_size, weight.shape[1])) * spread(scales, group_size, weight.shape[1])

    @staticmethod
    def backward(ctx, dy):
        weight, scales, codes, zeros = ctx.saved_tensors
        bits, group_size = ctx.numbers
        whole = codes - spread(zeros, group_size, weight.shape[1])
        quotient = _quotient(weight.float(), scales, group_size)
        dy = dy.to_dense() if dy.is_sparse else dy
        inside = quotient.round() == whole
        slope = torch.where(inside, whole - quotient, whole)
        gain = (group_size * max(2 ** (bits - 1) - 1, 1)) ** -0.5
        return (dy * inside).to(weight.dtype), _grouped(dy * slope, group_size).sum(2) * gain, None, None, None, None


class FakeQuant:
    """What fake-quantized layers share: `quant_config`, and `scales` (N, G), `zeros` (N, G) where scales are learned."""

    def matrix(self) -> torch.Tensor:
        """The weight as it is packed, (N, K)."""
        return self.weight

    def rounded(self) -> Rounded:
        """The weight in codes, as convert would pack it now."""
        config = self.quant_config
        if getattr(self, "scales", None) is None:
            return config.rounded(self.matrix().detach())
        bits, K = int(config.format[3:]), self.matrix().shape[1]
        size = max(K, 1) if config.group_size is None else min(config.group_size, max(K, 1))
        scales, low = self.scales.detach(), spread(self.zeros, size, K)
        codes = (_quotient(self.matrix().detach().float(), scales, size).round() + low).clamp(0, 2**bits - 1)
        return Rounded(codes, scales, bits, size, None if config.symmetric else self.zeros)

    def fake_weight(self, integer_inputs: bool = False) -> torch.Tensor:
        """What is left of the weight, (N, K) float32, with gradients."""
        rounded = self.rounded()
        if getattr(self, "scales", None) is not None:
            return _LearnedStep.apply(self.matrix(), self.scales, rounded.codes, self.zeros, rounded.bits, rounded.group_size)
        if integer_inputs and rounded.codebook is not None:
            rounded = dataclasses.replace(rounded, codebook=round_codebook(rounded.codebook))
        return _Straight.apply(self.matrix(), rounded.dequantize())

    def learn_scales(self) -> None:
        rounded = self.quant_config.rounded(self.matrix().detach())
        half = torch.full_like(rounded.scales, 2 ** (rounded.bits - 1))
        self.scales = torch.nn.Parameter(rounded.scales.clone())
        self.register_buffer("zeros", half if rounded.zeros is None else rounded.zeros.float())


class FakeQuantLinear(FakeQuant, torch.nn.Linear):
    """torch.nn.Linear that computes what QuantLinear will: products of the rounded weight with x, rounded too where the config
    asks for integer inputs, summed in float32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (x,) = autocast(x.device.type, x)
        integer = self.quant_config.integer_inputs
        weight = self.fake_weight(integer)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(round_rows(x) if integer else x.float(), weight, bias).to(x.dtype)


class FakeQuantEmbedding(FakeQuant, torch.nn.Embedding):
    """torch.nn.Embedding that looks up what QuantEmbedding will."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            input,
            self.fake_weight().to(self.weight.dtype),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
