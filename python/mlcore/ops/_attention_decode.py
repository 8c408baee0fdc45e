"""Attention over a key-value cache: append, then attend. The same kernels as attention, so a token decoded alone has the bits
that it has in a prefill."""

from __future__ import annotations

import torch

from ..patterns import Causal, Lengths, Pattern, Window
from .attention import attention

_OP = "attention_with_kvcache"


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, "RoFormer") of the first 2R channels of x (..., T, D).

    Args:
        cos, sin: (..., T, R), broadcastable to x's leading dimensions.
        interleaved: pairs are neighbours (GPT-J); False: channels r and r + R (GPT-NeoX, LLaMA).
    """
    R = cos.shape[-1]
    if x.shape[-1] < 2 * R or cos.shape != sin.shape:
        raise ValueError(
            f"rotate: cos and sin must be (..., T, R) with 2 R <= D = {x.shape[-1]}; got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    cos, sin = cos.to(torch.float32), sin.to(torch.float32)
    turned, rest = x[..., : 2 * R].to(torch.promote_types(x.dtype, torch.float32)), x[..., 2 * R :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :R], turned[..., R:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: torch.Tensor | int,
    page_table: torch.Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    causal: bool = True,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Writes new keys and values into the cache and attends to all that it then holds. For inference: no gradient.

    Sequence b holds n = cache_seqlens[b] keys; k and v are written at n, n + 1, ...; its queries are the last Tq of the
    n + Tnew positions. What the cache holds beyond them is not looked at. A row's bits don't depend on how many queries come at
    once, nor on the other sequences: prefill and decoding token by token agree exactly.

    Args:
        q: (B, H, Tq, D).
        k_cache, v_cache: (B, Hkv, S, D), (B, Hkv, S, Dv), written in place; with page_table (pages, Hkv, P, D): the pages that
            a sequence uses are then gathered first, which costs a copy of what is attended to.
        k, v: (B, Hkv, Tnew, D), (B, Hkv, Tnew, Dv): appended; None: the cache is complete.
        cache_seqlens: (B,) integers or one number: keys there before the call.
        page_table: (B, n) integers: position t of sequence b is row t % P of page page_table[b, t // P].
        window: (left, right) around each query's position, None for no limit; left counts as in mlcore.patterns.Window.
        causal: a query sees no later key.
        rotary_cos, rotary_sin: (positions, R): q and k are rotated at their positions (see rotate) before k is written.
        rotary_interleaved: as rotate.
        scale, softcap, alibi_slopes, sinks, return_lse, impl: as mlcore.ops.attention.

    Returns:
        o (B, H, Tq, Dv), with return_lse also lse (B, H, Tq) float32.

    Raises:
        ValueError: shapes break the rules above, or the cache has no room for k.
    """
    B, H, Tq, _ = q.shape
    lengths = cache_seqlens if isinstance(cache_seqlens, torch.Tensor) else torch.full((B,), cache_seqlens, dtype=torch.int64)
    if tuple(lengths.shape) != (B,) or lengths.is_floating_point():
        raise ValueError(f"{_OP}: cache_seqlens must be (B,) = ({B},) integers; got {lengths.dtype}, {tuple(lengths.shape)}")
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must be given together")
    lengths = lengths.to("cpu", torch.int64)
    added = 0 if k is None else k.shape[2]
    total = lengths + added
    longest = int(total.max()) if B else 0
    room = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    if B and (int(lengths.min()) < 0 or longest > room):
        raise ValueError(
            f"{_OP}: the cache has room for {room} keys; cache_seqlens {lengths.tolist()} and {added} new need more"
        )
    if page_table is None and k_cache.shape[0] != B:
        raise ValueError(f"{_OP}: k_cache must be for B = {B} sequences; got {k_cache.shape[0]}")
    if page_table is not None and (page_table.dim() != 2 or page_table.shape[0] != B):
        raise ValueError(f"{_OP}: page_table must be (B, n) with B = {B}; got {tuple(page_table.shape)}")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{_OP}: rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None:
        if rotary_cos.shape[0] < longest:
            raise ValueError(f"{_OP}: rotary_cos must hold {longest} positions; got {rotary_cos.shape[0]}")
        q = rotate(q, *_at(rotary_cos, rotary_sin, (total - Tq).clamp(min=0), Tq), rotary_interleaved)
        if k is not None:
            k = rotate(k, *_at(rotary_cos, rotary_sin, lengths, added), rotary_interleaved)
    with torch.no_grad():
        if k is not None:
            _append(k_cache, k, lengths, page_table)
            _append(v_cache, v, lengths, page_table)
        if page_table is None:
            keys, values = k_cache[:, :, :longest], v_cache[:, :, :longest]
        else:
            pages = page_table[:, : -(-longest // k_cache.shape[2])].to(k_cache.device, torch.int64)
            keys, values = (c[pages].transpose(1, 2).flatten(2, 3)[:, :, :longest] for c in (k_cache, v_cache))
        relative = None
        if alibi_slopes is not None:  # distances from each sequence's own end
            distance = (torch.arange(Tq + longest - 1) - (total[:, None, None] - 1)).abs()
            relative = -alibi_slopes.float().reshape(-1, H, 1) * distance
        options = {"scale": scale, "softcap": softcap, "return_lse": True, "impl": impl}
        groups = H // max(k_cache.shape[1], 1)
        if Tq == 1 and groups > 1 and relative is None and sinks is None:  # heads of a group are rows of one tile
            packed = q.reshape(B, k_cache.shape[1], groups, q.shape[3])
            o, lse = attention(packed, keys, values, pattern=_single(total, longest, window), **options)
            o, lse = o.reshape(B, H, 1, o.shape[3]), lse.reshape(B, H, 1)
        else:
            pattern = Lengths(total, None, _around(causal, window))
            if bool((total < Tq).any()):  # queries before the first key see nothing
                pattern = pattern & Lengths(total)
            o, lse = attention(q, keys, values, pattern=pattern, relative=relative, sinks=sinks, **options)
    return (o, lse) if return_lse else o


def _around(causal: bool, window) -> Pattern | None:
    inside = Causal() if causal else None
    if window is not None and window != (None, None):
        inside = Window(*window) if inside is None else inside & Window(*window)
    return inside


def _single(total, longest, window):
    """What the one last query of each sequence sees: the same for all rows. None is everything."""
    left = None if window is None else window[0]
    if left is None and bool((total == longest).all()):
        return None
    j = torch.arange(longest)
    seen = j < total[:, None]
    if left is not None:
        seen &= j >= total[:, None] - 1 - left
    return seen[:, None, None]


def _at(cos, sin, start, count):
    """Rows start[b] .. start[b] + count of the tables, as (B, 1, count, R)."""
    positions = start[:, None] + torch.arange(count)
    return cos[positions][:, None], sin[positions][:, None]


def _append(cache, new, lengths, page_table):
    count = new.shape[2]
    B, fits = lengths.shape[0], (new.shape[1], new.shape[3], new.dtype) == (cache.shape[1], cache.shape[3], cache.dtype)
    if not fits or new.shape[0] != B:
        raise ValueError(
            f"{_OP}: new keys and values must fit B = {B} and the cache {tuple(cache.shape)} {cache.dtype}; "
            f"got {tuple(new.shape)} {new.dtype}"
        )
    positions = lengths[:, None] + torch.arange(count)
    if page_table is None:
        cache[torch.arange(B)[:, None], :, positions] = new.transpose(1, 2)
    else:
        size = cache.shape[2]
        pages = torch.gather(page_table.long(), 1, positions // size)
        cache[pages, :, positions % size] = new.transpose(1, 2)
