"""Weights made ready for the GPU kernels of quant_linear, once: what is computed here stays as long as the tensor that it is
made from, and is made again where that was written to.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .quant_linear_ref import round_codebook

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept(t: torch.Tensor, key: Hashable, make: Callable):
    """make(), from the last call with t and key if t has not changed since. A tensor made under torch.inference_mode() doesn't
    count its changes: it is taken as constant."""
    version = None if t.is_inference() else t._version
    made = _kept.setdefault(t, {})
    if key not in made or made[key][0] != version:
        made[key] = version, make()
    return made[key][1]


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """The codes' bytes as int32, in one dimension."""
    return (codes if codes.data_ptr() % 16 == 0 else codes.clone()).flatten().view(torch.int32)


def integer_codebook(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(table (T, E) int8, step (T) float32): the integer mode's codebook."""

    def make():
        table, step = round_codebook(codebook)
        return table.to(torch.int8), step.flatten()

    return kept(codebook, "int8", make)


def exact_codebook(codebook: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(table (T, E) float32, step (T) or None): codebook = table * step, tables up to 1 where float16 could not hold it."""
    if dtype != torch.float16:
        return codebook, None

    def make():
        peak = codebook.abs().amax(1)
        step = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)
        return (codebook / step[:, None]).contiguous(), step

    return kept(codebook, "float16", make)
