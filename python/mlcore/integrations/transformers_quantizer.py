"""mlcore's low-bit layers for Hugging Face transformers: from_pretrained(..., quantization_config=MlcoreConfig(bits=4)), and
save_pretrained and from_pretrained of what came out of it. Importing this module registers it.
"""

from __future__ import annotations

from typing import Literal

import torch

try:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"mlcore.integrations.transformers_quantizer needs transformers >= 5.4 ({error})") from error

from .. import nn
from ..nn.quant_linear import PackedModule
from ..quant import PackedWeight
from ..quant._layout import Geometry
from ..quantization import QuantConfig, quantize

_PARTS = {"codes": torch.uint8, "scales": torch.float32, "zeros": torch.uint8, "codebook": torch.float32}
_OPTIONAL = ("zeros", "codebook", "input_scale")
_NUMBERS = ("bits", "group_size", "offset", "format", "layout")


class MlcoreConfig(QuantizationConfigMixin):
    """How transformers quantizes a model with mlcore.

    Args:
        bits: 1 to 8, for format "int<bits>".
        group_size, symmetric, entries, method, percentile, dynamic_int8, embeddings: as mlcore.QuantConfig's; methods without
            data. With data (GPTQ, AWQ): mlcore.quantize, then attach().
        format: another one, "ternary", "nf4" or "codebook"; bits is then not read and must be None.
        modules_to_not_convert: modules that stay, by the start or the end of their names or a regular expression; None: what
            transformers leaves out by default, which is the output layer and tied weights.
        layers: of a saved model: how each low-bit layer is stored, by name. Don't set it.

    Raises:
        ValueError: unknown names, or values that QuantConfig refuses.
    """

    def __init__(
        self,
        bits: int | None = 4,
        group_size: int | Literal["auto"] | None = "auto",
        symmetric: bool = True,
        method: str = "mse",
        *,
        format: str | None = None,
        entries: int | None = None,
        percentile: float | None = None,
        dynamic_int8: bool | None = None,
        embeddings: bool = False,
        modules_to_not_convert: list[str] | None = None,
        layers: dict[str, dict] | None = None,
        quant_method: str = "mlcore",
    ) -> None:
        if quant_method != "mlcore":
            raise ValueError(f"MlcoreConfig: quant_method must be 'mlcore'; got {quant_method!r}")
        if (bits is None) == (format is None):
            raise ValueError(f"MlcoreConfig: one of bits and format must be None; got {bits!r} and {format!r}")
        self.quant_method = quant_method
        self.bits, self.group_size, self.symmetric, self.method = bits, group_size, symmetric, method
        self.format, self.entries, self.percentile, self.dynamic_int8 = format, entries, percentile, dynamic_int8
        self.embeddings, self.modules_to_not_convert, self.layers = embeddings, modules_to_not_convert, layers
        config = self.quant_config()
        self.group_size = config.group_size
        if config.needs_data and layers is None:
            raise ValueError(
                f"MlcoreConfig: method must be one without data (else mlcore.quantize, then attach); got {method!r}"
            )

    def quant_config(self) -> QuantConfig:
        names = ("group_size", "symmetric", "entries", "method", "percentile", "dynamic_int8", "embeddings")
        given = {name: getattr(self, name) for name in names}
        return QuantConfig(self.format or f"int{self.bits}", **given, convolutions=False)  # MlcoreConfig can't describe them


def _description(module: PackedModule) -> dict:
    """What of a low-bit layer isn't in its tensors' values: enough to make room for these."""
    packed = module.packed
    about = {name: getattr(packed, name) for name in _NUMBERS}
    about["parts"] = [name for name in _OPTIONAL if getattr(module, name, None) is not None]
    about["tables"] = 0 if packed.codebook is None else len(packed.codebook)
    if isinstance(module, nn.QuantLinear):
        about |= {"dynamic_int8": module.dynamic_int8, "activation": module.activation}
    return about


def _room(name: str, module: torch.nn.Module, about: dict) -> PackedModule:
    """A low-bit layer of tensors without data, for a layer that is a linear or embedding one."""
    linear = isinstance(module, torch.nn.Linear)
    wanted = {*_NUMBERS, "parts", "tables"} | ({"dynamic_int8", "activation"} if linear else set())
    if not isinstance(module, torch.nn.Linear | torch.nn.Embedding) or not isinstance(about, dict) or about.keys() != wanted:
        raise ValueError(
            f"MlcoreConfig: layers describes {name!r} by {about!r}, which is no {type(module).__name__} of mlcore's"
        )
    shape = tuple(module.weight.shape)
    try:
        g = Geometry(*shape, about["bits"], about["group_size"])
        shapes = {"codes": g.codes_shape, "scales": g.vectors_shape, "zeros": g.vectors_shape}
        shapes["codebook"] = (about["tables"], 2 ** about["bits"])
        there = {"codes", "scales", *about["parts"]}
        tensors = {
            part: torch.empty(shapes[part], dtype=dtype, device="meta") if part in there else None
            for part, dtype in _PARTS.items()
        }
        packed = PackedWeight(**tensors, shape=shape, **{key: about[key] for key in _NUMBERS})
    except (TypeError, KeyError, IndexError, ZeroDivisionError, ValueError, RuntimeError) as error:
        raise ValueError(f"MlcoreConfig: layers describes {name!r} wrongly: {error}") from None
    if not linear:
        return nn.QuantEmbedding.from_packed(packed, module.weight.dtype)
    layer = nn.QuantLinear.__new__(nn.QuantLinear)
    scale = torch.empty(shape[1], dtype=torch.float32, device="meta") if "input_scale" in there else None
    layer._build(packed, module.bias, about["activation"], about["dynamic_int8"], scale)
    return layer


