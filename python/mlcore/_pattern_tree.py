"""What a pattern's spec means: the tree that it is the text of, its matrix in plain torch, and the rules that need the lengths
of a call. Patterns are made in mlcore.patterns; lowering to tiles is ops/_attention_schedule.py's."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence

import torch


@functools.lru_cache(maxsize=512)
def parse(spec: str) -> tuple:
    """The tree of a spec: nested tuples (name, arguments ..., parts ...)."""
    return ast.literal_eval(spec)


def tensors_of(node: tuple) -> int:
    """How many tensors the node itself takes, before those of its parts."""
    if node[0] in ("documents", "clusters"):
        return node[1]
    if node[0] == "lengths":
        return 1 + node[1]
    return 1 if node[0] in ("tokens", "blocks", "dense", "edges") else 0


def bind(node: tuple, tensors: Sequence[torch.Tensor]) -> tuple:
    """The tree with its tensors in it: each node is (name, numbers, tensors, parts)."""
    return _bind(node, iter(tensors))


def _bind(node, left):
    own = tuple(next(left) for _ in range(tensors_of(node)))
    numbers = tuple(x for x in node[1:] if not isinstance(x, tuple))
    return node[0], numbers, own, tuple(_bind(x, left) for x in node[1:] if isinstance(x, tuple))


@torch.compiler.assume_constant_result
def _parsed(spec: str) -> tuple:
    return parse(spec)


def dense(spec: str, tensors: Sequence[torch.Tensor], Tq: int, Tk: int, device=None) -> torch.Tensor:
    """The matrix of a pattern in plain torch: (Tq, Tk) or (B|1, H|1, Tq, Tk)."""
    device = torch.device("cpu") if device is None else device
    tree = bind(_parsed(spec), tensors)
    i = torch.arange(Tq, device=device)[:, None]
    j = torch.arange(Tk, device=device)[None, :]
    seen = _dense(tree, i, j, Tq, Tk)
    return seen.expand(*seen.shape[:-2], Tq, Tk)


def _member(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.isin(positions, tokens.to(positions.device, torch.int64))


def _dense(node, i, j, Tq, Tk):
    """The node's matrix at queries i (..., n, 1) and keys j (..., 1, m), counted in a frame of lengths Tq, Tk."""
    name, numbers, tensors, parts = node
    if name == "and":
        seen = torch.ones_like(i + j, dtype=torch.bool)
        for p in parts:
            seen = seen & _dense(p, i, j, Tq, Tk)
        return seen
    if name == "or":
        seen = torch.zeros_like(i + j, dtype=torch.bool)
        for p in parts:
            seen = seen | _dense(p, i, j, Tq, Tk)
        return seen
    if name == "not":
        return ~_dense(parts[0], i, j, Tq, Tk)
    if name == "heads":
        each = [_dense(p, i, j, Tq, Tk) for p in parts]
        each = [e[None, None] if e.dim() == 2 else e for e in each]
        batch = max(e.shape[0] for e in each)
        return torch.cat([e.expand(batch, -1, -1, -1) for e in each], 1)
    if name in ("band", "stride", "first", "tokens"):
        position = i + (Tk - Tq) * numbers[-1]
        if name == "band":
            left, right, _ = numbers
            seen = torch.ones_like(i + j, dtype=torch.bool)
            if left >= 0:
                seen = seen & (j >= position - left)
            return seen & (j <= position + right) if right >= 0 else seen
        if name == "stride":
            return (position - j) % numbers[0] == 0
        if name == "first":
            return ((position >= 0) & (position < numbers[0])) | (j < numbers[0])
        return _member(tensors[0], position) | _member(tensors[0], j)
    if name == "columns":
        return (j % numbers[0] == numbers[1]).expand((i + j).shape)
    if name == "documents":
        cq, ck = (t.to(i.device, torch.int64) for t in (tensors[0], tensors[-1]))
        check_cu_seqlens(cq, Tq, "cu_seqlens")
        check_cu_seqlens(ck, Tk, "cu_seqlens_k")
        n = cq.shape[0] - 1
        dq, dk = torch.searchsorted(cq, i.contiguous(), right=True) - 1, torch.searchsorted(ck, j.contiguous(), right=True) - 1
        seen = (dq == dk) & (dq < n) & (dk < n)
        if parts and n:
            d = dq.clamp(max=n - 1)
            lengths = (cq[d + 1] - cq[d], ck[d + 1] - ck[d])
            seen = seen & _dense(parts[0], i - cq[d], j - ck[d], *lengths)
        return seen
    if name == "lengths":
        k = tensors[0].to(i.device, torch.int64)[:, None, None, None]
        q = tensors[1].to(i.device, torch.int64)[:, None, None, None] if numbers[0] else torch.full_like(k, Tq)
        check_lengths(k, Tk, "k_lengths")
        check_lengths(q, Tq, "q_lengths")
        seen = (i < q) & (j < k)
        return seen & _dense(parts[0], i.expand(seen.shape), j.expand(seen.shape), q, k) if parts else seen
    if name == "blocks":
        mask = tensors[0].to(i.device)
        bq, bk = numbers
        r, c = torch.div(i, bq, rounding_mode="floor"), torch.div(j, bk, rounding_mode="floor")
        inside = (r < mask.shape[-2]) & (c < mask.shape[-1]) & (r >= 0) & (c >= 0)
        if not isinstance(Tk, torch.Tensor):  # within a document queries and keys beyond the blocks see nothing
            check_blocks(mask, bq, bk, Tq, Tk)
        return mask[..., r.clamp(0, mask.shape[-2] - 1), c.clamp(0, mask.shape[-1] - 1)] & inside
    if name == "dense":
        mask = tensors[0].to(i.device)
        check_broadcast(mask.shape, Tq, Tk)
        return mask[(None,) * (4 - mask.dim())] if mask.dim() != 2 else mask.expand(Tq, Tk)
    if name == "edges":
        check_edges(tensors[0], *numbers, Tq, Tk)
        seen = torch.zeros(Tq, Tk, dtype=torch.bool, device=i.device)
        seen[tensors[0][0].to(i.device), tensors[0][1].to(i.device)] = True
        return seen
    if name == "clusters":
        q, k = (t.to(i.device)[(None,) * (3 - t.dim())] if t.dim() > 1 else t.to(i.device) for t in (tensors[0], tensors[-1]))
        check_clusters(q, k, Tq, Tk)
        return (q[..., :, None] == k[..., None, :]) & (q[..., :, None] >= 0)
    raise ValueError(f"patterns: no pattern {name!r}")


