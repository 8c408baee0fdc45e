"""Multi-head self- and cross-attention over patterns: local, strided, global-local, graph. Projections are here, the rest is
mlcore.ops.attention's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..patterns import Causal, Full, GlobalTokens, Graph, Pattern, Strided, Window


class PatternAttention(torch.nn.Module):
    """Multi-head attention of a sequence to itself, each query to the keys that a pattern lets it see.

    Args:
        embed_dim: model dimension E, a multiple of num_heads.
        num_heads: query heads H, each of dimension E // H.
        pattern: of mlcore.patterns; None is everything.
        num_kv_heads: key heads, dividing H; None is H.
        dropout: probability of dropping an attention weight in training.
        bias: add a bias to the projections.
        alibi: "fixed" adds ALiBi with the paper's slopes, "learned" makes them parameters; None adds none.
        sinks: a learned score a head that a query may spend its weight on.
        kdim: features of the context; None is embed_dim.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern | None = None,
        *,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        alibi: str | None = None,
        sinks: bool = False,
        kdim: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name, kv_heads = type(self).__name__, num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{name}: num_heads must divide embed_dim {embed_dim}; got {num_heads}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"{name}: num_kv_heads must divide num_heads {num_heads}; got {num_kv_heads}")
        if alibi not in (None, "fixed", "learned"):
            raise ValueError(f"{name}: alibi must be 'fixed', 'learned' or None; got {alibi!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{name}: dropout must be in [0, 1]; got {dropout}")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.dropout = embed_dim, num_heads, kv_heads, dropout
        self.head_dim = embed_dim // num_heads
        self.pattern = Full() if pattern is None else pattern
        factory = {"device": device, "dtype": dtype}
        kv_dim = kv_heads * self.head_dim
        self.q_proj = torch.nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = torch.nn.Linear(kdim or embed_dim, kv_dim, bias, **factory)
        self.v_proj = torch.nn.Linear(kdim or embed_dim, kv_dim, bias, **factory)
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias, **factory)
        slopes = None if alibi is None else ops.alibi_slopes(num_heads, device)
        if alibi == "learned":
            self.alibi_slopes = torch.nn.Parameter(slopes)
        else:
            self.register_buffer("alibi_slopes", slopes, persistent=False)
        self.sinks = torch.nn.Parameter(torch.zeros(num_heads, device=device)) if sinks else None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, pattern={self.pattern!r}"

    def forward(self, x: Tensor, pattern: Pattern | None = None) -> Tensor:
        """(B, T, E) from x (B, T, E). pattern: what must hold besides the layer's own, e.g. the batch's Documents."""
        return self._attend(x, x, pattern)

    def _attend(self, x, context, pattern):
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        pattern = self.pattern if pattern is None else self.pattern & pattern
        dropout_p = self.dropout if self.training else 0.0
        o = ops.attention(q, k, v, pattern=pattern, alibi_slopes=self.alibi_slopes, sinks=self.sinks, dropout_p=dropout_p)
        return self.out_proj(o.transpose(1, 2).flatten(2))


class LocalAttention(PatternAttention):
    """Truncated attention: each token sees `window` tokens back, and as many ahead unless causal (cost O(T * window)).

    Args:
        window: tokens on each side, besides the token itself.
        causal: see none ahead.
        dilation: see every dilation-th of a window as many times as wide.
        embed_dim, num_heads, **options: as PatternAttention.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, window: int, *, causal: bool = False, dilation: int = 1, **options
    ) -> None:
        super().__init__(embed_dim, num_heads, Window(window, 0 if causal else window, dilation), **options)


class StridedAttention(PatternAttention):
    """Every stride-th token and the `stride` nearest (Child et al. 2019, "Generating Long Sequences with Sparse Transformers").

    Args:
        stride: the distance, and the number of neighbours that are seen besides.
        causal: see none ahead.
        embed_dim, num_heads, **options: as PatternAttention.
    """

    def __init__(self, embed_dim: int, num_heads: int, stride: int, *, causal: bool = False, **options) -> None:
        pattern = Strided(stride) | Window(stride - 1, stride - 1)
        super().__init__(embed_dim, num_heads, pattern & Causal() if causal else pattern, **options)


class GlobalLocalAttention(PatternAttention):
    """A window, and some tokens that see all and are seen by all (Beltagy et al. 2020, "Longformer").

    Args:
        window: tokens on each side.
        global_tokens: a number, for the first ones, or their positions.
        causal: see none ahead.
        embed_dim, num_heads, **options: as PatternAttention.
    """

    def __init__(self, embed_dim: int, num_heads: int, window: int, global_tokens, *, causal: bool = False, **options) -> None:
        pattern = Window(window, window) | GlobalTokens(global_tokens)
        super().__init__(embed_dim, num_heads, pattern & Causal() if causal else pattern, **options)


class GraphAttention(PatternAttention):
    """Self-attention on a graph: a node sees the nodes that it has an edge to (the lectures' "self-attention for graphs").

    Args:
        self_loops: a node sees itself besides.
        embed_dim, num_heads, **options: as PatternAttention.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, self_loops: bool = True, **options) -> None:
        super().__init__(embed_dim, num_heads, None, **options)
        self.self_loops = self_loops

    def forward(self, x: Tensor, adjacency: Tensor | Graph) -> Tensor:
        """(B, N, E) from nodes x (B, N, E) and an adjacency as mlcore.patterns.Graph takes it."""
        graph = adjacency if isinstance(adjacency, Pattern) else Graph(adjacency)
        return self._attend(x, x, graph | Window(0, 0) if self.self_loops else graph)


class CrossAttention(PatternAttention):
    """Attention of one sequence to another: queries of x, keys and values of a context.

    Args:
        kdim: features of the context; None is embed_dim.
        embed_dim, num_heads, **options: as PatternAttention.
    """

    def forward(self, x: Tensor, context: Tensor, pattern: Pattern | None = None) -> Tensor:
        """(B, T, E) from x (B, T, E) and context (B, S, kdim). pattern: besides the layer's own, e.g. the context's Lengths."""
        return self._attend(x, context, pattern)
