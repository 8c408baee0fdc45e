"""How much of the image a unit sees: sizes and strides of receptive fields, found by running a model once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..nn import DepthwiseSeparableConv2d, PointwiseConv2d


@dataclass(frozen=True)
class Field:
    """A unit of a layer sees size[i] pixels of the image along H and W; its neighbour the same ones, stride[i] further."""

    size: tuple[int, int]
    stride: tuple[int, int]


_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
_WINDOWS = (nn.Conv2d, *_POOLS)
_BLOCKS = (DepthwiseSeparableConv2d, PointwiseConv2d)  # one op: their layers may not be called


def _pair(v):
    return (v, v) if isinstance(v, int) else tuple(v)


def _through(layer, before: Field) -> Field:
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride if layer.stride is not None else layer.kernel_size)
    dilation = _pair(getattr(layer, "dilation", 1))
    size = tuple(n + (k - 1) * d * j for n, k, d, j in zip(before.size, kernel, dilation, before.stride, strict=True))
    return Field(size, tuple(a * b for a, b in zip(before.stride, stride, strict=True)))


def _join(fields: list[Field]) -> Field:
    """Of what reads all of them: the largest size; strides are the same where shapes are."""
    return Field(*(tuple(max(getattr(f, name)[i] for f in fields) for i in (0, 1)) for name in ("size", "stride")))


class _Follow(TorchFunctionMode):
    """Gives the results of torch's functions the field of their operands."""

    def __init__(self, fields) -> None:
        super().__init__()
        self.fields = fields

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and id(out) not in self.fields:
            flat = [t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,))]
            known = [self.fields[id(t)][0] for t in flat if isinstance(t, torch.Tensor) and id(t) in self.fields]
            if known:
                self.fields[id(out)] = _join(known), out  # the tensor is kept, so that its id stays its own
        return out


def receptive_field(model: nn.Module, image: tuple[int, int, int] | None = None) -> dict[str, Field]:
    """The field of every convolution and pooling layer of a model, by name, in the order in which they run. Branches that meet
    again (x + f(x)) count with the larger field. Layers after a mean over the image or a flattening see all of it and aren't
    listed. Borders and strides of torch.nn's layers count; a window that is moved by plain functions doesn't.

    Args:
        model: a network of images; run once in eval mode on zeros.
        image: (channels, H, W); where left out that of model.config, else (channels of the first convolution, 64, 64).

    Raises:
        ValueError: the model has no convolution.
    """
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        raise ValueError(f"receptive_field: {type(model).__name__} has no torch.nn.Conv2d")
    config = getattr(model, "config", None)
    if image is None:
        board = getattr(config, "board", None)
        image = getattr(config, "image", None) or (convs[0].in_channels, board or 64, board or 64)
    x = torch.zeros(1, *image, device=convs[0].weight.device, dtype=convs[0].weight.dtype)
    fields: dict[int, tuple[Field, torch.Tensor]] = {id(x): (Field((1, 1), (1, 1)), x)}
    found: dict[str, Field] = {}

    def hook(name):
        def after(layer, args, out):
            before = fields.get(id(args[0]))
            if before is None:
                return
            if isinstance(layer, _BLOCKS):
                now = before[0]
                for part in ("depthwise", "pointwise"):
                    if hasattr(layer, part):
                        found[f"{name}.{part}"] = now = _through(getattr(layer, part), now)
                if len(args) > 1 and isinstance(args[1], torch.Tensor) and id(args[1]) in fields:
                    now = _join([now, fields[id(args[1])][0]])
            elif isinstance(layer, _WINDOWS):
                found[name] = now = _through(layer, before[0])
            else:  # a layer of another kind passes the field on; its own layers have set what they change
                if id(out) in fields or not isinstance(out, torch.Tensor):
                    return
                now = before[0]
            fields[id(out)] = now, out

        return after

    inside = {id(c) for m in model.modules() if isinstance(m, _BLOCKS) for c in m.modules() if c is not m}
    leaves = [(n, m) for n, m in model.named_modules() if isinstance(m, _BLOCKS) or not any(m.children())]
    handles = [m.register_forward_hook(hook(n)) for n, m in leaves if id(m) not in inside]
    training = model.training
    try:
        with torch.no_grad(), _Follow(fields):
            model.eval()(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found
