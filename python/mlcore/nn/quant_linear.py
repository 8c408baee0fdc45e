"""A linear layer with a quantized weight: the parts that quantized layers share, and the layer."""

from __future__ import annotations

import torch

from ..ops import quant_linear
from ..quant import PackedWeight, pack
from ..quant._layout import LAYOUTS
from ..quant._packed import FORMATS, TENSORS

_LAYOUTS = tuple(LAYOUTS)


class PackedModule(torch.nn.Module):
    """A module that keeps a PackedWeight in buffers: its tensors under their names, its numbers in "form" (int64).

    A state_dict carries the whole weight: loading one replaces format, bits and group size too, and refuses what contradicts
    itself. Scales stay float32 when the module is converted to another dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in (*TENSORS, "form"):
            self.register_buffer(name, None)
        self._packed: PackedWeight | None = None

    @property
    def packed(self) -> PackedWeight:
        """The weight, in the buffers' own tensors."""
        if self._packed is None or self._packed.codes is not self.codes or self._packed.scales is not self.scales:
            self._packed = self._described({name: getattr(self, name) for name in TENSORS}, self._numbers)
        return self._packed

    @packed.setter
    def packed(self, packed: PackedWeight) -> None:
        for name in TENSORS:
            setattr(self, name, getattr(packed, name))
        kinds = FORMATS.index(packed.format), _LAYOUTS.index(packed.layout)
        self._numbers = (*packed.shape, packed.bits, packed.group_size, packed.offset, *kinds)
        self.form = torch.tensor(self._numbers, dtype=torch.int64)
        self._packed = packed

    @staticmethod
    def _described(tensors: dict, numbers: tuple[int, ...]) -> PackedWeight:
        if len(numbers) != 7 or not (0 <= numbers[5] < len(FORMATS) and 0 <= numbers[6] < len(_LAYOUTS)):
            raise ValueError(f"form must be (N, K, bits, group_size, offset, format, layout); got {numbers}")
        N, K, bits, group_size, offset, kind, layout = numbers
        return PackedWeight(**tensors, shape=(N, K), bits=bits, group_size=group_size, offset=offset, format=FORMATS[kind],
                            layout=_LAYOUTS[layout])  # fmt: skip

    def _apply(self, fn, recurse=True):
        kept = {name: t for name in ("scales", "codebook", "form", "input_scale") if (t := self._buffers.get(name)) is not None}
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, t in kept.items():
            device = "cpu" if name == "form" else self.codes.device
            self._buffers[name] = torch.empty_like(t, device=device) if t.is_meta else t.to(device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        form = state_dict.get(prefix + "form")
        if form is not None:
            tensors = {name: state_dict.get(prefix + name) for name in TENSORS}
            try:
                found = self._described(tensors, tuple(form.tolist())).check_finite()
                if self.codes is not None and found.shape != self.packed.shape:
                    raise ValueError(f"the weight is {found.shape}, the layer's {self.packed.shape}")
                device = found.codes.device if self.codes is None else self.codes.device
                self.packed = found.to(device)
            except (ValueError, AttributeError) as error:
                error_msgs.append(f"{prefix}: {error}")
                return
            fresh = {name: None if t is None else t.clone() for name, t in ((n, getattr(self, n)) for n in TENSORS)}
            for name, t in fresh.items():
                setattr(self, name, t)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _check_input_scale(scale: torch.Tensor, packed: PackedWeight) -> None:
    K = packed.shape[1]
    if scale.shape != (K,) or scale.dtype != torch.float32 or not bool(scale.isfinite().all()):
        raise ValueError(f"QuantLinear: input_scale must be finite float32 ({K},); got {scale.dtype} {tuple(scale.shape)}")


class PackedLinear(PackedModule):
    """What layers with a packed weight (N, K), a bias (N), an activation and maybe an input_scale (K) share."""

    def _build(self, packed, bias, activation, dynamic_int8, input_scale=None) -> None:
        super().__init__()
        self.packed = packed
        self.register_parameter("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.activation, self.dynamic_int8 = activation, dynamic_int8

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if prefix + "form" in state_dict:
            scale = state_dict.get(prefix + "input_scale")
            try:
                if scale is not None:
                    _check_input_scale(scale, self.packed)
                self.input_scale = None if scale is None else scale.to(self.codes.device, copy=True)
            except ValueError as error:
                rest[-1].append(f"{prefix}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _format_words(self) -> list[str]:
        p = self.packed
        words = [f"{p.format}, bits={p.bits}, group_size={p.group_size}"] + ["zeros"] * (p.zeros is not None)
        return words + ["dynamic_int8"] * self.dynamic_int8 + ["input_scale"] * (self.input_scale is not None)


class QuantLinear(PackedLinear):
    """torch.nn.Linear with a weight of 1 to 8 bits: y = activation(x W^T + bias). The weight is fixed, bias can be trained, and
    gradients reach x.

    Args:
        in_features, out_features, bias: as torch.nn.Linear's; the weight is initialized as there, then packed.
        format, group_size, symmetric: as mlcore.quant.pack's.
        activation: None, "relu", "gelu", "gelu_tanh", "silu" or "relu6", fused.
        dynamic_int8: x is rounded to int8 by rows (see mlcore.ops.quant_linear).

    Shape: x (..., in_features), y (..., out_features).

    Raises:
        ValueError: as pack and quant_linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int4",
        group_size: int | None = None,
        symmetric: bool = True,
        activation: str | None = None,
        dynamic_int8: bool = False,
        device=None,
    ) -> None:
        linear = torch.nn.Linear(in_features, out_features, bias, device=device)
        packed = pack(linear.weight, format, group_size=group_size, symmetric=symmetric)
        self._build(packed, linear.bias, activation, dynamic_int8)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        activation: str | None = None,
        dynamic_int8: bool = False,
        input_scale: torch.Tensor | None = None,
    ) -> QuantLinear:
        """The layer with this weight; a bias that is no Parameter becomes one. input_scale: (K) float32, finite; x is
        multiplied by it first (mlcore.quant.pack_awq).
        """
        if bias is not None and bias.shape != packed.shape[:1]:
            raise ValueError(f"QuantLinear: bias must be ({packed.shape[0]},); got {tuple(bias.shape)}")
        if input_scale is not None:
            _check_input_scale(input_scale, packed)
        layer = cls.__new__(cls)
        parameter = bias if bias is None or isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias)
        layer._build(packed, parameter, activation, dynamic_int8, input_scale)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        format: str = "int4",
        *,
        activation: str | None = None,
        dynamic_int8: bool = False,
        **how,
    ) -> QuantLinear:
        """The layer with a torch.nn.Linear's weight packed by mlcore.quant.pack(weight, format, **how), and its own bias."""
        packed = pack(linear.weight, format, **how)
        layer = cls.from_packed(packed, linear.bias, activation=activation, dynamic_int8=dynamic_int8)
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.packed.shape[1]

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        return quant_linear(x, self.packed, self.bias, self.activation, residual=residual, dynamic_int8=self.dynamic_int8)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        return ", ".join(parts + self._format_words())
