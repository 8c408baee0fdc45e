"""PackedSigns: activations as bits, what binary ops take and give so that they stay packed between layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..quant import PackedWeight
from ..quant._layout import LAYOUTS, Geometry


@dataclass(frozen=True, eq=False)
class PackedSigns:
    """Signs along a last dimension of `features`, 32 a word, and optionally a scale for each row of them.

    Args:
        words: (..., ceil(features / 32)) int32; sign k of a word in bit 8 (k % 4) + k / 4, set for +1, padding 0.
        features: how many signs a row has.
        scale: (...) float32, what the row's signs stand for; None is 1.

    Raises:
        ValueError: words and features contradict each other.
    """

    words: torch.Tensor
    features: int
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.words.shape)
        if self.words.dtype != torch.int32 or not shape or shape[-1] != -(-self.features // 32):
            want = f"int32 (..., {-(-self.features // 32)}) for {self.features} features"
            raise ValueError(f"PackedSigns: words must be {want}; got {self.words.dtype} {shape}")
        if self.scale is not None and (self.scale.shape != self.words.shape[:-1] or self.scale.dtype != torch.float32):
            got = f"{self.scale.dtype} {tuple(self.scale.shape)}"
            raise ValueError(f"PackedSigns: scale must be torch.float32 {shape[:-1]}; got {got}")

    @property
    def device(self) -> torch.device:
        return self.words.device


def check_weight(op: str, packed: PackedWeight, group_size: int) -> None:
    """Raises where the weight isn't of signs in groups of group_size."""
    if packed.format != "binary" or packed.layout != "panel16":
        raise ValueError(
            f"{op}: packed must have format 'binary' and layout 'panel16'; got {packed.format!r}, {packed.layout!r}"
        )
    if packed.group_size != group_size:
        raise ValueError(f"{op}: packed must have groups of {group_size}; got group_size {packed.group_size}")


def weight_signs(codes: torch.Tensor, N: int, K: int, group_size: int) -> torch.Tensor:
    """(N, K) float32 of -1 and 1 from the codes of a PackedWeight of format "binary"."""
    return 2.0 * LAYOUTS["panel16"].unpack(codes, Geometry(N, K, 1, group_size)) - 1.0


def signs_to_words(b: torch.Tensor) -> torch.Tensor:
    """Words (..., ceil(K / 32)) int32 of b (..., K): sign k in bit 8 (k % 4) + k / 4 of its word, set for +1."""
    K = b.shape[-1]
    bits = torch.nn.functional.pad((~(b < 0)).to(torch.int64), (0, -K % 32)).unflatten(-1, (-(-K // 32), 8, 4))
    at = 8 * torch.arange(4, device=b.device) + torch.arange(8, device=b.device)[:, None]
    words = (bits << at).sum((-1, -2))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def words_to_signs(words: torch.Tensor, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """b (..., K) of -1 and 1."""
    at = 8 * torch.arange(4, device=words.device) + torch.arange(8, device=words.device)[:, None]
    bits = (words.to(torch.int64)[..., None, None] >> at) & 1
    return (2 * bits.flatten(-3)[..., :K] - 1).to(dtype)
