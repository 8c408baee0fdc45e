"""Attention over a key-value cache: append, then attend. A token decoded alone has the bits that it has in a prefill.

Few queries are served by kernels of their own, which read the cache where it lies (kernels/attention/attention_decode.cc, .cu
and attention_triton_decode.py); many, and the reference, by mlcore.ops.attention over what was gathered."""

from __future__ import annotations

import math

import torch

from .._backend import choose
from .._registry import direct, kernel, register, transformed
from ..patterns import Causal, Dense, Lengths, Pattern, Window
from ._tokens import inner_contiguous
from .attention import attention

_OP = "attention_with_kvcache"
_FEW = 16  # queries of a key head that the CPU's decoding kernel serves at once; tokens, for the GPU's: see README.md
_PART = 256  # keys that a block of the GPU's takes: kPart of attention_decode.cuh


def _decode_launch(q, k_cache, v_cache, *rest):
    *rest, parts, impl = rest
    o, lse = _decode_fake(q, k_cache, v_cache)
    scratch = None
    if parts > 1:
        scratch = torch.empty(*lse.shape, parts, v_cache.shape[3] + 2, dtype=torch.float32, device=q.device)
    kernel("attention", "decode", impl)(q, k_cache, v_cache, *rest, o, lse, scratch)
    return o, lse


def _decode_fake(q, k_cache, v_cache, *_):
    B, H, Tq, _ = q.shape
    Dv = v_cache.shape[3]
    o = torch.empty_strided((B, H, Tq, Dv), (Tq * H * Dv, Dv, H * Dv, 1), dtype=q.dtype, device=q.device)
    return o, torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)


def _append_launch(k, v, page_table, lengths, k_cache, v_cache, k_scale, v_scale, impl):
    kernel("attention", "append", impl)(k, v, page_table, lengths, k_cache, v_cache, k_scale, v_scale)


