"""PackedSigns: activations as bits, what binary ops take and give so that they stay packed between layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._registry import direct, register
from ..quant import PackedWeight
from ..quant._layout import LAYOUTS, Geometry
from ._straight_through import check_estimator

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def new_words(x: torch.Tensor, lead, features, scaled: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for the words of rows of `features` signs, and for their scale."""
    words = x.new_empty(*lead, -(-features // 32), dtype=torch.int32)
    return words, x.new_empty(lead, dtype=torch.float32) if scaled else None


def register_pack(op: str, run: Callable, rows: Callable) -> tuple[torch._ops.OpOverload, Callable]:
    """mlcore::<op>_pack over run(x, scaled, impl) -> words, scale or None, with rows(x) -> (lead, features); and what calls
    one of the two.
    """

    def all_there(x, words, scale):  # a schema has a fixed number of outputs
        return words, x.new_empty(0, dtype=torch.float32) if scale is None else scale

    def launch(x, scaled, impl):
        return all_there(x, *run(x, scaled, impl))

    def fake(x, scaled, impl):
        return all_there(x, *new_words(x, *rows(x), scaled))

    schema = f"{op}_pack(Tensor x, bool scaled, str impl) -> (Tensor words, Tensor scale)"
    handle = register(schema, launch=launch, fake=fake)

    def pack(x, scaled, impl):
        if direct(x):
            return run(x, scaled, impl)
        words, scale = handle(x, scaled, impl)
        return words, scale if scaled else None

    return handle, pack


def check_others(op: str, x, packed: PackedWeight, bias, scaled: bool, estimator: str, packed_output: bool, dtype) -> None:
    """What binary ops ask of everything but shapes of x and the weight."""
    check_estimator(op, estimator)
    N = packed.shape[0]
    if isinstance(x, PackedSigns):
        if scaled:
            raise ValueError(f"{op}: activation_scale belongs to the packing where x is packed; got activation_scale=True")
    elif x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be a floating-point tensor; got {x.dtype}")
    if bias is not None and (bias.shape != (N,) or not bias.is_floating_point()):
        raise ValueError(f"{op}: bias must be floating, ({N},); got {bias.dtype} {tuple(bias.shape)}")
    if dtype is not None and (packed_output or dtype not in FLOATS[1:]):
        raise ValueError(f"{op}: dtype must be None, or of a float result float32, bfloat16 or float16; got {dtype}")
    for name, t in (("packed", packed.codes), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} as x; got {t.device}")


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
