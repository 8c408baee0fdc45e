"""mlcore.quantize: layers of an existing model to low-bit ones, in place, and a report of what that cost and gained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from . import nn
from ._fold import followers
from ._quant_report import LayerReport, QuantReport, layer_report
from .nn.quant_conv2d import conv_kind
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
        format, symmetric, entries: as mlcore.quant.pack's.
        group_size: as mlcore.quant.pack's, None being one scale a row; "auto": None for "int8", which many groups would make
            slower and hardly more accurate, else 32.
        method: where ranges and codes come from. "minmax": all of a group's range, the nearest code; "percentile": the range's
            tails cut; "mse": clipped for the least squared error; "hqq": half-quadratic splitting; "gptq": errors of a column
            made up for by the next ones; "awq": columns with large inputs magnified, the layer gets an input_scale. The last
            two look at the inputs that quantize's batches cause; embeddings, which have none, are packed by "mse" then. All but
            "minmax" are for int formats; mlcore.quant.pack_* has the details.
        percentile: of method "percentile" alone; default 99.9.
        dynamic_int8: linear layers round their input to int8 by rows; None: for format "int8" alone.
        embeddings: embedding tables too.
        convolutions: False: none. True: pointwise (1x1) and depthwise ones (torch.nn.Conv2d). None: those that gain: pointwise
            ones with integer inputs from 96 by 96 channels on, where float32 doesn't run them and their neighbours as one op
            (nn.InferenceChain). A depthwise one takes its inputs as they are, whatever dynamic_int8 says.

    Raises:
        ValueError: a value that is none of these, or values that exclude each other.
    """

    format: str = "int4"
    group_size: int | Literal["auto"] | None = "auto"
    symmetric: bool = True
    entries: int | None = None
    method: str = "minmax"
    percentile: float | None = None
    dynamic_int8: bool | None = None
    embeddings: bool = False
    convolutions: bool | None = None

    def __post_init__(self) -> None:
        if self.group_size == "auto":
            object.__setattr__(self, "group_size", None if self.format == "int8" else 32)
        self.rounded(torch.zeros(1, 1, device="cpu"))  # raises what is wrong with it

    @classmethod
    def of(cls, config: QuantConfig | str | None, caller: str) -> QuantConfig:
        """The config that quantize() and prepare_qat() are given: itself, that of a format, or the default."""
        if isinstance(config, QuantConfig):
            return config
        if config is None or isinstance(config, str):
            return cls() if config is None else cls(config)
        raise ValueError(f"{caller}: config must be a QuantConfig or a format; got {type(config).__name__}")

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


#: Channels on both sides from which a pointwise convolution with int8 inputs is faster than both torch's in float32, in the
#: better of its layouts, and mlcore's. On two cores with VNNI: 96 to 192 channels at 28 x 28 pixels 2.1 and 1.1 times, 512 to
#: 512 at 14 x 14 3 and 2.5 times; 64 to 128 at 56 x 56 1.7 and 0.8 times.
GAINING_CHANNELS = 96


def _chained(model: torch.nn.Module) -> set[torch.nn.Module]:
    """What runs as one op in float32 (nn.InferenceChain), on the CPU: in bench/bench_cnn_quantized.py MobileNetV1 took 6.8 ms
    with every layer in int8 and 5.1 so, MobileNetV2 11.0 and 4.8.
    """
    roots = [m for m in model.modules() if isinstance(getattr(m, "_chain", None), nn.InferenceChain)]
    return {m for root in roots for m in root.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.device.type == "cpu"}


def _conv_reason(module, config, chained) -> str | None:
    """Why the convolution is left, as far as the config, its numbers and its neighbours say."""
    kind = conv_kind(module)
    if config.convolutions is False:
        return "a convolution, and config.convolutions is False"
    if kind is None or (module.kernel_size != (1, 1) and module.groups == 1):  # of one channel: both dense and depthwise
        size = " x ".join(map(str, module.kernel_size))
        return f"a {size} convolution of {module.groups} groups: low bits are for pointwise and depthwise ones"
    if config.convolutions:
        return None
    if kind == "depthwise":
        return "a depthwise convolution: low bits make it no faster, and it has few weights; config.convolutions=True takes it"
    if not config.integer_inputs:
        return "a convolution with inputs as they are, which low bits make slower; config.convolutions=True takes it"
    if min(module.in_channels, module.out_channels) < GAINING_CHANNELS:
        sizes = f"{module.in_channels} to {module.out_channels} channels"
        return f"{sizes}: below {GAINING_CHANNELS} int8 is slower than float32; config.convolutions=True takes it"
    if module in chained:
        return "in float32 one op runs it and its neighbours, which is faster; config.convolutions=True takes it"
    return None


def _reason(name, module, parent, config, owners, chained) -> str | None:
    """None where quantize() takes the layer, else why not."""
    stock = next(kind for kind in KINDS if isinstance(module, kind))
    if stock is torch.nn.Embedding and not config.embeddings:
        return "an embedding, and config.embeddings is False"
    if type(module) not in (stock, nn.DepthwiseConv2d):
        return f"{type(module).__name__} is a subclass of {stock.__name__} and may compute something else"
    if stock is torch.nn.Conv2d and (reason := _conv_reason(module, config, chained)):
        return reason
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


KINDS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d)


