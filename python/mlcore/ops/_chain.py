"""PackedChain: a whole network of packed convolutions in one call of the kernel. The table that it hands over is described in
kernels/separable_conv/separable_conv.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .._registry import direct, kernel, needs_grad
from ._separable import OP
from .separable_conv import PackedConv, PackedSeparable, _numbers

_KINDS = {"patches": 0, "pointwise": 1, "separable": 2, "mean": 3}
_PANEL, _LANES = 64, 16  # kBlock of separable_conv_kernels.h, and what widths and offsets are multiples of


class _Weights:
    """Tensors one after the other in one float32 tensor."""

    def __init__(self) -> None:
        self._parts, self._size = [], 0

    def add(self, t):
        """Where t begins."""
        begin, t = self._size, t.detach().float().reshape(-1)
        self._parts.append((begin, t))
        self._size += -(-t.numel() // _LANES) * _LANES
        return begin

    def panels(self, matrix):
        """(K, N), for every 64 columns (K, columns rounded up to 16)."""
        parts = []
        for columns in matrix.split(_PANEL, 1):
            parts.append(torch.nn.functional.pad(columns, (0, -columns.shape[1] % _LANES)).reshape(-1))
        return self.add(torch.cat(parts))

    def bias(self, bias, size):
        padded = torch.zeros(-(-size // _PANEL) * _PANEL)
        if bias is not None:
            padded[:size] = bias
        return self.add(padded)

    def together(self):
        whole = torch.empty(self._size)
        kernel(OP, "reserve", "cpu")(whole)
        whole.zero_()
        for begin, t in self._parts:
            whole[begin : begin + t.numel()] = t
        return whole


class PackedChain:
    """Packed layers one after the other as one op: what is between them never leaves the kernel's own memory. Without
    gradients, float32, on the CPU.

    Args:
        layers: PackedSeparable (one filter a channel) with or without its depthwise half, "mean" (over H and W), and as the
            first one maybe a PackedConv. Their weights are copied.
        residuals: {i: j}: the result of layer j < i is added to that of layer i, behind its activation.

    Calling it with x (N, C, H, W) of any strides gives y (N, J, Ho, Wo), channels_last. Equal to the layers one by one but for
    float32's rounding; bits depend neither on the number of threads nor on the rest of the batch.

    Raises:
        ValueError: layers or residuals break these rules; or, when it is called, x's dtype, device or shape.
    """

    def __init__(self, layers: Sequence, residuals: Mapping[int, int] = {}) -> None:
        if not layers:
            raise ValueError("PackedChain: there must be layers; got none")
        weights, rows, self._layers = _Weights(), [], []
        for i, layer in enumerate(layers):
            before = rows[-1][2] if rows else None
            rows.append([*self._row(weights, i, layer, before), residuals.get(i, -1)])
        for i, j in residuals.items():
            if not 0 <= j < i < len(layers):
                raise ValueError(
                    f"PackedChain: a residual must come from an earlier layer; got {i}: {j} of {len(layers)} layers"
                )
        self._in_channels, self._filters = rows[0][1], rows[0][0] == _KINDS["patches"]
        # kind, C, J, sizes, f, g, residual, offsets
        self._table = torch.tensor([[*r[:15], r[19], *r[15:19]] for r in rows])
        self._weights, self._kernel, self._sizes = weights.together(), kernel(OP, "chain", "cpu"), {}

    def _row(self, weights, i, layer, before):
        """The table's row but for the residual, which follows."""
        if isinstance(layer, str):
            if layer != "mean" or before is None:
                raise ValueError(f'PackedChain: layer {i} must be packed, or "mean" behind another; got {layer!r}')
            self._layers.append(None)
            return (_KINDS["mean"], before, before, *(1,) * 6, *(0,) * 4, 0, 0, *(0,) * 4)
        if type(layer) not in (PackedConv, PackedSeparable) or (type(layer) is PackedConv and i > 0):
            raise ValueError(
                f"PackedChain: layer {i} must be a PackedSeparable, or the first a PackedConv; got {type(layer).__name__}"
            )
        conv, J = type(layer) is PackedConv, layer._channels
        filters = layer._filter if conv else layer._depthwise
        hidden = layer._filter.numel() * layer._in_channels if conv else layer._hidden
        C = layer._in_channels if conv else hidden
        if before not in (None, C):
            raise ValueError(f"PackedChain: layer {i} must take the {before} channels of the one before; got {C}")
        if (
            not conv
            and filters is None
            and not (layer._f == 0 and layer._scale is None and layer._shift is None and layer._words == (1, 0, 1))
        ):  # something is done with x: a filter of one tap
            filters = torch.ones(hidden, 1, 1) if layer._scale is None else layer._scale.view(-1, 1, 1)
        size = (1, 1) if filters is None else tuple(filters.shape[1:])
        # Paddings that depend on x's size there are none, so any size tells them.
        numbers = _numbers("PackedChain", torch.empty(1, 1, 1 << 12, 1 << 12, device="meta"), size, *layer._words)
        self._layers.append((size, numbers))
        matrix = layer._blocks.permute(1, 2, 0, 3).reshape(layer._blocks.shape[1] * _PANEL, -1)[:hidden, :J]
        depthwise = shift = 0
        if not conv and filters is not None:
            depthwise = weights.add(filters.permute(1, 2, 0))
            shift = weights.add(torch.zeros(C) if layer._shift is None else layer._shift)
        kind = "patches" if conv else "pointwise" if filters is None else "separable"
        pads = (numbers[4], numbers[6], numbers[5], numbers[7])
        f = 0 if conv else layer._f
        offsets = (depthwise, shift, weights.panels(matrix), weights.bias(layer._bias, J))
        return (_KINDS[kind], C, J, *size, *numbers[:4], *pads, f, layer._g, *offsets)

    def _size(self, shape):
        found = self._sizes.get(shape)
        if found is None:
            if len(shape) != 4 or shape[1] != self._in_channels:
                raise ValueError(f"PackedChain: x must be (N, {self._in_channels}, H, W); got {tuple(shape)}")
            H, W = shape[2:]
            for layer in self._layers:
                if layer is None:
                    H = W = 1
                    continue
                (KH, KW), (sh, sw, dh, dw, top, bottom, left, right) = layer
                H, W = (H + top + bottom - (KH - 1) * dh - 1) // sh + 1, (W + left + right - (KW - 1) * dw - 1) // sw + 1
            if len(self._sizes) >= 1024:
                self._sizes.clear()
            found = self._sizes[shape] = (shape[0], max(H, 0), max(W, 0), int(self._table[-1, 2]))
        return found

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the chain can take this call: float32 on the CPU, nothing recorded, traced or transformed."""
        return x.dtype == torch.float32 and x.is_cpu and direct(x) and not needs_grad(x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if needs_grad(x):
            raise ValueError("PackedChain: it has no gradients; call it under torch.no_grad()")
        if x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(f"PackedChain: x must be torch.float32 on the CPU; got {x.dtype} on {x.device}")
        if not direct(x):
            raise ValueError("PackedChain: it can't be traced or transformed; call its layers instead")
        size = self._size(x.shape)
        if not self._filters:
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        y = torch.empty(size).permute(0, 3, 1, 2)
        self._kernel(x, self._weights, self._table, y)
        return y
