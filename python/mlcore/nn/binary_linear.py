"""Linear layers of signs: one to train, with real weights behind the signs, and the one it becomes, with one bit a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops import PackedSigns, binarize, binary_linear
from ..ops._straight_through import check_estimator
from ..quant import PackedWeight, pack_codes
from .quant_linear import PackedModule, QuantLinear


class BinaryLinear(torch.nn.Linear):
    """torch.nn.Linear, its parameters and its state_dict, with binary weights: y = (sign(x) sign(W)^T) * alpha * K + bias, with
    alpha the mean magnitude of each row of W (Rastegari et al. 2016, "XNOR-Net"). Gradients of sign are straight-through
    estimates. pack() gives the layer to serve.

    Args:
        in_features, out_features, bias: as torch.nn.Linear's.
        binary_input: False: x as it is instead of its signs (their BWN); K is then left out.
        activation_scale: K is the mean magnitude of each row of x; False: K is 1.
        estimator: of sign(x)'s gradient, see mlcore.ops.binarize; that of sign(W) is "clipped".

    Shape: x (..., in_features), y (..., out_features).

    Raises:
        ValueError: an unknown estimator, or activation_scale without binary_input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        binary_input: bool = True,
        activation_scale: bool = False,
        estimator: str = "clipped",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_binary("BinaryLinear", binary_input, activation_scale, estimator)
        self.binary_input, self.activation_scale, self.estimator = binary_input, activation_scale, estimator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = binarize(self.weight, "clipped").to(wide.dtype)
        y = F.linear(binarize(wide, self.estimator) if self.binary_input else wide, weight) * self.scale
        if self.activation_scale:
            y = y * wide.abs().mean(-1, keepdim=True)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def scale(self) -> torch.Tensor:
        """alpha (out_features)."""
        return self.weight.abs().mean(1) if self.in_features else self.weight.new_zeros(self.out_features)

    def pack(self) -> PackedBinaryLinear | QuantLinear:
        """The layer that computes the same with one bit a weight: bit by bit the same numbers in float32, but for
        activation_scale and real x, whose sums are rounded in another order.
        """
        scales = self.scale.detach().float()[:, None][:, : self.in_features]
        codes, signs = (self.weight.detach() >= 0).byte(), torch.tensor([-1.0, 1.0], device=self.weight.device)
        packed = pack_codes(codes, scales, bits=1, group_size=max(self.in_features, 1), codebook=signs, format="binary")
        bias = None if self.bias is None else self.bias.detach().clone()
        if not self.binary_input:
            return QuantLinear.from_packed(packed, bias).train(self.training)
        layer = PackedBinaryLinear(packed, bias, activation_scale=self.activation_scale, estimator=self.estimator)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


def check_binary(name: str, binary_input: bool, activation_scale: bool, estimator: str) -> None:
    check_estimator(name, estimator)
    if activation_scale and not binary_input:
        raise ValueError(f"{name}: activation_scale needs binary_input")


def describe(layer) -> str:
    words = [f"estimator={layer.estimator}"] + ["activation_scale"] * layer.activation_scale
    return ", ".join(words + ["real input"] * (not getattr(layer, "binary_input", True)))


class PackedSignsModule(PackedModule):
    """What layers with a binary weight share: the weight, a trainable bias, and how signs are taken of x."""

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None, activation_scale: bool, estimator: str) -> None:
        super().__init__()
        name = type(self).__name__
        if packed.format != "binary":
            raise ValueError(f"{name}: packed must have format 'binary'; got {packed.format!r}")
        if bias is not None and bias.shape != packed.shape[:1]:
            raise ValueError(f"{name}: bias must be ({packed.shape[0]},); got {tuple(bias.shape)}")
        check_estimator(name, estimator)
        self.packed = packed
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))
        self.activation_scale, self.estimator = activation_scale, estimator

    def how(self, x: torch.Tensor | PackedSigns, packed_output: bool) -> dict:
        """Keyword arguments of the op; packed signs bring their scale."""
        scaled = self.activation_scale and not isinstance(x, PackedSigns)
        return {"activation_scale": scaled, "estimator": self.estimator, "packed_output": packed_output}


class PackedBinaryLinear(PackedSignsModule):
    """y = (sign(x) · sign(w)) * scale * K + bias, counted in bits (mlcore.ops.binary_linear). The weight is fixed, bias can be
    trained, and gradients reach x.

    Args:
        packed: (N, K) of format "binary", one scale a row.
        bias: (N) or None; becomes a Parameter.
        activation_scale, estimator: as BinaryLinear's.

    Shape: x (..., K), or PackedSigns with K features; y (..., N), or with packed_output PackedSigns of N features.

    Raises:
        ValueError: the weight isn't binary, bias has another shape, or an unknown estimator.
    """

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None = None, *, activation_scale: bool = False,
                 estimator: str = "clipped") -> None:  # fmt: skip
        super().__init__(packed, bias, activation_scale, estimator)

    def forward(self, x: torch.Tensor | PackedSigns, packed_output: bool = False) -> torch.Tensor | PackedSigns:
        return binary_linear(x, self.packed, self.bias, **self.how(x, packed_output))

    def extra_repr(self) -> str:
        N, K = self.packed.shape
        return f"in_features={K}, out_features={N}, bias={self.bias is not None}, {describe(self)}"
