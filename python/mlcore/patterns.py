"""Who sees whom: patterns of attention, and their algebra.

    from mlcore.patterns import Causal, GlobalTokens, Window
    o = mlcore.ops.attention(q, k, v, pattern=Causal() & (Window(255, 0) | GlobalTokens(16)))

A pattern knows no lengths: it is made once and meets (Tq, Tk) at each call, where it is lowered to 64 x 64 tiles that are
skipped, full or masked (kernels/attention/attention.h), once for each pair of lengths. What it costs is the tiles that it
touches. ``&``, ``|`` and ``~`` combine patterns; ``to_dense`` and ``plot`` show them.

A query's position is i + Tk - Tq (align="bottom_right": the last query meets the last key, as flash-attn counts and as
decoding needs) or i (align="top_left"). Where Tq = Tk they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._pattern_tree import dense

__all__ = [
    "Blocks",
    "Causal",
    "Clusters",
    "Dense",
    "Documents",
    "Full",
    "GlobalTokens",
    "Graph",
    "Lengths",
    "Pattern",
    "PerHead",
    "Strided",
    "Window",
]


class Pattern:
    """A boolean matrix over queries and keys, for any lengths. Made by the classes below and by ``& | ~``.

    spec is the tree in text (a Python literal), tensors what its leaves hold, in the order in which the tree is read: together
    they are the pattern, and what a compiled or exported graph carries.
    """

    __slots__ = ("__weakref__", "spec", "tensors", "text")

    def __init__(self, spec: str, tensors: tuple[torch.Tensor, ...], text: str) -> None:
        self.spec, self.tensors, self.text = spec, tensors, text

    def __and__(self, other: Pattern) -> Pattern:
        return _combined("and", "&", self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return _combined("or", "|", self, other)

    def __invert__(self) -> Pattern:
        return Pattern(f"('not', {self.spec})", self.tensors, f"~{self.text}")

    def __bool__(self) -> bool:
        raise TypeError("patterns combine by &, | and ~; `and`, `or` and `not` would drop one of them")

    def __repr__(self) -> str:
        return self.text[1:-1] if self.text.startswith("(") else self.text

    def to_dense(self, Tq: int, Tk: int | None = None) -> torch.Tensor:
        """The boolean matrix, True where a query sees a key.

        Args:
            Tq: queries.
            Tk: keys; None is Tq.

        Returns:
            (Tq, Tk), or (B|1, H|1, Tq, Tk) where heads or sequences differ.

        Raises:
            ValueError: the pattern's own sizes don't allow these lengths.
        """
        return dense(self.spec, self.tensors, Tq, Tq if Tk is None else Tk)

    def plot(self, Tq: int = 64, Tk: int | None = None, ax=None, title: str | None = None):
        """Draws the matrix with matplotlib: queries down, keys across, seen pairs dark; the first head of each.

        Args:
            Tq, Tk: as to_dense.
            ax: matplotlib axes; None makes new ones.
            title: None is the pattern's text.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("Pattern.plot: needs matplotlib (pip install matplotlib), or give ax") from error
            _, ax = pyplot.subplots(figsize=(3, 3))
        seen = self.to_dense(Tq, Tk)
        while seen.dim() > 2:
            seen = seen[0]
        ax.imshow(seen.float().numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest", aspect="auto")
        ax.set(title=repr(self) if title is None else title, xticks=[], yticks=[], xlabel="keys", ylabel="queries")
        return ax


def _combined(name: str, sign: str, a: Pattern, b: Pattern) -> Pattern:
    for p in (a, b):
        if not isinstance(p, Pattern):
            raise TypeError(
                f"patterns: {sign} combines two patterns; got {type(p).__name__} (a boolean tensor is Dense(tensor))"
            )
    return Pattern(f"('{name}', {a.spec}, {b.spec})", a.tensors + b.tensors, f"({a.text} {sign} {b.text})")


def _bottom_right(what: str, align: str) -> int:
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f"{what}: align must be 'bottom_right' or 'top_left'; got {align!r}")
    return int(align == "bottom_right")


def _count(what: str, name: str, n, least: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise ValueError(f"{what}: {name} must be an integer of at least {least}; got {n!r}")
    return n


def _integers(what: str, name: str, t) -> torch.Tensor:
    """t as an int64 tensor on the CPU, where patterns are lowered."""
    t = t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.int64)
    if t.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"{what}: {name} must be an integer tensor; got {t.dtype}")
    return t


