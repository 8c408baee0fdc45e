"""Attention within groups of tokens that were gathered from anywhere: by hash, by cluster, by a learned order.

permute -> attention within each group, and to groups before it -> merge of what each token got, by lse -> un-permute. The
attention is mlcore.ops.attention's kernel over many small problems, so a call costs what its groups cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .attention import attention


def gathered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_index: torch.Tensor,
    k_index: torch.Tensor | None = None,
    *,
    look_back: int = 0,
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Each query attends to the keys of its group, and to those of the look_back groups before it.

    A token may stand in several groups, and so may a pair: its weight then counts as often as query and key meet, as in the
    rounds of LSH attention (Kitaev et al. 2020, "Reformer"). A query that meets no key gives o = 0, lse = -inf and no gradient.
    Time and memory are linear in the number of slots: with groups of c queries and m keys, n c (look_back + 1) m pairs.

    Args:
        q: (B, H, Tq, D); k: (B, H, Tk, D); v: (B, H, Tk, Dv); floating, any strides.
        q_index: (B, H, n, c) integers: which queries stand in the c slots of each of n groups; -1 is an empty slot.
        k_index: (B, H, n, m): the same for keys; None is q_index.
        look_back: how many groups before its own a group sees. The first ones see fewer.
        rule: rule(i, j), of queries' and keys' numbers (..., c, 1) and (..., 1, keys), gives which of them meet, as booleans;
            None: all in a group do.
        scale, dropout_p, impl: as mlcore.ops.attention.
        return_lse: also return the log of the softmax's denominator.

    Returns:
        o (B, H, Tq, Dv), with return_lse also lse (B, H, Tq) float32 (float64 for float64). Both are differentiable.

    Raises:
        ValueError: shapes break the rules above.
    """
    k_index = q_index if k_index is None else k_index
    for name, t, like in (("q_index", q_index, q), ("k_index", k_index, k)):
        if t.dim() != 4 or t.shape[:2] != like.shape[:2] or t.is_floating_point():
            raise ValueError(
                f"gathered_attention: {name} must be integers (B, H, n, slots) with B, H = {tuple(like.shape[:2])}; "
                f"got {t.dtype}, {tuple(t.shape)}"
            )
    if k_index.shape[2] != q_index.shape[2]:
        raise ValueError(f"gathered_attention: k_index must have q_index's {q_index.shape[2]} groups; got {k_index.shape[2]}")
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(f"gathered_attention: k must have q's batch and heads {tuple(q.shape[:2])}; got {tuple(k.shape[:2])}")
    if look_back < 0:
        raise ValueError(f"gathered_attention: look_back must not be negative; got {look_back}")
    B, H, Tq, _ = q.shape
    n, c = q_index.shape[2:]
    keys = (_rows(k, k_index), _rows(v, k_index))  # (B, H, n, m, D)
    keys = tuple(_with_previous(t, look_back) for t in keys)
    j = _with_previous(k_index, look_back, -1)
    seen = None
    if rule is not None:
        seen = rule(q_index.unsqueeze(-1), j.unsqueeze(-2))
    if look_back or bool((j < 0).any()):
        there = (j >= 0).unsqueeze(-2)
        seen = there if seen is None else seen & there
    o, lse = attention(
        _rows(q, q_index).flatten(0, 1),
        *(t.flatten(0, 1) for t in keys),
        pattern=None if seen is None else seen.expand(B, H, n, *seen.shape[-2:]).flatten(0, 1),
        scale=scale,
        dropout_p=dropout_p,
        return_lse=True,
        impl=impl,
    )
    o, lse = _merged(o.reshape(B, H, n * c, v.shape[3]), lse.reshape(B, H, n * c), q_index.flatten(2), Tq)
    return (o, lse) if return_lse else o


def _flat(index: torch.Tensor, T: int) -> torch.Tensor:
    """Numbers of rows among all of (B, H, T, ...), one dimension; empty slots take row 0 of their head."""
    B, H = index.shape[:2]
    first = torch.arange(B * H, device=index.device).view(B, H, *[1] * (index.dim() - 2)) * T
    return (index.clamp(min=0) + first).flatten()


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, H, n, slots, D): rows of x (B, H, T, D). An embedding's backward adds rows up in parallel and in a fixed order."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_zeros(*index.shape, x.shape[-1])
    return F.embedding(_flat(index, x.shape[2]), rows).view(*index.shape, x.shape[-1])


def _with_previous(x: torch.Tensor, look_back: int, fill: int = 0) -> torch.Tensor:
    """Slots of the look_back groups before it in front of each group's own: dimension 3 of (B, H, n, slots, ...)."""
    if not look_back:
        return x
    n, own = x.shape[2], [0, 0] * (x.dim() - 3)
    parts = [F.pad(x, (*own, back, 0), value=fill)[:, :, :n] for back in range(look_back, 0, -1)]
    return torch.cat([*parts, x], 3)


def _merged(o: torch.Tensor, lse: torch.Tensor, index: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, H, T, Dv) and lse (B, H, T) of all slots of each token: o (B, H, slots, Dv), lse and index (B, H, slots)."""
    B, H, _, Dv = o.shape
    lse = lse.masked_fill(index < 0, float("-inf"))
    at, rows = _flat(index, T), B * H * T
    top = lse.new_full((rows,), float("-inf")).scatter_reduce(0, at, lse.detach().flatten(), "amax")
    top = torch.where(top == float("-inf"), 0.0, top)
    weight = torch.exp(lse.flatten() - top[at])
    total = lse.new_zeros(rows).scatter_add(0, at, weight)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    share = (weight / safe[at]).unsqueeze(-1)
    parts = torch.where(share > 0, share * o.reshape(-1, Dv).to(share.dtype), 0.0)
    merged = parts.new_zeros(rows, Dv).scatter_add(0, at.unsqueeze(-1).expand(-1, Dv), parts)
    lse = torch.where(some, torch.log(safe) + top, float("-inf"))
    return merged.to(o.dtype).view(B, H, T, Dv), lse.view(B, H, T)
