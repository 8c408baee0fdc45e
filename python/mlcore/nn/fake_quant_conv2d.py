"""torch.nn.Conv2d in training for low bits; mlcore.prepare_qat makes it, mlcore.convert makes a QuantConv2d of it."""

from __future__ import annotations

import torch

from .._registry import autocast
from ..ops.quant_linear import round_rows
from .fake_quant import FakeQuant
from .quant_conv2d import conv_kind


class FakeQuantConv2d(FakeQuant, torch.nn.Conv2d):
    """torch.nn.Conv2d that computes what QuantConv2d will: with the rounded weight, and with x rounded by pixels where it is
    pointwise and the config asks for integer inputs; sums in float32.
    """

    def matrix(self) -> torch.Tensor:
        return self.weight.flatten(1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        (x,) = autocast(input.device.type, input)
        integer = self.quant_config.integer_inputs and conv_kind(self) == "pointwise"
        weight = self.fake_weight(integer).view_as(self.weight)
        bias = None if self.bias is None else self.bias.float()
        wide = round_rows(x.movedim(-3, -1)).movedim(-1, -3) if integer else x.float()
        with torch.autocast(x.device.type, enabled=False):
            return self._conv_forward(wide, weight, bias).to(x.dtype)
