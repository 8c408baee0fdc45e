"""A linear layer with weights -1, 0 and 1 and a scale a row, to train; it is served as a QuantLinear with two bits a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops import ternarize
from ..quant import pack_codes
from .quant_linear import QuantLinear


class TernaryLinear(torch.nn.Linear):
    """torch.nn.Linear, its parameters and its state_dict, with ternary weights (Li et al. 2016, "Ternary weight networks"): in
    each row of W, 0 up to 0.7 of the mean magnitude; the mean magnitude of the rest is its scale. Gradients of the rounding are
    straight-through estimates. pack() gives the layer to serve.

    Shape: x (..., in_features), y (..., out_features).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = self.signs
        y = F.linear(x, signs.to(x.dtype)) * self._scale(signs).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @property
    def signs(self) -> torch.Tensor:
        """(out_features, in_features) of -1, 0 and 1, with straight-through gradients."""
        return ternarize(self.weight, 1) if self.in_features else self.weight

    def _scale(self, signs):
        kept = signs.detach().abs()
        return (self.weight.abs() * kept).sum(1) / kept.sum(1).clamp(min=1)

    def pack(self, *, dynamic_int8: bool = False) -> QuantLinear:
        """The layer with two bits a weight: the same numbers up to the order of sums, or with x rounded to int8 by rows (see
        mlcore.ops.quant_linear).
        """
        signs = self.signs.detach()
        scales = self._scale(signs).detach().float()[:, None][:, : self.in_features]
        size = max(self.in_features, 1)
        packed = pack_codes((signs + 1).byte(), scales, bits=2, group_size=size, offset=1, format="ternary")
        bias = None if self.bias is None else self.bias.detach().clone()
        return QuantLinear.from_packed(packed, bias, dynamic_int8=dynamic_int8).train(self.training)
