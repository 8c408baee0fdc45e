"""Quantization-aware training: prepare_qat(model, config), train as ever, convert(model)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import nn
from ._fold import followers
from ._quant_report import LayerReport, QuantReport, layer_report
from .quantization import QuantConfig, choose, low_bit, replace

_FAKE = {
    torch.nn.Linear: nn.FakeQuantLinear,
    torch.nn.Embedding: nn.FakeQuantEmbedding,
    torch.nn.Conv2d: nn.FakeQuantConv2d,
    nn.DepthwiseConv2d: nn.FakeQuantConv2d,
}
_FAKES = tuple(set(_FAKE.values()))


def prepare_qat(
    model: torch.nn.Module,
    config: QuantConfig | str | None = None,
    filter: Callable[[torch.nn.Module, str], bool] | None = None,
    *,
    learn_scales: bool = False,
) -> QuantReport:
    """Makes the layers of a model that quantize() would replace compute what their low-bit successors will, in
    place: each call rounds the weight, and the input where the config asks for integer inputs; gradients go straight through.

    A layer keeps its identity, parameters, hooks and state_dict keys; only its class changes, so that an optimizer made before
    serves on.

    Args:
        model, config, filter: as mlcore.quantize's.
        learn_scales: each group's scale becomes a parameter `scales` (LSQ, Esser et al. 2020) that starts at what the config's
            method says, and state_dicts carry it; int formats. False: the config's method finds scales anew each call.

    Returns:
        What convert() would give now, layer by layer, and why layers were left.

    Raises:
        ValueError: as quantize; the config's method needs data; learn_scales without an int format.
    """
    config = QuantConfig.of(config, "prepare_qat")
    if config.needs_data:
        raise ValueError(f"prepare_qat: method must be one without data, the weights change; got {config.method!r}")
    if learn_scales and not config.format.startswith("int"):
        raise ValueError(f"prepare_qat: learn_scales belongs to int formats; got {config.format!r}")
    report = QuantReport()
    for name, reason in choose(model, config, filter, "prepare_qat").items():
        if reason is not None:
            report.layers.append(LayerReport(name, skipped=reason))
            continue
        module = model.get_submodule(name)
        module.__class__ = _FAKE[type(module)]
        module.quant_config = config
        if learn_scales:
            module.learn_scales()
        report.layers.append(layer_report(name, module, module.rounded().pack()))
    return report


def convert(model: torch.nn.Module, *, measure_rows: int | None = None) -> QuantReport:
    """Replaces the layers that prepare_qat prepared by QuantLinear, QuantEmbedding and QuantConv2d, in place. The model then
    computes what it did in training, from packed weights; after model.eval() convolutions take over their batch norms and
    activations, as in quantize().

    Args:
        model: any module that prepare_qat has seen.
        measure_rows: times each layer, in floating point and packed, with so many rows (pixels) of input.

    Returns:
        Of each layer, as quantize(): the weight before is the trained one.

    Raises:
        ValueError: model has no prepared layer, or a trained weight or scale isn't finite.
    """
    prepared = [name for name, module in model.named_modules() if isinstance(module, _FAKES)]
    if not prepared or "" in prepared:
        raise ValueError(f"convert: model must hold layers that prepare_qat prepared; got {type(model).__name__}")
    report, layers, parts = QuantReport(), {}, followers(model)
    for name in prepared:  # all are packed before one is replaced: a bad weight changes nothing
        module = model.get_submodule(name)
        if not bool(module.weight.isfinite().all()):
            raise ValueError(f"convert: the weight of {name} must be finite; got NaN or infinity")
        packed = module.rounded().pack()
        norm, activation, absorbed = parts.get(module, (None, None, ()))
        layers[name] = low_bit(module, packed, module.quant_config, None, norm, activation), absorbed
        report.layers.append(layer_report(name, module, packed, None, layers[name][0], measure_rows))
    for name, (layer, absorbed) in layers.items():
        replace(model, name, layer, absorbed)
    return report