class MlcoreQuantizer(HfQuantizer):
    """Called by from_pretrained: quantizes a model that was loaded in floating point, or makes room for a quantized one's
    tensors before they are loaded and checks them after.
    """

    requires_calibration = False
    quantization_config: MlcoreConfig

    def _process_model_before_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            return model
        layers = self.quantization_config.layers
        if not isinstance(layers, dict):
            raise ValueError(f"MlcoreConfig: a saved model's layers must be an object; got {type(layers).__name__}")
        for name, about in layers.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"MlcoreConfig: layers names {name!r}, which the model lacks") from None
            model.set_submodule(name, _room(name, module, about))
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            left = self.get_modules_to_not_convert(
                model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
            )
            config = self.quantization_config.quant_config()
            model.quantization_report = quantize(model, config, lambda module, name: should_convert_module(name, left))
            self.quantization_config.layers = _layers(model)
            return model
        buffers = dict(model.named_buffers())
        loaded = {name for name, t in buffers.items() if getattr(t, "_is_hf_initialized", False)}
        for name in self.quantization_config.layers:
            module = model.get_submodule(name)
            # transformers fills what the file lacks with whatever the memory holds, and only warns.
            missing = [n for n in module._buffers if module._buffers[n] is not None and f"{name}.{n}" not in loaded]
            if missing:
                raise ValueError(f"MlcoreConfig: the file lacks {', '.join(missing)} of {name!r}")
            try:
                if tuple(module.form.tolist()) != module._numbers:
                    raise ValueError(f"form is {module.form.tolist()}, config.json says {list(module._numbers)}")
                module.packed.check_finite()
                if getattr(module, "input_scale", None) is not None and not bool(module.input_scale.isfinite().all()):
                    raise ValueError("input_scale must be finite")
            except ValueError as error:
                raise ValueError(f"MlcoreConfig: {name}: {error}") from None
        return model

    def _dequantize(self, model, dtype=None):
        for name in _layers(model):
            module = model.get_submodule(name)
            weight = module.packed.dequantize()
            if getattr(module, "input_scale", None) is not None:
                weight = weight * module.input_scale
            weight = weight.to(dtype or torch.float32)
            if isinstance(module, nn.QuantEmbedding):
                layer = torch.nn.Embedding.from_pretrained(weight, freeze=False)
            else:
                if module.activation is not None:
                    raise ValueError(f"dequantize: {name} has activation {module.activation!r}, which torch.nn.Linear lacks")
                layer = torch.nn.Linear(1, 1, bias=False)
                layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
                layer.weight = torch.nn.Parameter(weight)
                layer.register_parameter("bias", module.bias)
            model.set_submodule(name, layer.train(module.training))
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # gradients reach the input and biases: what adapters need

    @property
    def is_compileable(self) -> bool:
        return True


def _layers(model: torch.nn.Module) -> dict[str, dict]:
    return {name: _description(module) for name, module in model.named_modules() if isinstance(module, PackedModule)}


def attach(model) -> None:
    """Makes a transformers model that mlcore.quantize (or convert) changed one that save_pretrained and from_pretrained know as
    quantized: its config says how each low-bit layer is stored.

    Raises:
        ValueError: model is no transformers model, has no low-bit layer, or a low-bit convolution, which has no description.
    """
    import transformers

    layers = _layers(model) if isinstance(model, transformers.PreTrainedModel) else {}
    if not layers:
        raise ValueError(f"attach: model must be a transformers model with low-bit layers; got {type(model).__name__}")
    if convolutions := [name for name in layers if isinstance(model.get_submodule(name), nn.QuantConv2d)]:
        raise ValueError(f"attach: model must have no low-bit convolutions; got {', '.join(convolutions)}")
    config = MlcoreConfig(layers=layers)
    model.hf_quantizer = MlcoreQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method


if "mlcore" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("mlcore")(MlcoreConfig)
    register_quantizer("mlcore")(MlcoreQuantizer)
