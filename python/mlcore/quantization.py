"""mlcore.quantize: layers of an existing model to low-bit ones, in place, and a report of what that cost and gained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from . import nn
from ._quant_report import LayerReport, QuantReport, layer_report
from .quant import PackedWeight, pack_awq, pack_gptq
from .quant._calibrate import rounded_hqq, rounded_mse, rounded_percentile
from .quant._pack import Rounded, rounded

# What looks at nothing but the weight, and what needs the layer's inputs; all but "minmax" is for int formats.
_WITHOUT_DATA = ("minmax", "percentile", "mse", "hqq")
_WITH_DATA = ("gptq", "awq")


@dataclass(frozen=True)
class QuantConfig:
    """How quantize() and prepare_qat() pack.

    Args:
        format, group_size, symmetric, entries: as mlcore.quant.pack's.
        method: where ranges and codes come from. "minmax": all of a group's range, the nearest code; "percentile": the range's
            tails cut; "mse": clipped for the least squared error; "hqq": half-quadratic splitting; "gptq": errors of a column
            made up for by the next ones; "awq": columns with large inputs magnified, the layer gets an input_scale. The last
            two look at the inputs that quantize's batches cause; embeddings, which have none, are packed by "mse" then. All but
            "minmax" are for int formats; mlcore.quant.pack_* has the details.
        percentile: of method "percentile" alone; default 99.9.
        dynamic_int8: linear layers round their input to int8 by rows; None: for format "int8" alone.
        embeddings: embedding tables too.
    """

    format: str = "int4"
    group_size: int | None = 32
    symmetric: bool = True
    entries: int | None = None
    method: str = "minmax"
    percentile: float | None = None
    dynamic_int8: bool | None = None
    embeddings: bool = False

    @property
    def needs_data(self) -> bool:
        return self.method in _WITH_DATA

    @property
    def integer_inputs(self) -> bool:
        return self.format == "int8" if self.dynamic_int8 is None else self.dynamic_int8

    def rounded(self, weight: torch.Tensor) -> Rounded:
        """The weight in codes, by a method without data ("mse" instead of one with)."""
        if self.method not in _WITHOUT_DATA + _WITH_DATA:
            raise ValueError(f"QuantConfig: method must be one of {', '.join(_WITHOUT_DATA + _WITH_DATA)}; got {self.method!r}")
        if self.percentile is not None and self.method != "percentile":
            raise ValueError(f"QuantConfig: percentile belongs to method 'percentile'; got {self.method!r}")
        how = {"format": self.format, "group_size": self.group_size, "symmetric": self.symmetric}
        if self.method == "minmax":
            return rounded(weight, **how, entries=self.entries)
        if self.entries is not None:
            raise ValueError(f"QuantConfig: entries belong to method 'minmax' and format 'codebook'; got {self.method!r}")
        if self.method == "percentile":
            return rounded_percentile(weight, **how, percentile=99.9 if self.percentile is None else self.percentile)
        return (rounded_hqq if self.method == "hqq" else rounded_mse)(weight, **how)

    def pack(self, weight: torch.Tensor, hessian: torch.Tensor | None = None) -> tuple[PackedWeight, torch.Tensor | None]:
        """The weight packed this way, and the scale of its inputs or None; hessian is what "gptq" and "awq" need."""
        if hessian is None or not self.needs_data:
            return self.rounded(weight).pack(), None
        how = {"group_size": self.group_size, "symmetric": self.symmetric}
        if self.method == "awq":
            return pack_awq(weight, hessian, self.format, **how, dynamic_int8=self.integer_inputs)
        return pack_gptq(weight, hessian, self.format, **how), None


# These read the weights of their parts themselves in inference.
_READERS = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)


def _reason(name, module, parent, config, owners) -> str | None:
    """None where quantize() takes the layer, else why not."""
    stock = torch.nn.Linear if isinstance(module, torch.nn.Linear) else torch.nn.Embedding
    if stock is torch.nn.Embedding and not config.embeddings:
        return "an embedding, and config.embeddings is False"
    if type(module) is not stock:
        return f"{type(module).__name__} is a subclass of {stock.__name__} and may compute something else"
    if isinstance(parent, _READERS) and type(parent).__module__.startswith("torch."):
        return f"{type(parent).__name__} reads its weight without calling it"
    if "forward" in vars(module):
        return "its forward was replaced"
    if "weight" not in module._parameters:
        return "its weight is computed (a parametrization)"
    weight = module.weight
    if len(owners[id(weight)]) > 1:
        return f"its weight is also {', '.join(o for o in owners[id(weight)] if o != name)}'s"
    if weight.device.type == "meta" or weight.numel() == 0:
        return f"its weight has no data: {tuple(weight.shape)} on {weight.device}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if not bool(weight.isfinite().all()):
        return "its weight has NaN or infinity"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its table"
    return None


KINDS = (torch.nn.Linear, torch.nn.Embedding)


def choose(model, config, filter, caller) -> dict[str, str | None]:
    """Of each linear and embedding layer: None where it is taken, else why it is left."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, KINDS):
        raise ValueError(f"{caller}: model must be a torch.nn.Module around the layers; got {type(model).__name__}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, KINDS):
            continue
        reasons[name] = _reason(name, module, model.get_submodule(name.rpartition(".")[0]), config, owners)
        if reasons[name] is None and filter is not None and not filter(name, module):
            reasons[name] = "the filter said no"
    return reasons


def low_bit(module, packed: PackedWeight, config: QuantConfig, input_scale=None) -> torch.nn.Module:
    """The layer that takes module's place."""
    if isinstance(module, torch.nn.Embedding):
        layer = nn.QuantEmbedding.from_packed(packed, module.weight.dtype)
    else:
        how = {"dynamic_int8": config.integer_inputs, "input_scale": input_scale}
        layer = nn.QuantLinear.from_packed(packed, module.bias, **how)
    return layer.train(module.training)


def _call(model: torch.nn.Module, batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))


