"""What quantize(), prepare_qat() and convert() report, layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


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


def _seconds(call: Callable[[], object]) -> float:
    """The fastest of a few calls."""
    call()
    best, end = math.inf, time.perf_counter() + 0.05
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _conv_seconds(conv: torch.nn.Conv2d, layer, pixels: int) -> tuple[float, float]:
    """Of torch's in the faster layout, and of `layer` in channels_last, for one image of at least so many pixels."""
    spans = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    height = max(math.isqrt(pixels), spans[0])
    x = torch.randn(1, conv.in_channels, height, max(-(-pixels // height), spans[1]), device=conv.weight.device)
    layouts = [x.to(conv.weight.dtype).to(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)]
    before = min(_seconds(lambda x=x: torch.nn.Conv2d.forward(conv, x)) for x in layouts)
    return before, _seconds(lambda: layer(layouts[1]))


def layer_report(name: str, module: torch.nn.Module, packed, input_scale=None, layer=None, measure_rows=None) -> LayerReport:
    """Of a linear, embedding or convolution layer whose weight is packed. measure_rows: times torch's forward and `layer`."""
    weight, approximation = module.weight.detach().flatten(1), packed.dequantize()
    if input_scale is not None:
        approximation = approximation * input_scale
    sizes = weight.nbytes, packed.nbytes, sqnr_db(weight, approximation)
    if measure_rows is None:
        return LayerReport(name, *sizes)
    if isinstance(module, torch.nn.Conv2d):
        with torch.no_grad():
            return LayerReport(name, *sizes, *_conv_seconds(module, layer, measure_rows))
    if isinstance(module, torch.nn.Embedding):
        stock, x = torch.nn.Embedding, torch.arange(measure_rows, device=weight.device) % len(weight)
    else:
        stock, x = torch.nn.Linear, torch.randn(measure_rows, weight.shape[1], device=weight.device).to(weight.dtype)
    with torch.no_grad():
        return LayerReport(name, *sizes, _seconds(lambda: stock.forward(module, x)), _seconds(lambda: layer(x)))
