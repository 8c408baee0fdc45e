"""The functions of flash_attn.flash_attn_interface, argument for argument. Their own documentation holds."""

from __future__ import annotations

import functools
import inspect

import torch

from ...ops import attention, attention_with_kvcache
from ...patterns import Causal, Documents, Window

# deterministic is always so here: the bits don't depend on threads or timing, whatever is asked.


def _inside(causal: bool, window_size):
    """The pattern of causal and window_size, or None. As flash-attn, a causal window has no right side."""
    left, right = (None if n < 0 else n for n in window_size)
    parts = []
    if causal:
        parts.append(Causal())
    if left is not None or (right is not None and not causal):
        parts.append(Window(left, None if causal else right))
    return parts[0] & parts[1] if len(parts) == 2 else parts[0] if parts else None


def _probabilities(name: str, wanted: bool, dropout_p: float) -> None:
    if wanted and dropout_p > 0:
        raise ValueError(
            f"{name}: return_attn_probs can't return the dropped probabilities, which are never formed; dropout_p must be 0"
        )


def _packed(function, *first):
    """A decorator: arguments `first`, then those of function that follow q, k, v and are not among them, block_table excepted.
    The decorated function turns them into function's own."""
    own = inspect.signature(function).parameters.values()
    rest = [p for p in own if p.name not in ("q", "k", "v", *first) and not p.name.endswith(("_q", "_k", "block_table"))]
    lead = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in first]
    signature = inspect.Signature([*lead, *rest])
    names = tuple(signature.parameters)

    def wrap(unpack):
        @functools.wraps(unpack)
        def packed(*args, **kwargs):
            given = dict(zip(names, args)) | kwargs
            wrong = [n for n in given if n not in names] + [n for n in names[: len(args)] if n in kwargs]
            if len(args) > len(names) or wrong:
                raise TypeError(f"{unpack.__name__}: the arguments are {', '.join(names)}; got {len(args)}, and {[*kwargs]}")
            return function(*unpack(**{n: given.pop(n) for n in first if n in given}), **given)

        packed.__signature__ = signature
        return packed

    return wrap


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Attention of q (B, Tq, H, D) over k, v (B, Tk, Hkv, D): (B, Tq, H, D).

    With return_attn_probs the triple (out, softmax_lse (B, H, Tq), None): the probabilities, which flash-attn returns for its
    own tests where there is dropout, are never formed here; with dropout_p > 0 that raises ValueError.
    """
    _probabilities("flash_attn_func", return_attn_probs, dropout_p)
    o, lse = attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        pattern=_inside(causal, window_size),
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    o = o.transpose(1, 2)
    return (o, lse, None) if return_attn_probs else o


@_packed(flash_attn_func, "qkv")
def flash_attn_qkvpacked_func(qkv):
    """flash_attn_func of qkv (B, T, 3, H, D)."""
    return qkv.unbind(2)


@_packed(flash_attn_func, "q", "kv")
def flash_attn_kvpacked_func(q, kv):
    """flash_attn_func of q (B, Tq, H, D) and kv (B, Tk, 2, Hkv, D)."""
    return q, *kv.unbind(2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """Attention within packed sequences: q (total_q, H, D), k, v (total_k, Hkv, D); out (total_q, H, D), lse (H, total_q).

    With block_table (N, n) k and v are paged, (pages, P, Hkv, D), and a sequence's keys the first of its pages.
    Rows behind the last sequence are 0. Raises ValueError for ALiBi where queries and keys are packed differently or slopes
    differ by sequence, and where a sequence is longer than max_seqlen, or its pages, say.
    """
    name = "flash_attn_varlen_func"
    _probabilities(name, return_attn_probs, dropout_p)
    for what, cu, longest in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        if not torch.compiler.is_compiling() and cu.numel() > 1 and int(cu.diff().max()) > longest:
            raise ValueError(f"{name}: max_seqlen_{what} is {longest}, the longest sequence has {int(cu.diff().max())}")
    if block_table is not None:
        k, v = _gathered_pages(name, block_table, cu_seqlens_k, k, v)
    same = cu_seqlens_q is cu_seqlens_k
    if alibi_slopes is not None:
        if not same and not torch.equal(cu_seqlens_q, cu_seqlens_k):
            raise ValueError(f"{name}: alibi_slopes need cu_seqlens_q and cu_seqlens_k to be equal")
        if alibi_slopes.dim() == 2:
            if alibi_slopes.shape[0] != 1:
                raise ValueError(
                    f"{name}: alibi_slopes must be (H,), the same for all sequences; got {tuple(alibi_slopes.shape)}"
                )
            alibi_slopes = alibi_slopes[0]
    inside = _inside(causal, window_size)
    o, lse = attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        pattern=Documents(cu_seqlens_q, None if same else cu_seqlens_k, inside=inside),
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    o = o[0].transpose(0, 1)
    return (o, lse[0], None) if return_attn_probs else o


def _gathered_pages(name, block_table, cu_seqlens_k, *caches):
    """Packed keys and values, (total_k, Hkv, D), of paged ones."""
    lengths, size = cu_seqlens_k.diff().long(), caches[0].shape[1]
    if block_table.dim() != 2 or block_table.shape[0] != lengths.numel() or int(lengths.max()) > block_table.shape[1] * size:
        raise ValueError(
            f"{name}: block_table must be (N, n) with room for the {lengths.numel()} sequences of up to {int(lengths.max())} "
            f"keys in pages of {size}; got {tuple(block_table.shape)}"
        )
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    position = torch.arange(int(lengths.sum()), device=lengths.device) - cu_seqlens_k[:-1].long()[sequence]
    rows = block_table.long()[sequence, position // size] * size + position % size
    return tuple(c.flatten(0, 1)[rows] for c in caches)


@_packed(flash_attn_varlen_func, "qkv", "cu_seqlens", "max_seqlen")
def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen):
    """flash_attn_varlen_func of qkv (total, 3, H, D)."""
    return *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen


@_packed(flash_attn_varlen_func, "q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """flash_attn_varlen_func of q (total_q, H, D) and kv (total_k, 2, Hkv, D)."""
    return q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """Appends k, v (B, Tnew, Hkv, D) to the caches (B, S, Hkv, D), or paged (pages, P, Hkv, D) with block_table, and attends.

    cache_batch_idx (B,): the caches' sequences that are used. cache_leftpad (B,): no key before it is seen; positions, rotary
    ones too, count from the cache's start. num_splits is a matter of speed alone in flash-attn, and here it is decided by the
    number of threads: results are the same for any.

    Raises ValueError for cache_batch_idx with a block_table, and for a rotary embedding of queries that are not the new keys'
    own or that don't stand at positions of their own (neither causal nor windowed).
    """
    name = "flash_attn_with_kvcache"
    if num_splits < 0:
        raise ValueError(f"{name}: num_splits must not be negative; got {num_splits}")
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError(f"{name}: cache_batch_idx can't be given with block_table, which says where sequences lie")
        block_table = cache_batch_idx[:, None]  # a sequence is one page
    local = causal or tuple(window_size) != (-1, -1)
    if rotary_cos is not None and (k is None or k.shape[1] != q.shape[1] or not (local or q.shape[1] == 1)):
        raise ValueError(f"{name}: rotary_cos needs k of q's length, and causal or window_size where there are several queries")
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]
    left, right = (None if n < 0 else n for n in window_size)
    o, lse = attention_with_kvcache(
        *(None if t is None else t.transpose(1, 2) for t in (q, k_cache, v_cache, k, v)),
        cache_seqlens=cache_seqlens,
        page_table=block_table,
        cache_starts=cache_leftpad,
        window=(left, None if causal else right),
        causal=causal,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    o = o.transpose(1, 2)
    return (o, lse) if return_softmax_lse else o