def choose(model, config, filter, caller) -> dict[str, str | None]:
    """Of each linear, embedding and convolution layer: None where it is taken, else why it is left."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, KINDS):
        raise ValueError(f"{caller}: model must be a torch.nn.Module around the layers; got {type(model).__name__}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str | None] = {}
    chained = _chained(model)
    for name, module in model.named_modules():
        if not isinstance(module, KINDS):
            continue
        reasons[name] = _reason(name, module, model.get_submodule(name.rpartition(".")[0]), config, owners, chained)
        if reasons[name] is None and filter is not None and not filter(module, name):
            reasons[name] = "the filter said no"
    return reasons


def matrix(module: torch.nn.Module) -> torch.Tensor:
    """The weight as it is packed: (N, K), a convolution's with a row a filter."""
    return module.weight.flatten(1)


def low_bit(module, packed: PackedWeight, config: QuantConfig, input_scale=None, norm=None, activation=None) -> torch.nn.Module:
    """The layer that takes module's place; norm and activation: what a convolution computes with it (_fold.py)."""
    if isinstance(module, torch.nn.Embedding):
        layer = nn.QuantEmbedding.from_packed(packed, module.weight.dtype)
    elif isinstance(module, torch.nn.Conv2d):
        integer = config.integer_inputs and conv_kind(module) == "pointwise"
        how = {"dynamic_int8": integer, "input_scale": input_scale}
        layer = nn.QuantConv2d.from_packed(packed, module, norm=norm, activation=activation, **how)
    else:
        how = {"dynamic_int8": config.integer_inputs, "input_scale": input_scale}
        layer = nn.QuantLinear.from_packed(packed, module.bias, **how)
    return layer.train(module.training)


def replace(model: torch.nn.Module, name: str, layer: torch.nn.Module, absorbed: Iterable[str]) -> None:
    """Puts the layer in its place, and nothing in the places beside it whose work it does now."""
    model.set_submodule(name, layer)
    parent = model.get_submodule(name.rpartition(".")[0])
    for other in absorbed:
        setattr(parent, other, torch.nn.Identity())


def _takes_data(module: torch.nn.Module) -> bool:
    """Whether methods with data see inputs of the layer as rows."""
    pointwise = isinstance(module, torch.nn.Conv2d) and conv_kind(module) == "pointwise"
    return pointwise or isinstance(module, torch.nn.Linear)


def _call(model: torch.nn.Module, batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))


def _hessians(model: torch.nn.Module, layers: list[torch.nn.Module], batches: Iterable) -> dict[torch.nn.Module, torch.Tensor]:
    """Of each layer, the sum of x x^T over the rows x of its inputs while the model sees the batches."""
    found: dict[torch.nn.Module, torch.Tensor] = {}

    def look(module, args):
        x = args[0].detach()
        if isinstance(module, torch.nn.Conv2d):  # the pixels that a pointwise convolution meets
            x = x[..., :: module.stride[0], :: module.stride[1]].movedim(-3, -1)
        rows = x.reshape(-1, matrix(module).shape[1]).float()
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
    config: QuantConfig | str | None = None,
    filter: Callable[[torch.nn.Module, str], bool] | None = None,
    *,
    batches: Iterable | None = None,
    measure_rows: int | None = None,
) -> QuantReport:
    """Replaces torch.nn.Linear, pointwise torch.nn.Conv2d (and, if the config says so, torch.nn.Embedding and depthwise Conv2d)
    layers of a model by low-bit ones, in place. Batch norms with fixed moments (model.eval()) and activations that follow a
    convolution in a torch.nn.Sequential or a block of mlcore.nn become part of it.

    Args:
        model: any module; its parts are replaced, so model itself must not be such a layer.
        config: how; a format is short for QuantConfig(format), and the default is int4 in groups of 32.
        filter: filter(module, name) says whether a layer is taken.
        batches: inputs of the model (a tensor, a tuple of arguments, or a mapping of them), for methods "gptq" and "awq": the
            model is run on all of them first, and each layer keeps in_features^2 numbers meanwhile.
        measure_rows: times each layer before and after with so many rows of input; of a convolution, pixels of one image,
            against the faster of torch's two layouts.

    Returns:
        For each linear, embedding and convolution layer, its bytes before and after, the SQNR of its weight and, if asked,
        seconds a call; or why it was left.

    Raises:
        ValueError: model is no torch.nn.Module or a layer itself, config is something else, or batches come without "gptq" or
            "awq", or one of these without them.
    """
    config = QuantConfig.of(config, "quantize")
    if (batches is not None) != config.needs_data:
        raise ValueError(f"quantize: batches and method 'gptq' or 'awq' belong together; got method {config.method!r}")
    reasons = choose(model, config, filter, "quantize")
    taken = {name: model.get_submodule(name) for name, reason in reasons.items() if reason is None}
    hessians = {}
    if batches is not None:
        hessians = _hessians(model, [m for m in taken.values() if _takes_data(m)], batches)
    report, parts = QuantReport(), followers(model)
    for name, reason in reasons.items():
        module, hessian = taken.get(name), hessians.get(taken.get(name))
        if reason is None and batches is not None and _takes_data(module) and hessian is None:
            reason = "no batch reached it"
        if reason is not None:
            report.layers.append(LayerReport(name, skipped=reason))
            continue
        packed, input_scale = config.pack(matrix(module), hessian)
        norm, activation, absorbed = parts.get(module, (None, None, ()))
        layer = low_bit(module, packed, config, input_scale, norm, activation)
        report.layers.append(layer_report(name, module, packed, input_scale, layer, measure_rows))
        replace(model, name, layer, absorbed)
    return report
