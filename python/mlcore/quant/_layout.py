"""How codes lie in memory: a layout is three functions between codes (N, K) and bytes, and knows nothing of their meaning.

"panel16", what the CPU kernels read, is described in kernels/quant_linear/quant_linear.h. Another layout is one more entry of
LAYOUTS; PackedWeight carries the name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS = 16  # of a panel


def planes(bits: int) -> list[int]:
    """bits as a sum of powers of two, largest first."""
    return [p for p in (8, 4, 2, 1) if bits & p]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a packed (N, K) weight: groups along K, each padded to whole blocks of codes."""

    N: int
    K: int
    bits: int
    group_size: int

    @property
    def block(self) -> int:
        return 32 // planes(self.bits)[-1]

    @property
    def groups(self) -> int:
        return -(-self.K // self.group_size)

    @property
    def panels(self) -> int:
        return -(-self.N // ROWS)

    @property
    def group_padded(self) -> int:
        return -(-self.group_size // self.block) * self.block

    @property
    def K_padded(self) -> int:
        if not self.K:
            return 0
        last = self.K - (self.groups - 1) * self.group_size
        return (self.groups - 1) * self.group_padded + -(-last // self.block) * self.block

    @property
    def codes_shape(self) -> tuple[int, int]:
        return self.panels, self.K_padded * ROWS * self.bits // 8

    @property
    def vectors_shape(self) -> tuple[int, int, int]:
        return self.panels, self.groups, ROWS


def _to_panels(codes: torch.Tensor, g: Geometry) -> torch.Tensor:
    """(N, K) uint8 to (P, blocks, units of 4 codes, 16 rows, 4): padded with zeros."""
    padded = codes.new_zeros(g.panels * ROWS, g.groups * g.group_size)
    padded[: g.N, : g.K] = codes
    grouped = torch.nn.functional.pad(padded.view(-1, g.groups, g.group_size), (0, g.group_padded - g.group_size))
    rows = grouped.reshape(g.panels, ROWS, -1)[..., : g.K_padded]
    return rows.reshape(g.panels, ROWS, -1, g.block // 4, 4).permute(0, 2, 3, 1, 4)


def _without_padding(rows: torch.Tensor, g: Geometry) -> torch.Tensor:
    """(n, K_padded) to (n, K)."""
    full = torch.nn.functional.pad(rows, (0, g.groups * g.group_padded - g.K_padded))
    grouped = full.view(-1, g.groups, g.group_padded)[..., : g.group_size]
    return grouped.reshape(len(rows), g.groups * g.group_size)[:, : g.K].contiguous()


def _pack_panel16(codes: torch.Tensor, g: Geometry) -> torch.Tensor:
    if 0 in (g.N, g.K):
        return codes.new_zeros(g.codes_shape)
    units = _to_panels(codes, g)  # (P, blocks, units, 16, 4)
    parts, low = [], 0
    for power in planes(g.bits):
        per = 8 // power
        field = (units >> low) & ((1 << power) - 1)
        field = field.reshape(*units.shape[:2], -1, per, ROWS * 4)
        shifts = torch.arange(per, dtype=torch.uint8, device=codes.device) * power
        parts.append((field << shifts[:, None]).sum(3, dtype=torch.uint8).flatten(2))
        low += power
    return torch.cat(parts, -1).reshape(g.codes_shape)


def _codes_of(vectors: torch.Tensor, g: Geometry) -> torch.Tensor:
    """(panels, vectors, rows, 4) bytes of panels of `rows` rows to their codes (panels * rows, K)."""
    panels, _, rows, _ = vectors.shape
    units_per_block = g.block // 4
    blocks = vectors.reshape(panels, -1, units_per_block * g.bits // 8, rows * 4)
    units, low, start = torch.zeros((), dtype=torch.uint8, device=vectors.device), 0, 0
    for power in planes(g.bits):
        per = 8 // power
        size = units_per_block // per
        field = blocks[:, :, start : start + size, None]
        shifts = torch.arange(per, dtype=torch.uint8, device=vectors.device) * power
        units = units | (((field >> shifts[:, None]) & ((1 << power) - 1)) << low).flatten(2, 3)
        low, start = low + power, start + size
    by_row = units.reshape(panels, -1, rows, 4).transpose(1, 2)
    return _without_padding(by_row.reshape(panels * rows, g.K_padded), g)


def _unpack_panel16(data: torch.Tensor, g: Geometry) -> torch.Tensor:
    if 0 in (g.N, g.K):
        return data.new_zeros(g.N, g.K)
    return _codes_of(data.view(g.panels, -1, ROWS, 4), g)[: g.N]


def _rows_panel16(data: torch.Tensor, g: Geometry, rows: torch.Tensor) -> torch.Tensor:
    if 0 in (g.K, rows.numel()):
        return data.new_zeros(rows.numel(), g.K)
    return _codes_of(data.view(g.panels, -1, ROWS, 4)[rows // ROWS, :, rows % ROWS].unsqueeze(2), g)


def to_vectors(values: torch.Tensor, g: Geometry, fill: float) -> torch.Tensor:
    """(N, G), one number a group, to (P, G, 16)."""
    padded = values.new_full((g.panels * ROWS, g.groups), fill)
    padded[: g.N] = values
    return padded.view(g.panels, ROWS, g.groups).transpose(1, 2).contiguous()


def from_vectors(vectors: torch.Tensor, g: Geometry) -> torch.Tensor:
    return vectors.transpose(1, 2).reshape(g.panels * ROWS, g.groups)[: g.N].contiguous()


@dataclass(frozen=True)
class Layout:
    pack: Callable  # (codes (N, K) uint8, geometry) -> bytes
    unpack: Callable  # (bytes, geometry) -> codes
    rows: Callable  # (bytes, geometry, numbers (n) of rows) -> codes (n, K)


LAYOUTS = {"panel16": Layout(_pack_panel16, _unpack_panel16, _rows_panel16)}