# Rules that need the lengths of a call; the lowering asks them too.


def check_cu_seqlens(t: torch.Tensor, length: int, name: str) -> None:
    if not torch.compiler.is_compiling() and (
        t.shape[0] < 1 or t[0] != 0 or bool((t[1:] < t[:-1]).any()) or int(t[-1]) > length
    ):
        raise ValueError(f"Documents: {name} must rise from 0 to at most {length}; got {t.tolist()[:8]} ... {int(t[-1])}")


def check_lengths(t: torch.Tensor, length: int, name: str) -> None:
    if not torch.compiler.is_compiling() and t.numel() and (int(t.min()) < 0 or int(t.max()) > length):
        raise ValueError(f"Lengths: {name} must be 0 to {length}; got {int(t.min())} to {int(t.max())}")


def check_blocks(mask: torch.Tensor, bq: int, bk: int, Tq: int, Tk: int) -> None:
    rows, columns = mask.shape[-2:]
    if rows * bq < Tq or columns * bk < Tk:
        raise ValueError(
            f"Blocks: {rows} x {columns} blocks of {bq} x {bk} must cover all {Tq} queries and {Tk} keys; "
            f"they cover {rows * bq}, {columns * bk}"
        )


def check_broadcast(shape: Sequence[int], Tq: int, Tk: int) -> None:
    own = (1, *shape)[-2:]
    if own[0] not in (1, Tq) or own[1] not in (1, Tk):
        raise ValueError(f"Dense: the mask must broadcast to (..., Tq, Tk) = (..., {Tq}, {Tk}); got shape {tuple(shape)}")


def check_edges(edges: torch.Tensor, nq: int, nk: int, Tq: int, Tk: int) -> None:
    if (nq, nk) != (Tq, Tk):
        raise ValueError(f"Graph: the adjacency is {nq} x {nk}, the call has {Tq} queries and {Tk} keys")
    if torch.compiler.is_compiling() or not edges.numel():
        return
    least, most = edges.amin(1), edges.amax(1)
    if int(least.min()) < 0 or int(most[0]) >= Tq or int(most[1]) >= Tk:
        raise ValueError(f"Graph: edges must be within {Tq} x {Tk}; got {least.tolist()} to {most.tolist()}")


def check_clusters(q: torch.Tensor, k: torch.Tensor, Tq: int, Tk: int) -> None:
    if q.shape[-1] != Tq or k.shape[-1] != Tk:
        raise ValueError(f"Clusters: ids must be given for {Tq} queries and {Tk} keys; got {q.shape[-1]}, {k.shape[-1]}")
