"""Patterns as tile schedules: a band that is computed, a tile list, or both; cached for each pattern and pair of lengths.

The lowering itself is native (kernels/attention/attention_pattern.cc); here its program is written.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import OrderedDict
from typing import NamedTuple

import torch

from .. import _pattern_tree, patterns
from .._registry import kernel

_OP = "attention"
TILE = 64  # as kernels/attention/attention_schedule.h
_BAND, _STRIDE, _COLUMNS, _GLOBAL, _DOCUMENTS, _BLOCKS, _CLUSTERS, _LISTED, _AND, _OR, _NOT = range(11)


class Schedule(NamedTuple):
    """What the kernels take (attention.h): the band, the tile list or None, and how many sets the list has."""

    left: int
    right: int
    offset: int
    row_ptr: torch.Tensor | None = None
    cols: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    bits: torch.Tensor | None = None
    set_b: int = 1
    set_h: int = 1


@functools.lru_cache(maxsize=512)
def _split(spec: str) -> tuple[tuple[tuple[int, int, int], ...], tuple | None]:
    """(bands, rest): the bands that stand at the top of the tree, and what else must hold, in the tree's order."""
    tree = _pattern_tree.parse(spec)
    bands, rest = [], []

    def walk(node):
        if node[0] == "and":
            for part in node[1:]:
                walk(part)
        elif node[0] == "band":
            bands.append(node[1:])
        else:
            rest.append(node)

    walk(tree)
    others = None if not rest else rest[0] if len(rest) == 1 else ("and", *rest)
    return tuple(bands), others


def _band(bands, Tq: int, Tk: int) -> tuple[int, int, int]:
    """(left, right, offset) of the intersection of bands. Limits may become negative, which attention.h takes for none: where
    that happens the offset moves instead."""
    if not bands:
        return -1, -1, 0
    if len(bands) == 1:
        left, right, br = bands[0]
        return left, right, Tk - Tq if br else 0
    lows = [(Tk - Tq if br else 0) - left for left, _, br in bands if left >= 0]
    highs = [(Tk - Tq if br else 0) + right for _, right, br in bands if right >= 0]
    if not lows:
        return -1, (0 if highs else -1), min(highs, default=0)
    low = max(lows)
    if not highs:
        return 0, -1, low
    high = min(highs)
    if high >= low:
        return 0, high - low, low
    return 0, 0, Tq + Tk + 1  # nobody sees anything


def schedule(spec: str, tensors, B: int, H: int, Tq: int, Tk: int) -> Schedule:
    """The schedule of a pattern (its spec and tensors) for scores (B, H, Tq, Tk)."""
    bands, rest = _split(spec)
    if rest is None:
        return Schedule(*_band(bands, Tq, Tk))
    if any(t.is_inference() for t in tensors):  # they count no versions: nothing says whether they are still the same
        return _lower(bands, rest, tensors, B, H, Tq, Tk)
    key = (spec, B, H, Tq, Tk, *map(id, tensors))
    versions = [t._version for t in tensors]
    found = _cache.get(key)
    if found is not None and found[0] == versions and all(r() is t for r, t in zip(found[1], tensors)):
        with contextlib.suppress(KeyError):  # another thread may just have dropped it
            _cache.move_to_end(key)
        return found[2]
    made = _lower(bands, rest, tensors, B, H, Tq, Tk)
    _cache[key] = versions, [weakref.ref(t, lambda _: _cache.pop(key, None)) for t in tensors], made
    while len(_cache) > _KEPT:
        _cache.popitem(last=False)
    return made


_KEPT = 64  # schedules; one lives no longer than its tensors
_cache: OrderedDict[tuple, tuple] = OrderedDict()


