"""mlcore.accelerate: gives layers of an existing model mlcore's classes, in place, and says what it did. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from . import nn

# torch's class -> ours: a subclass with the same parameters, buffers and attributes, so that the class is all that changes.
_LAYERS = {
    torch.nn.Conv1d: nn.DepthwiseConv1d,
    torch.nn.Conv2d: nn.DepthwiseConv2d,
    torch.nn.Conv3d: nn.DepthwiseConv3d,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.RMSNorm: nn.RMSNorm,
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Report:
    """What accelerate did: layers by their names in the model."""

    swapped: dict[str, str] = field(default_factory=dict)  # name -> the new class
    left: dict[str, str] = field(default_factory=dict)  # name -> why it stayed as it was

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} layers, left {len(self.left)} of the kinds that mlcore has"]
        lines += [f"  {name}: now {what}" for name, what in self.swapped.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def _better_in_torch(conv: torch.nn.modules.conv._ConvNd) -> str | None:
    """Why a depthwise convolution stays torch's, None where ours was as fast or faster: bench/bench_depthwise_conv.py, two
    threads with AVX-512, against torch in the same layout. One dimension is about ten times as fast and three dimensions three
    times; 3x3 in channels_last 0.8 to 1.8 of torch in inference and 0.95 to 1.4 in backward; larger and dilated kernels two to
    eight times forward with backward, but 0.7 to 0.97 in inference.
    """
    if conv.weight.device.type != "cpu":
        return f"its weight is on {conv.weight.device}, where only the CPU's kernels were measured"
    if conv.out_channels != conv.in_channels:
        return (
            f"{conv.out_channels // conv.in_channels} filters a channel: "
            "mlcore's kernels take these a lane at a time in channels_last, torch's don't"
        )
    larger = conv.weight[0].numel() > 9 or any(d > 1 for d in conv.dilation)
    if isinstance(conv, torch.nn.Conv2d) and larger and not conv.training:
        return "in inference torch is faster at larger and dilated kernels; in training mode it would be swapped"
    if conv.weight[0].numel() == 1:
        return "a kernel of one tap is a multiplication, which torch does as fast"
    return None


def _reason(module: torch.nn.Module, stock: type) -> str | None:
    """None where mlcore serves the layer, else why it is left."""
    if type(module) is not stock:
        return f"{type(module).__name__} is a subclass of {stock.__name__} and may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        if module.groups != module.in_channels or module.groups == 1:
            return f"not depthwise: {module.groups} groups of {module.in_channels} channels"
        if (reason := _better_in_torch(module)) is not None:
            return reason
    for name, p in module.named_parameters():
        if p.dtype not in _FLOATS:
            return f"{name} is {p.dtype}, which the kernels don't take"
    return None


def accelerate(model: torch.nn.Module) -> Report:
    """Swaps the layers of a model that mlcore serves better, in place: depthwise convolutions, MultiheadAttention, LayerNorm
    and RMSNorm. A layer keeps its identity, parameters, hooks and state_dict; only its class changes. The report says what
    was left to torch, by which rule.

    Args:
        model: any module; model itself may be such a layer.

    Returns:
        Which layers were swapped, and which ones of these kinds were left and why; print it.

    Raises:
        ValueError: model is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"accelerate: model must be a torch.nn.Module; got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        stock = next((s for s in _LAYERS if isinstance(module, s)), None)
        if stock is None or isinstance(module, (*_LAYERS.values(), nn.CausalConv1d)):
            continue
        reason = _reason(module, stock)
        if reason is None:
            module.__class__ = _LAYERS[stock]
            report.swapped[name or "(model)"] = f"mlcore.nn.{_LAYERS[stock].__name__}"
        else:
            report.left[name or "(model)"] = reason
    return report
