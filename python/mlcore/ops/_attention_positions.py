"""What stands beside attention: biases that depend on distance alone, and the merging of partial results by their lse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def alibi_slopes(heads: int, device=None) -> torch.Tensor:
    """The fixed slopes of ALiBi (Press et al. 2022, "Train Short, Test Long"): (heads,) float32, a geometric sequence.

    For a number of heads that is no power of two, those of the next lower power and every second of the next higher.

    Raises:
        ValueError: heads is below 1.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads must be at least 1; got {heads}")
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (n + 1) / power) for n in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * n + 1) / power) for n in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def t5_buckets(distance: torch.Tensor, buckets: int = 32, bidirectional: bool = True, max_distance: int = 128) -> torch.Tensor:
    """T5's bucket of each distance key - query: near ones each their own, far ones by their logarithm (Raffel et al. 2020).

    Args:
        distance: integers.
        buckets: how many there are; bidirectional uses half of them for keys behind the query.
        bidirectional: False puts all keys behind the query into bucket 0.
        max_distance: all distances from here on share the last bucket.
    """
    base = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0).to(distance.dtype) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + far.to(distance.dtype)).clamp(max=buckets - 1)
    return base + torch.where(distance < exact, distance, far)


def t5_relative(table: torch.Tensor, Tq: int, Tk: int, *, bidirectional: bool = True, max_distance: int = 128) -> torch.Tensor:
    """T5's relative position bias for ``attention(..., relative=...)``: (H, Tq + Tk - 1), differentiable in the table.

    Args:
        table: (buckets, H), as the weight of T5's relative_attention_bias.
        Tq, Tk: lengths; the last query meets the last key.
        bidirectional, max_distance: as t5_buckets.

    Raises:
        ValueError: table is not a matrix.
    """
    if table.dim() != 2:
        raise ValueError(f"t5_relative: table must be (buckets, H); got shape {tuple(table.shape)}")
    distance = torch.arange(Tq + Tk - 1, device=table.device) - (Tk - 1)
    return table[t5_buckets(distance, table.shape[0], bidirectional, max_distance)].transpose(0, 1)


def merge_attention(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint sets of keys, from the results over each: (o, lse) of ``return_lse=True``.

    o = sum_n exp(lse_n - lse) o_n with lse = log sum_n exp(lse_n). Differentiable. A part that saw nothing (lse = -inf) adds
    nothing, whatever its o holds.

    Args:
        parts: pairs o (..., T, Dv), lse (..., T).

    Raises:
        ValueError: no part, or shapes that differ.
    """
    parts = list(parts)
    if not parts or any(o.shape != parts[0][0].shape or lse.shape != o.shape[:-1] for o, lse in parts):
        shapes = [(tuple(o.shape), tuple(lse.shape)) for o, lse in parts]
        raise ValueError(f"merge_attention: parts must be pairs o (..., T, Dv), lse (..., T) of equal shapes; got {shapes}")
    stacked = torch.stack([lse for _, lse in parts])
    top = stacked.detach().amax(0)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = torch.exp(stacked - top)
    total = weights.sum(0)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    weights = (weights / safe).unsqueeze(-1)
    o = sum(torch.where(w > 0, w * o.to(w.dtype), 0.0) for w, (o, _) in zip(weights, parts))
    lse = torch.where(seen, torch.log(safe) + top, float("-inf"))
    return o.to(parts[0][0].dtype), lse