_decode = register(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? page_table, "
    "Tensor lengths, Tensor? starts, Tensor? slopes, Tensor? sinks, int left, int right, float scale, float softcap, "
    "int parts, str impl) "
    "-> (Tensor o, Tensor lse)",
    launch=_decode_launch,
    fake=_decode_fake,
)
_append = register(
    "attention_append(Tensor k, Tensor v, Tensor? page_table, Tensor lengths, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, str impl) -> ()",
    launch=_append_launch,
    fake=lambda *_: None,
)


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
    cache_starts: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
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
    once, nor on the other sequences, on pages or on threads: prefill and decoding token by token agree exactly. On a GPU this
    holds between calls of up to 16 tokens; longer ones take the kernels of a prefill, which round differently.

    cache_seqlens, page_table and cache_starts may be on any device. Where they are on the GPU that decodes, a call of up to 16
    tokens doesn't wait for them, and so can't check their values: lengths end with the cache, keys on pages that don't exist
    are seen by nobody, new keys for them aren't written, positions beyond the rotary tables take their last row.

    Args:
        q: (B, H, Tq, D).
        k_cache, v_cache: (B, Hkv, S, D), (B, Hkv, S, Dv), written in place; with page_table (pages, Hkv, P, D). Of q's dtype,
            or int8 with scales: a row is then int8 times its scale, and appended rows are quantised with scale max|x| / 127.
        k, v: (B, Hkv, Tnew, D), (B, Hkv, Tnew, Dv): appended; None: the cache is complete.
        cache_seqlens: (B,) integers or one number: keys there before the call.
        page_table: (B, n) integers: position t of sequence b is row t % P of page page_table[b, t // P]. Up to 16 queries of a
            key head (on a GPU: 16 tokens) read pages where they lie; for more they are gathered first. Sequences that use some
            rows of a larger contiguous cache are pages of S: ``page_table=rows[:, None]``.
        cache_starts: (B,) integers: keys before them are padding that no query sees. Positions count from 0 all the same.
        k_scale, v_scale: (B, Hkv, S) or (pages, Hkv, P) float32, written in place: the scales of int8 caches.
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
    Tq = q.shape[2]
    backend = "reference" if transformed() else choose("attention", impl, q)
    if not k_cache.stride(-1) == v_cache.stride(-1) == 1:
        backend = "reference"
    few = q.shape[1] * Tq <= _FEW * k_cache.shape[1] if backend == "cpu" else Tq <= _FEW and backend != "reference"
    few = few and min(q.shape[3], v_cache.shape[3]) >= 1 and max(q.shape[3], v_cache.shape[3]) <= 256
    lengths, total, longest, page_table, starts = _checked(
        few and q.is_cuda, q, k_cache, v_cache, k, v, cache_seqlens, page_table, cache_starts, k_scale, v_scale
    )
    around = (None, None) if window is None else window
    _check_options(q, k_cache, v_cache, around, scale, softcap, alibi_slopes, sinks, impl)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{_OP}: rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None:
        if rotary_cos.shape[0] < longest and not lengths.is_cuda:
            raise ValueError(f"{_OP}: rotary_cos must hold {longest} positions; got {rotary_cos.shape[0]}")
        q = rotate(q, *_at(rotary_cos, rotary_sin, (total - Tq).clamp(min=0), Tq), rotary_interleaved)
        if k is not None:
            k = rotate(k, *_at(rotary_cos, rotary_sin, lengths, k.shape[2]), rotary_interleaved)
    with torch.no_grad():
        caches = (k_cache, v_cache, k_scale, v_scale)
        known = not any(t is not None and t.is_cuda for t in (page_table, total, starts))
        if backend in ("cuda", "triton") and page_table is not None and known:
            _check_pages(page_table, k_cache.shape, _first_seen(total, starts, Tq, around).minimum(lengths), total)
        if k is not None:
            _store(backend, k, v, lengths, total, page_table, caches)
        if few:
            parts = 1 if backend == "cpu" else _parts(longest, Tq, around, causal)
            o, lse = _few_queries(
                q, caches, page_table, total, starts, alibi_slopes, sinks, around, causal, scale, softcap, parts, backend
            )
        else:
            pattern = Lengths(total, None, _around(causal, around))
            if starts is not None:
                pattern = pattern & Dense((torch.arange(longest) >= starts[:, None])[:, None, None])
            relative = None
            if alibi_slopes is not None:  # distances from each sequence's own end
                distance = (torch.arange(Tq + longest - 1) - (total[:, None, None] - 1)).abs().to(q.device)
                relative = -alibi_slopes.float().reshape(-1, q.shape[1], 1) * distance
            keys, values = (_gathered(*c, page_table, longest) for c in zip(caches[:2], caches[2:]))
            options = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": True, "impl": impl}
            o, lse = attention(q.to(keys.dtype), keys, values, pattern=pattern, relative=relative, **options)
            o = o.to(q.dtype)
    return (o, lse) if return_lse else o


def _checked(stay, q, k_cache, v_cache, k, v, cache_seqlens, page_table, cache_starts, k_scale, v_scale):
    """(keys before the call, after it, the most of them, page_table and starts as int64 or None). They come to the CPU, or with
    `stay` remain on the GPU where they are there: their values aren't looked at, and the most is what the cache has room for.
    """
    B = q.shape[0]
    lengths = cache_seqlens if isinstance(cache_seqlens, torch.Tensor) else torch.full((B,), cache_seqlens, dtype=torch.int64)
    if tuple(lengths.shape) != (B,) or lengths.is_floating_point():
        raise ValueError(f"{_OP}: cache_seqlens must be (B,) = ({B},) integers; got {lengths.dtype}, {tuple(lengths.shape)}")
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must be given together")
    lengths = _integers(lengths, stay)
    added = 0 if k is None else k.shape[2]
    total = lengths + added
    if page_table is not None and (page_table.dim() != 2 or page_table.shape[0] != B or page_table.is_floating_point()):
        raise ValueError(
            f"{_OP}: page_table must be (B, n) integers with B = {B}; got {page_table.dtype}, {tuple(page_table.shape)}"
        )
    room = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    longest = 0 if B == 0 else room if lengths.is_cuda else int(total.max())
    if B and not lengths.is_cuda and (int(lengths.min()) < 0 or longest > room):
        raise ValueError(
            f"{_OP}: the cache has room for {room} keys; cache_seqlens {lengths.tolist()} and {added} new need more"
        )
    if page_table is None and k_cache.shape[0] != B:
        raise ValueError(f"{_OP}: k_cache must be for B = {B} sequences; got {k_cache.shape[0]}")
    if cache_starts is not None:
        given, fits = cache_starts, tuple(cache_starts.shape) == (B,) and not cache_starts.is_floating_point()
        cache_starts = _integers(given, stay)
        if not fits or (B and not cache_starts.is_cuda and int(cache_starts.min()) < 0):
            raise ValueError(f"{_OP}: cache_starts must be (B,) = ({B},) integers from 0; got {given}")
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        if (scale is not None) != (cache.dtype == torch.int8):
            raise ValueError(f"{_OP}: {name}_scale must be given with an int8 {name}_cache, and only then")
        if scale is not None and (tuple(scale.shape) != tuple(cache.shape[:3]) or scale.dtype != torch.float32):
            raise ValueError(
                f"{_OP}: {name}_scale must be {tuple(cache.shape[:3])} float32; got {scale.dtype}, {tuple(scale.shape)}"
            )
    return lengths, total, longest, None if page_table is None else _integers(page_table, stay), cache_starts


def _check_options(q, k_cache, v_cache, around, scale, softcap, slopes, sinks, impl):
    """What would else be refused after k and v have been written."""
    B, H, _, D = q.shape
    Hkv, Dv = k_cache.shape[1], v_cache.shape[3]
    if k_cache.shape[3] != D or v_cache.shape[:3] != k_cache.shape[:3] or (H % Hkv if Hkv else H):
        raise ValueError(
            f"{_OP}: k_cache must be (B, Hkv, S, D) with q's D = {D}, Hkv dividing q's H = {H}, and v_cache (B, Hkv, S, Dv); "
            f"got {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in (q.dtype, torch.int8):
            raise ValueError(f"{_OP}: {name} must be {q.dtype} as q, or torch.int8; got {cache.dtype}")
    if impl not in (None, "reference") and not 1 <= min(D, Dv) <= max(D, Dv) <= 256:
        raise ValueError(f"{_OP}: impl={impl!r} can't serve this call: head dims must be 1 to 256; got D {D}, Dv {Dv}")
    if slopes is not None and (tuple(slopes.shape) not in ((H,), (B, H)) or not slopes.is_floating_point()):
        raise ValueError(f"{_OP}: alibi_slopes must be (H,) or (B, H) = ({B}, {H}); got {tuple(slopes.shape)}")
    if sinks is not None and (tuple(sinks.shape) != (H,) or not sinks.is_floating_point()):
        raise ValueError(f"{_OP}: sinks must be floating, (H,) = ({H},); got {sinks.dtype}, {tuple(sinks.shape)}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{_OP}: scale must be a finite number; got {scale}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"{_OP}: softcap must be a positive number or None; got {softcap}")
    if any(n is not None and n < 0 for n in around):
        raise ValueError(f"{_OP}: window must hold counts from 0, or None for no limit; got {around}")


def _integers(t, stay):
    return t.to(t.device if stay and t.is_cuda else "cpu", torch.int64).contiguous()


def _there(q, *tensors):
    """The tensors on q's device."""
    return (t if t is None else t.to(q.device, non_blocking=True) for t in tensors)


def _first_seen(total, starts, Tq, around):
    """(B,): the first key that some query sees, or a later one where there is none."""
    first = torch.zeros_like(total) if around[0] is None else (total - Tq - around[0]).clamp(min=0)
    return first if starts is None else first.maximum(starts)


def _parts(longest, Tq, around, causal):
    """Of how many parts of the cache queries may see keys."""
    left, right = around[0], 0 if causal else around[1]
    parts = -(-longest // _PART)
    if left is not None and right is not None:
        parts = min(parts, 1 - (1 - Tq - left - right) // _PART)  # Tq + left + right keys, wherever they begin
    return max(parts, 1)


def _check_pages(table, shape, first, end):
    """Raises where keys first .. end - 1 of a sequence would be on a page that isn't there."""
    at = torch.arange(table.shape[1]) * shape[2]
    bad = (at + shape[2] > first[:, None]) & (at < end[:, None]) & ((table < 0) | (table >= shape[0]))
    if bad.any():
        b, n = bad.nonzero()[0].tolist()
        raise ValueError(f"{_OP}: page_table must name pages below {shape[0]}; got {int(table[b, n])} at ({b}, {n})")


def _few_queries(q, caches, page_table, total, starts, slopes, sinks, around, causal, scale, softcap, parts, impl):
    """(o, lse) by a decoding kernel."""
    _, H, _, D = q.shape
    slopes = None if slopes is None else slopes.float().reshape(-1, H).contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    left, right = (-1 if n is None else n for n in around)
    scale, softcap = 1.0 / math.sqrt(D) if scale is None else float(scale), 0.0 if softcap is None else float(softcap)
    q = inner_contiguous(q)
    page_table, total, starts = _there(q, page_table, total, starts)
    decode = _decode_launch if direct(q, *caches, total) else _decode
    return decode(
        q, *caches, page_table, total, starts, slopes, sinks, left, 0 if causal else right, scale, softcap, parts, impl
    )  # fmt: skip


def _gathered(cache, scale, page_table, longest):
    """(B, Hkv, longest, D) of a cache; of an int8 one in float32."""
    if page_table is not None:
        pages = page_table[:, : -(-longest // cache.shape[2])].to(cache.device)
        cache = cache[pages].transpose(1, 2).flatten(2, 3)
        scale = None if scale is None else scale[pages].transpose(1, 2).flatten(2, 3)
    cache = cache[:, :, :longest]
    return cache if scale is None else cache.float() * scale[:, :, :longest, None]


def _around(causal: bool, window) -> Pattern | None:
    inside = Causal() if causal else None
    if window != (None, None):
        inside = Window(*window) if inside is None else inside & Window(*window)
    return inside


def _at(cos, sin, start, count):
    """Rows start[b] .. start[b] + count of the tables, as (B, 1, count, R)."""
    positions = start[:, None] + torch.arange(count, device=start.device)
    if start.is_cuda:  # not checked
        positions = positions.clamp(0, cos.shape[0] - 1)
    return cos[positions][:, None], sin[positions][:, None]


def _store(impl, k, v, lengths, total, page_table, caches):
    """Writes k and v behind what the caches hold."""
    B, kinds = lengths.shape[0], [k.dtype, torch.int8]
    for new, cache in ((k, caches[0]), (v, caches[1])):
        fits = (new.shape[1], new.shape[3]) == (cache.shape[1], cache.shape[3]) and cache.dtype in kinds
        if not fits or new.shape[0] != B or new.shape[2] != k.shape[2] or new.dtype != k.dtype:
            raise ValueError(
                f"{_OP}: new keys and values must fit B = {B} and the cache {tuple(cache.shape)} {cache.dtype}; "
                f"got {tuple(new.shape)} {new.dtype}"
            )
    if impl != "reference":
        k, v = inner_contiguous(k), inner_contiguous(v)
        return (_append_launch if direct(k, v, *caches) else _append)(k, v, *_there(k, page_table, total), *caches, impl)
    count = k.shape[2]
    positions, size = lengths[:, None] + torch.arange(count), caches[0].shape[2]
    pages = torch.arange(B)[:, None] if page_table is None else torch.gather(page_table, 1, positions // size)
    for new, cache, scale in zip((k, v), caches[:2], caches[2:]):
        new, rows = new.transpose(1, 2), (pages, slice(None), positions % size)
        if scale is not None:
            scale[rows] = amax = new.float().abs().amax(-1) / 127.0
            new = (new.float() / torch.where(amax > 0, amax, 1.0).unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        cache[rows] = new
    return None