def _hessians(model: torch.nn.Module, layers: list[torch.nn.Module], batches: Iterable) -> dict[torch.nn.Module, torch.Tensor]:
    """Of each layer, the sum of x x^T over the rows x of its inputs while the model sees the batches."""
    found: dict[torch.nn.Module, torch.Tensor] = {}

    def look(module, args):
        rows = args[0].detach().reshape(-1, module.in_features).float()
        found[module] = found.get(module, 0) + rows.T @ rows

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def quantize(
    model: torch.nn.Module,
    config: QuantConfig | None = None,
    filter: Callable[[str, torch.nn.Module], bool] | None = None,
    *,
    batches: Iterable | None = None,
    measure_rows: int | None = None,
) -> QuantReport:
    """Replaces torch.nn.Linear (and, if the config says so, torch.nn.Embedding) layers of a model by low-bit ones, in place.

    Args:
        model: any module; its parts are replaced, so model itself must not be such a layer.
        config: how; default int4 in groups of 32.
        filter: filter(name, module) says whether a layer is taken.
        batches: inputs of the model (a tensor, a tuple of arguments, or a mapping of them), for methods "gptq" and "awq": the
            model is run on all of them first, and each layer keeps in_features^2 numbers meanwhile.
        measure_rows: times each layer before and after with so many rows of input.

    Returns:
        For each linear and embedding layer, its bytes before and after, the SQNR of its weight and, if asked, seconds a call;
        or why it was left.

    Raises:
        ValueError: model is no torch.nn.Module or a layer itself, config breaks pack's rules, or batches come without "gptq" or
            "awq", or one of these without them.
    """
    config = config or QuantConfig()
    config.pack(torch.zeros(1, 1))  # what is wrong with the config is said before anything is changed
    if (batches is not None) != config.needs_data:
        raise ValueError(f"quantize: batches and method 'gptq' or 'awq' belong together; got method {config.method!r}")
    reasons = choose(model, config, filter, "quantize")
    taken = {name: model.get_submodule(name) for name, reason in reasons.items() if reason is None}
    hessians = {}
    if batches is not None:
        hessians = _hessians(model, [m for m in taken.values() if isinstance(m, torch.nn.Linear)], batches)
    report = QuantReport()
    for name, reason in reasons.items():
        module, hessian = taken.get(name), hessians.get(taken.get(name))
        if reason is None and batches is not None and isinstance(module, torch.nn.Linear) and hessian is None:
            reason = "no batch reached it"
        if reason is not None:
            report.layers.append(LayerReport(name, skipped=reason))
            continue
        packed, input_scale = config.pack(module.weight, hessian)
        layer = low_bit(module, packed, config, input_scale)
        report.layers.append(layer_report(name, module, packed, input_scale, layer, measure_rows))
        model.set_submodule(name, layer)
    return report