def _align_text(bottom_right: int) -> str:
    return "" if bottom_right else "align='top_left'"


def _join(*parts: str) -> str:
    return ", ".join(p for p in parts if p)


class Full(Pattern):
    """Every query sees every key."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("('and',)", (), "Full()")


class Causal(Pattern):
    """A query sees the keys up to its own position.

    Args:
        align: where the diagonal meets Tq != Tk: "bottom_right" as flash-attn, "top_left" as torch's is_causal.
    """

    __slots__ = ()

    def __init__(self, align: str = "bottom_right") -> None:
        br = _bottom_right("Causal", align)
        super().__init__(f"('band', -1, 0, {br})", (), f"Causal({_align_text(br)})")


class Window(Pattern):
    """Truncated (local) attention: a query at position p sees keys p - left ... p + right, its own included.

    With a dilation d it sees every d-th key of a window d times as wide: p - d * left, ..., p - d, p, p + d, ...
    (Beltagy et al. 2020, "Longformer"; Hassani and Shi 2022, "Dilated Neighborhood Attention").

    Args:
        left, right: how many keys on each side, None for no limit. flash-attn's -1 is None here.
        dilation: distance between neighbours that are seen.
        align: as Causal.
    """

    __slots__ = ()

    def __init__(self, left: int | None, right: int | None, dilation: int = 1, align: str = "bottom_right") -> None:
        br, d = _bottom_right("Window", align), _count("Window", "dilation", dilation, 1)
        sides = [-1 if n is None else _count("Window", name, n, 0) * d for name, n in (("left", left), ("right", right))]
        spec = f"('band', {sides[0]}, {sides[1]}, {br})"
        if d > 1:
            spec = f"('and', {spec}, ('stride', {d}, {br}))"
        text = _join(str(left), str(right), f"dilation={d}" if d > 1 else "", _align_text(br))
        super().__init__(spec, (), f"Window({text})")


class Strided(Pattern):
    """A query sees every stride-th key (Child et al. 2019, "Generating Long Sequences with Sparse Transformers").

    Args:
        stride: the distance.
        phase: None counts from the query's own position; a number takes keys j with j % stride == phase for all queries.
        align: as Causal; without effect where phase is given.
    """

    __slots__ = ()

    def __init__(self, stride: int, phase: int | None = None, align: str = "bottom_right") -> None:
        br, s = _bottom_right("Strided", align), _count("Strided", "stride", stride, 1)
        if phase is None:
            super().__init__(f"('stride', {s}, {br})", (), f"Strided({_join(str(s), _align_text(br))})")
            return
        if _count("Strided", "phase", phase, 0) >= s:
            raise ValueError(f"Strided: phase must be below stride {s}; got {phase}")
        super().__init__(f"('columns', {s}, {phase})", (), f"Strided({s}, phase={phase})")


class GlobalTokens(Pattern):
    """Some tokens see every key and are seen by every query (Beltagy et al. 2020; Ainslie et al. 2020, "ETC").

    Args:
        tokens: a number n, for the first n positions, or the positions themselves (a sequence or an integer tensor).
        align: a query is such a token where its position, so aligned, is.
    """

    __slots__ = ()

    def __init__(self, tokens: int | Sequence[int] | torch.Tensor, align: str = "bottom_right") -> None:
        br = _bottom_right("GlobalTokens", align)
        if isinstance(tokens, int):
            n = _count("GlobalTokens", "tokens", tokens, 0)
            super().__init__(f"('first', {n}, {br})", (), f"GlobalTokens({_join(str(n), _align_text(br))})")
            return
        t = _integers("GlobalTokens", "tokens", tokens)
        if t.dim() != 1:
            raise ValueError(f"GlobalTokens: tokens must be one-dimensional; got shape {tuple(t.shape)}")
        text = str(list(tokens)) if not isinstance(tokens, torch.Tensor) else f"<{t.shape[0]} positions>"
        super().__init__(f"('tokens', {br})", (t,), f"GlobalTokens({_join(text, _align_text(br))})")


_INSIDE = {"and", "or", "not", "band", "stride", "columns", "first", "tokens", "blocks"}


def _inside(what: str, inside: Pattern | None) -> tuple[str, tuple[torch.Tensor, ...], str]:
    """(spec, tensors, text) of what holds within each document; its coordinates are the document's."""
    if inside is None:
        return "", (), ""
    if not isinstance(inside, Pattern):
        raise TypeError(f"{what}: inside must be a pattern; got {type(inside).__name__}")
    if isinstance(inside, (Documents, Lengths, Graph, Clusters, Dense, PerHead)) or any(
        f"('{name}'" in inside.spec for name in ("documents", "lengths", "dense", "edges", "clusters", "heads")
    ):
        raise ValueError(f"{what}: inside must be a pattern of positions alone; got {inside!r}")
    return inside.spec, inside.tensors, f"inside={inside!r}"