def describe(pattern: patterns.Pattern, q: torch.Tensor, k: torch.Tensor) -> str:
    """What a pattern costs for q (B, H, Tq, D) and k: its tiles, of all sets of heads and sequences that it tells apart."""
    Tq, Tk = q.shape[2], k.shape[2]
    s = schedule(pattern.spec, pattern.tensors, q.shape[0], q.shape[1], Tq, Tk)
    q_tiles, k_tiles = -(-Tq // TILE), -(-Tk // TILE)
    sets = s.set_b * s.set_h
    i0 = torch.arange(q_tiles) * TILE
    i1 = (i0 + TILE).clamp(max=Tq) - 1
    some_from, all_from = (i + s.offset - s.left if s.left >= 0 else torch.zeros_like(i) for i in (i0, i1))
    some_to, all_to = (i + s.offset + s.right if s.right >= 0 else torch.full_like(i, Tk - 1) for i in (i1, i0))
    first = some_from.clamp(min=0) // TILE
    if s.row_ptr is None:
        count = ((some_to.clamp(max=Tk - 1) // TILE) - first + 1).clamp(min=0)
        row = torch.repeat_interleave(torch.arange(q_tiles), count)
        starts = torch.cumsum(count, 0) - count
        col = torch.arange(row.numel()) - starts[row] + first[row]
        stored = torch.zeros_like(col, dtype=torch.bool)
    else:
        row = torch.repeat_interleave(torch.arange(sets * q_tiles), s.row_ptr.diff()) % max(q_tiles, 1)
        col, stored = s.cols.long(), s.ids >= 0
    j0 = col * TILE
    j1 = (j0 + TILE).clamp(max=Tk) - 1
    seen = (j1 >= some_from[row]) & (j0 <= some_to[row])
    masked = seen & (stored | (j0 < all_from[row]) | (j1 > all_to[row]))
    size = sum(t.numel() * t.element_size() for t in s[3:7] if t is not None)
    n, whole = int(seen.sum()), sets * q_tiles * k_tiles
    return (
        f"{n} of {whole} tiles of {TILE} x {TILE} computed ({n / max(whole, 1):.1%}), {int(masked.sum())} masked; "
        f"schedule {size / 1e3:.1f} kB, {'a band that is computed' if s.row_ptr is None else f'{len(s.bits)} bit masks'}"
    )


def clear_cache() -> None:
    """Forgets all schedules."""
    _cache.clear()


def _lower(bands, rest, tensors, B, H, Tq, Tk) -> Schedule:
    tree = _pattern_tree.bind(rest, [t.detach().cpu() for t in tensors])
    if rest[0] == "dense":
        return Schedule(*_band(bands, Tq, Tk), *_mask_tiles(_four_dims(tree[2][0], Tq, Tk)))
    if bands:
        parts = tuple(("band", b, (), ()) for b in bands)
        tree = ("and", (), (), (*parts, tree))
    set_b, set_h = _sets(tree, B, H)
    if Tq == 0 or Tk == 0 or set_b == 0 or set_h == 0:
        return Schedule(-1, -1, 0)
    program = _program(tree, set_b, set_h, Tq, Tk)
    q_tiles = -(-Tq // TILE)
    row_ptr = torch.empty(set_b * set_h * q_tiles + 1, dtype=torch.int64)
    counts = torch.empty(2, dtype=torch.int64)
    room, kinds = row_ptr.numel() * 8, 64
    while True:
        cols, ids = torch.empty(room, dtype=torch.int32), torch.empty(room, dtype=torch.int32)
        bits = torch.empty(kinds, TILE, dtype=torch.int64)
        kernel(_OP, "lower", "cpu")(program, Tq, Tk, row_ptr, cols, ids, bits, counts)
        listed, used = counts.tolist()
        if listed <= room and used <= kinds:
            break
        room, kinds = max(listed, 1), max(used, 1)
    return Schedule(-1, -1, 0, row_ptr, cols[:listed].clone(), ids[:listed].clone(), bits[:used].clone(), set_b, set_h)


def _four_dims(mask, Tq, Tk):
    _pattern_tree.check_broadcast(mask.shape, Tq, Tk)
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(-1, -1, -1, Tk)


def _mask_tiles(mask):
    """(row_ptr, cols, ids, bits, set_b, set_h) of a boolean mask (B|1, H|1, Tq|1, Tk); see attention.h."""
    set_b, set_h, Tq, Tk = mask.shape
    rows, k_tiles = set_b * set_h * -(-Tq // TILE), -(-Tk // TILE)
    codes = torch.empty(rows, k_tiles, dtype=torch.int32)
    counts = torch.empty(2, dtype=torch.int64)
    kernel(_OP, "mask_codes", "cpu")(mask, codes, counts)
    listed, partial = counts.tolist()
    row_ptr = torch.empty(rows + 1, dtype=torch.int64)
    cols, ids = torch.empty(listed, dtype=torch.int32), torch.empty(listed, dtype=torch.int32)
    bits = torch.empty(partial, TILE, dtype=torch.int64)
    kernel(_OP, "mask_tiles", "cpu")(mask, codes, row_ptr, cols, ids, bits)
    return row_ptr, cols, ids, bits, set_b, set_h


def _sets(node, B: int, H: int) -> tuple[int, int]:
    """How many sequences and heads a pattern tells apart: 1 or B, 1 or H."""
    name, _, tensors, parts = node
    own_b = own_h = 1
    if name in ("dense", "blocks", "clusters"):
        lead = tensors[0].shape[: -1 if name == "clusters" else -2]
        if name == "clusters":
            lead = torch.broadcast_shapes(lead, tensors[-1].shape[:-1])
        own_b, own_h = ((1, 1) + tuple(lead))[-2:]
    elif name == "lengths":
        own_b = tensors[0].shape[0]
        if own_b != B:  # a broadcast of one length is not meant
            raise ValueError(f"attention: pattern has lengths of {own_b} sequences, q has {B}")
    elif name == "heads":
        own_h = len(parts)
        if own_h != H:
            raise ValueError(f"attention: pattern has {own_h} heads, q has {H}")
    for part in parts:
        b, h = _sets(part, B, H)
        own_b, own_h = max(own_b, b) if b else 0, max(own_h, h) if h else 0
    for what, n, full in (("sequences", own_b, B), ("heads", own_h, H)):
        if n not in (1, full):
            raise ValueError(f"attention: pattern is for {n} {what}, q has {full}")
    return own_b, own_h


def _program(tree, set_b: int, set_h: int, Tq: int, Tk: int) -> torch.Tensor:
    """attention.h's program for mlc_attention_lower: one tree a set."""
    starts, chunks = [], []
    at = 1 + set_b * set_h
    shared: dict = {}
    for b in range(set_b):
        for h in range(set_h):
            starts.append(at)
            for chunk in _words(tree, b, h, Tq, Tk, shared):
                chunk = torch.tensor(chunk, dtype=torch.int64) if isinstance(chunk, list) else chunk.reshape(-1).to(torch.int64)
                chunks.append(chunk)
                at += chunk.numel()
    return torch.cat([torch.tensor([set_b * set_h, *starts], dtype=torch.int64), *chunks])


def _of_set(t: torch.Tensor, b: int, h: int, dims: int) -> torch.Tensor:
    """The part of t (B|1, H|1, ...) that belongs to a set; dims are the last ones, leading ones may be left out."""
    for n in (b, h)[2 - (t.dim() - dims) :] if t.dim() > dims else ():
        t = t[n if t.shape[0] > 1 else 0]
    return t


def _words(node, b, h, Tq, Tk, shared, whole=True):
    """The chunks of a node's tree: lists of numbers and tensors. whole: it stands outside of documents."""
    name, numbers, tensors, parts = node

    def inner(part):
        return _words(part, b, h, Tq, Tk, shared, whole and name not in ("documents", "lengths"))

    if name == "heads":
        return inner(parts[h])
    if name in ("and", "or"):
        return [[_AND if name == "and" else _OR, len(parts)], *(c for p in parts for c in inner(p))]
    if name == "not":
        return [[_NOT], *inner(parts[0])]
    if name == "band":
        return [[_BAND, *numbers]]
    if name == "stride":
        return [[_STRIDE, *numbers]]
    if name == "columns":
        return [[_COLUMNS, *numbers]]
    if name == "first":
        n, br = numbers
        return [[_GLOBAL, br, 1, 0, n] if n else [_GLOBAL, br, 0]]
    if name == "tokens":
        tokens = torch.unique(tensors[0].long())
        if tokens.numel() and int(tokens[0]) < 0:
            raise ValueError(f"GlobalTokens: positions must not be negative; got {int(tokens[0])}")
        breaks = torch.ones(tokens.numel(), dtype=torch.bool)
        breaks[1:] = tokens[1:] != tokens[:-1] + 1
        begins = tokens[breaks]
        ends = tokens[torch.roll(breaks, -1)] + 1
        return [[_GLOBAL, numbers[-1], begins.numel()], torch.stack([begins, ends], 1)]
    if name == "documents":
        q, k = tensors[0], tensors[-1]
        _pattern_tree.check_cu_seqlens(q, Tq, "cu_seqlens")
        _pattern_tree.check_cu_seqlens(k, Tk, "cu_seqlens_k")
        return [[_DOCUMENTS, q.numel() - 1], q, k, [len(parts)], *(c for p in parts for c in inner(p))]
    if name == "lengths":
        k, q = tensors[0], tensors[1] if numbers[0] else torch.full_like(tensors[0], Tq)
        _pattern_tree.check_lengths(k, Tk, "k_lengths")
        _pattern_tree.check_lengths(q, Tq, "q_lengths")
        return [[_DOCUMENTS, 1, 0, int(q[b]), 0, int(k[b]), len(parts)], *(c for p in parts for c in inner(p))]
    if name == "blocks":
        mask = _of_set(tensors[0], b, h, 2)
        if whole:
            _pattern_tree.check_blocks(mask, *numbers, Tq, Tk)
        return [[_BLOCKS, *numbers, *mask.shape], mask]
    if name == "clusters":
        q, k = (_of_set(t, b, h, 1) for t in (tensors[0], tensors[-1]))
        _pattern_tree.check_clusters(q, k, Tq, Tk)
        return [[_CLUSTERS], q, k]
    # What has a mask of its own is listed first, once for each set that it tells apart.
    if name == "dense":
        mask = _four_dims(tensors[0], Tq, Tk)
        mask = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0].expand(Tq, Tk)
        key = (id(tensors[0]), mask.storage_offset())
    else:
        key = (id(tensors[0]), 0)
    if key not in shared:
        tiles = _mask_tiles(mask[None, None])[:4] if name == "dense" else _edge_tiles(tensors[0], *numbers, Tq, Tk)
        shared[key] = [[_LISTED, tiles[3].shape[0]], *tiles]
    return shared[key]


def _edge_tiles(edges, nq: int, nk: int, Tq: int, Tk: int):
    """(row_ptr, cols, ids, bits) of edges (2, E): every tile with one is listed."""
    _pattern_tree.check_edges(edges, nq, nk, Tq, Tk)
    k_tiles, q_tiles = -(-Tk // TILE), -(-Tq // TILE)
    flat = torch.unique(edges[0] * Tk + edges[1])
    i, j = flat.div(Tk, rounding_mode="floor"), flat % Tk
    tiles, of_edge = torch.unique((i // TILE) * k_tiles + j // TILE, return_inverse=True)
    words = torch.zeros(tiles.numel() * TILE, dtype=torch.int64)
    one = torch.ones((), dtype=torch.int64)
    words.index_add_(0, of_edge * TILE + j % TILE, one << (i % TILE))  # each bit once: adding is or
    row_ptr = torch.searchsorted(tiles, torch.arange(q_tiles + 1) * k_tiles)
    return row_ptr, tiles % k_tiles, torch.arange(tiles.numel()), words.view(-1, TILE)
