"""mlcore.quantize: layers of an existing model to low-bit ones, in place, and a report of what that cost and gained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from . import nn
from .quant import PackedWeight, pack, pack_gptq, pack_mse

_METHODS = ("round", "mse", "gptq")


@dataclass(frozen=True)
class QuantConfig:
    """How quantize() packs.

    Args:
        format, group_size, symmetric, entries: as mlcore.quant.pack's.
        method: "round": to the nearest code; "mse": ranges clipped for the least squared error; "gptq": errors of a column made
            up for by the next ones, for the inputs of quantize's batches. The last two are for int formats; embeddings, which
            have no inputs to look at, are packed by "mse" then.
        dynamic_int8: linear layers round their input to int8 by rows; None: for format "int8" alone.
        embeddings: embedding tables too.
    """

    format: str = "int4"
    group_size: int | None = 32
    symmetric: bool = True
    entries: int | None = None
    method: str = "round"
    dynamic_int8: bool | None = None
    embeddings: bool = False

    def pack(self, weight: torch.Tensor, hessian: torch.Tensor | None = None) -> PackedWeight:
        """The weight packed this way; hessian is what "gptq" needs."""
        if self.method not in _METHODS:
            raise ValueError(f"QuantConfig: method must be one of {', '.join(_METHODS)}; got {self.method!r}")
        if self.method != "round":
            if self.entries is not None:
                raise ValueError(f"QuantConfig: entries belong to method 'round' and format 'codebook'; got {self.method!r}")
            how = {"group_size": self.group_size, "symmetric": self.symmetric}
            if hessian is None:
                return pack_mse(weight, self.format, **how)
            return pack_gptq(weight, hessian, self.format, **how)
        return pack(weight, self.format, group_size=self.group_size, symmetric=self.symmetric, entries=self.entries)


@dataclass(frozen=True)
class LayerReport:
    """One layer: bytes of its weight, signal to quantization noise (dB), seconds a call; or why it was left as it was."""

    name: str
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr_db: float = math.nan
    seconds_before: float = math.nan
    seconds_after: float = math.nan
    skipped: str | None = None

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.name}: left, {self.skipped}"
        ratio = self.bytes_before / max(self.bytes_after, 1)
        text = f"{self.name}: {self.bytes_before} -> {self.bytes_after} bytes ({ratio:.1f}x), SQNR {self.sqnr_db:.1f} dB"
        if math.isnan(self.seconds_after):
            return text
        slower = "" if self.seconds_after <= self.seconds_before else ", slower than before"
        return f"{text}, {self.seconds_before * 1e3:.3f} -> {self.seconds_after * 1e3:.3f} ms{slower}"


@dataclass(frozen=True)
class QuantReport:
    """What quantize() did, layer by layer; print it."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.skipped is not None]

    def __str__(self) -> str:
        before, after = (sum(getattr(r, f"bytes_{when}") for r in self.quantized) for when in ("before", "after"))
        head = f"quantized {len(self.quantized)} layers, left {len(self.skipped)}: {before} -> {after} bytes"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)])


def sqnr_db(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantization noise ratio, 10 log10(|w|^2 / |w - w'|^2); infinite where nothing was lost."""
    wide = weight.detach().double()
    noise, signal = (wide - approximation.double()).square().sum().item(), wide.square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


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


def _seconds(call: Callable[[], object]) -> float:
    """The fastest of a few calls."""
    call()
    best, end = math.inf, time.perf_counter() + 0.05
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _converted(module, config, hessian) -> torch.nn.Module:
    packed = config.pack(module.weight, hessian)
    if isinstance(module, torch.nn.Embedding):
        return nn.QuantEmbedding.from_packed(packed, module.weight.dtype).train(module.training)
    dynamic = config.format == "int8" if config.dynamic_int8 is None else config.dynamic_int8
    return nn.QuantLinear.from_packed(packed, module.bias, dynamic_int8=dynamic).train(module.training)


def _report(name, module, layer, measure_rows) -> LayerReport:
    weight = module.weight.detach()
    sizes = weight.nbytes, layer.packed.nbytes, sqnr_db(weight, layer.packed.dequantize())
    if measure_rows is None:
        return LayerReport(name, *sizes)
    if isinstance(module, torch.nn.Embedding):
        x = torch.arange(measure_rows, device=weight.device) % len(weight)
    else:
        x = torch.randn(measure_rows, weight.shape[1], device=weight.device).to(weight.dtype)
    with torch.no_grad():
        return LayerReport(name, *sizes, _seconds(lambda: module(x)), _seconds(lambda: layer(x)))


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
        batches: inputs of the model (a tensor, a tuple of arguments, or a mapping of them), for method "gptq": the model is run
            on all of them first, and each layer keeps in_features^2 numbers meanwhile.
        measure_rows: times each layer before and after with so many rows of input.

    Returns:
        For each linear and embedding layer, its bytes before and after, the SQNR of its weight and, if asked, seconds a call;
        or why it was left.

    Raises:
        ValueError: model is no torch.nn.Module or a layer itself, config breaks pack's rules, or batches come without "gptq" or
            "gptq" without them.
    """
    config = config or QuantConfig()
    if (batches is not None) != (config.method == "gptq"):
        raise ValueError(f"quantize: batches and method 'gptq' belong together; got method {config.method!r}")
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    if not isinstance(model, torch.nn.Module) or isinstance(model, kinds):
        raise ValueError(f"quantize: model must be a torch.nn.Module around the layers; got {type(model).__name__}")
    config.pack(torch.zeros(1, 1))  # what is wrong with the config is said before anything is changed
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        reasons[name] = _reason(name, module, model.get_submodule(name.rpartition(".")[0]), config, owners)
        if reasons[name] is None and filter is not None and not filter(name, module):
            reasons[name] = "the filter said no"
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
        layer = _converted(module, config, hessian)
        report.layers.append(_report(name, module, layer, measure_rows))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return report