class Documents(Pattern):
    """Packed sequences: a query sees the keys of its own document. Queries and keys behind the last document see nothing.

    Args:
        cu_seqlens: (N + 1,) integers, 0 and then where each document ends, in rising order; equal neighbours are an empty one.
        cu_seqlens_k: the same for the keys, where their lengths differ (N documents too); None is cu_seqlens.
        inside: a pattern that holds within each document, with the document's own lengths: Causal() is aligned to each
            document's last query and key. None: everything. A pattern combined by & instead counts in the packed sequence,
            which is the same thing only where queries and keys are cut alike.
    """

    __slots__ = ()

    def __init__(self, cu_seqlens, cu_seqlens_k=None, inside: Pattern | None = None) -> None:
        q = _integers("Documents", "cu_seqlens", cu_seqlens)
        k = q if cu_seqlens_k is None or cu_seqlens_k is cu_seqlens else _integers("Documents", "cu_seqlens_k", cu_seqlens_k)
        if q.dim() != 1 or q.shape[0] < 1 or k.shape != q.shape:
            raise ValueError(
                f"Documents: cu_seqlens and cu_seqlens_k must be (N + 1,) both; got shapes {tuple(q.shape)}, {tuple(k.shape)}"
            )
        spec, tensors, text = _inside("Documents", inside)
        text = _join(f"<{q.shape[0] - 1} documents>", text)
        own = (q,) if k is q else (q, k)
        super().__init__(f"('documents', {len(own)}{', ' + spec if spec else ''})", (*own, *tensors), f"Documents({text})")


class Lengths(Pattern):
    """A padded batch: sequence b has k_lengths[b] keys, and q_lengths[b] queries; the padding sees and shows nothing.

    Args:
        k_lengths: (B,) integers.
        q_lengths: (B,) integers; None: all Tq are queries.
        inside: as Documents, with the sequence's own lengths: Causal() meets the last key that is there.
    """

    __slots__ = ()

    def __init__(self, k_lengths, q_lengths=None, inside: Pattern | None = None) -> None:
        k = _integers("Lengths", "k_lengths", k_lengths)
        q = () if q_lengths is None else (_integers("Lengths", "q_lengths", q_lengths),)
        if k.dim() != 1 or (q and q[0].shape != k.shape):
            raise ValueError(f"Lengths: k_lengths and q_lengths must be (B,); got shapes {[tuple(t.shape) for t in (k, *q)]}")
        spec, tensors, text = _inside("Lengths", inside)
        super().__init__(
            f"('lengths', {len(q)}{', ' + spec if spec else ''})",
            (k, *q, *tensors),
            f"Lengths({_join(f'<{k.shape[0]} sequences>', text)})",
        )


class Blocks(Pattern):
    """Query i sees key j where mask[..., i // block_q, j // block_k] is True (BigBird's random blocks, for example).

    Args:
        mask: boolean (rows, columns) or (B|1, H|1, rows, columns), covering all queries and keys.
        block_size: of queries and keys, or the pair (block_q, block_k).
    """

    __slots__ = ()

    def __init__(self, mask: torch.Tensor, block_size: int | tuple[int, int] = 64) -> None:
        bq, bk = (block_size, block_size) if isinstance(block_size, int) else block_size
        for n in (bq, bk):
            _count("Blocks", "block_size", n, 1)
        mask = _boolean("Blocks", "mask", mask)
        if mask.dim() not in (2, 4):
            raise ValueError(
                f"Blocks: mask must be (rows, columns) or (B|1, H|1, rows, columns); got shape {tuple(mask.shape)}"
            )
        size = str(bq) if bq == bk else f"({bq}, {bk})"
        super().__init__(f"('blocks', {bq}, {bk})", (mask,), f"Blocks(<{mask.shape[-2]} x {mask.shape[-1]}>, {size})")


def _boolean(what: str, name: str, mask) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"{what}: {name} must be a boolean tensor; got {got}")
    return mask


class Graph(Pattern):
    """Query i sees key j where the adjacency matrix has an edge, anything but 0: self-attention for graphs.

    Args:
        adjacency: dense (Tq, Tk), (H|1, Tq, Tk) or (B|1, H|1, Tq, Tk), or a sparse tensor (Tq, Tk) of any layout, whose stored
            elements are the edges. Lengths must then be those of the call.
    """

    __slots__ = ()

    def __init__(self, adjacency: torch.Tensor) -> None:
        if not isinstance(adjacency, torch.Tensor) or not 2 <= adjacency.dim() <= 4:
            got = tuple(adjacency.shape) if isinstance(adjacency, torch.Tensor) else type(adjacency).__name__
            raise ValueError(f"Graph: adjacency must be a tensor of 2 to 4 dimensions; got {got}")
        text = f"Graph(<{adjacency.shape[-2]} x {adjacency.shape[-1]}"
        if adjacency.layout == torch.strided:
            super().__init__("('dense',)", (adjacency != 0,), f"{text}>)")
            return
        if adjacency.dim() != 2:
            raise ValueError(f"Graph: a sparse adjacency must be (Tq, Tk); got shape {tuple(adjacency.shape)}")
        edges = adjacency.detach().to_sparse_coo().coalesce().indices()
        super().__init__(
            f"('edges', {adjacency.shape[0]}, {adjacency.shape[1]})", (edges,), f"{text}, {edges.shape[1]} edges>)"
        )

    @classmethod
    def from_edges(cls, edges: torch.Tensor, Tq: int, Tk: int | None = None) -> Graph:
        """The graph whose edges are the columns of `edges` (2, E): queries above, keys below."""
        Tk = Tq if Tk is None else Tk
        edges = _integers("Graph", "edges", edges)
        if edges.dim() != 2 or edges.shape[0] != 2:
            raise ValueError(f"Graph: edges must be (2, E); got shape {tuple(edges.shape)}")
        graph = cls.__new__(cls)
        text = f"Graph(<{Tq} x {Tk}, {edges.shape[1]} edges>)"
        Pattern.__init__(graph, f"('edges', {Tq}, {Tk})", (edges.long(),), text)
        return graph


class Clusters(Pattern):
    """A query sees the keys of its own cluster (Roy et al. 2021, "Routing Transformer"; Vyas et al. 2020).

    Args:
        q_ids: (Tq,), (H|1, Tq) or (B|1, H|1, Tq) integers: the cluster of each query; negative is none.
        k_ids: the same for the keys, of q_ids' number of dimensions; None is q_ids.
    """

    __slots__ = ()

    def __init__(self, q_ids: torch.Tensor, k_ids: torch.Tensor | None = None) -> None:
        q = _integers("Clusters", "q_ids", q_ids)
        k = q if k_ids is None or k_ids is q_ids else _integers("Clusters", "k_ids", k_ids)
        if not 1 <= q.dim() <= 3 or k.dim() != q.dim():
            raise ValueError(
                "Clusters: q_ids and k_ids must be (T,), (H|1, T) or (B|1, H|1, T) both; "
                f"got shapes {tuple(q.shape)}, {tuple(k.shape)}"
            )
        own = (q,) if k is q else (q, k)
        super().__init__(f"('clusters', {len(own)})", own, f"Clusters(<{q.shape[-1]} x {k.shape[-1]}>)")


class Dense(Pattern):
    """A boolean tensor as a pattern: broadcastable to (B, H, Tq, Tk), True where a query sees a key."""

    __slots__ = ()

    def __init__(self, mask: torch.Tensor) -> None:
        mask = _boolean("Dense", "mask", mask)
        if not 1 <= mask.dim() <= 4:
            raise ValueError(f"Dense: mask must have 1 to 4 dimensions; got shape {tuple(mask.shape)}")
        super().__init__("('dense',)", (mask,), f"Dense(<{' x '.join(map(str, mask.shape))}>)")


class PerHead(Pattern):
    """Head h follows patterns[h].

    Args:
        patterns: one for each of q's heads. They may differ by sequence, but not by head in turn.
    """

    __slots__ = ()

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        patterns = list(patterns)
        if not patterns or not all(isinstance(p, Pattern) for p in patterns):
            raise ValueError(f"PerHead: patterns must be a sequence of patterns, one a head; got {patterns!r}")
        if any("('heads'" in p.spec for p in patterns):
            raise ValueError("PerHead: patterns must not be PerHead themselves")
        super().__init__(
            f"('heads', {', '.join(p.spec for p in patterns)},)",
            tuple(t for p in patterns for t in p.tensors),
            f"PerHead([{', '.join(map(repr, patterns))}])",
        )
