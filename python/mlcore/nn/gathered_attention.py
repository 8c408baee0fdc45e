"""Attention within groups of tokens that belong together: by hash (Reformer), by cluster (Routing Transformer), by a learned
order of blocks (Sinkhorn Transformer). MultiheadAttention's calling convention; the groups' attention is mlcore.ops'."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._pairless import PairlessAttention


def _natural(name: str, what: str, n) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: {what} must be a positive integer; got {n!r}")
    return n


class _GatheredAttention(PairlessAttention):
    """What the layers share.

    Options:
        dropout: probability of dropping an attention weight in training.
        bias: add a bias to the projections.
        kdim, vdim: feature dimensions of ``key`` and ``value``; ``None`` is ``embed_dim``.
        batch_first: batched tensors are ``(N, L, E)``; ``False`` is ``(L, N, E)``.
        device, dtype: of the parameters.
    """

    _OPTIONS = ("dropout", "bias", "kdim", "vdim", "batch_first", "device", "dtype")

    def __init__(self, embed_dim: int, num_heads: int, options: dict) -> None:
        unknown = [n for n in options if n not in self._OPTIONS]
        if unknown:
            raise TypeError(f"{type(self).__name__}: options are {', '.join(self._OPTIONS)}; got {', '.join(unknown)}")
        super().__init__(embed_dim, num_heads, **options)

    def _one_length(self, q: Tensor, k: Tensor) -> None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"{type(self).__name__}: queries and keys must be one sequence; got lengths {q.shape[2]} and {k.shape[2]}"
            )

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


class ReformerAttention(_GatheredAttention):
    r"""Self-attention to tokens of the same hash: cost linear in the length.

    Queries are keys too: :math:`k = q / |q|`. Each of ``rounds`` random rotations hashes a token to
    :math:`\text{argmax}([xR; -xR])`; tokens are sorted by hash and position and cut into chunks, and a query attends to the
    tokens of its own hash in its chunk and the one before it. Rounds are merged by their log-sum-exp: a key that a query meets
    in several rounds counts as often. A token attends to itself only where it meets no other.

    Source: Kitaev et al. 2020, "Reformer: The Efficient Transformer" (arXiv 2001.04451); Hung-yi Lee's lectures on
    self-attention.

    Parameters and ``state_dict`` are :class:`torch.nn.MultiheadAttention`'s (the key projection is not used); so are the
    arguments of :meth:`forward`, for which query, key and value must be of one length.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        chunk: tokens of a chunk.
        rounds: of hashing.
        buckets: hashes, an even number; None is about ``2 * T / chunk``, above 64 by two hashes of about its root.
        seed: of the rotations, which are the same at each call, so that a result can be repeated.
        **options: dropout, bias, vdim, batch_first, device, dtype, as :class:`torch.nn.MultiheadAttention`'s.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        chunk: int = 64,
        rounds: int = 2,
        *,
        buckets: int | None = None,
        seed: int = 0,
        **options,
    ) -> None:
        super().__init__(embed_dim, num_heads, options)
        if options.get("kdim") is not None:
            raise ValueError(f"ReformerAttention: kdim must be None: queries are keys too; got {options['kdim']}")
        self.chunk = _natural("ReformerAttention", "chunk", chunk)
        self.rounds = _natural("ReformerAttention", "rounds", rounds)
        if buckets is not None and _natural("ReformerAttention", "buckets", buckets) % 2:
            raise ValueError(f"ReformerAttention: buckets must be even; got {buckets}")
        self.buckets, self.seed = buckets, seed

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, chunk={self.chunk}, rounds={self.rounds}"

    def hashes(self, q: Tensor) -> Tensor:
        """(N, H, rounds, T) integers: the bucket of each token of q (N, H, T, D) in each round."""
        T, D = q.shape[2:]
        factors = [self.buckets or max(2, 2 * round(T / self.chunk))]
        if self.buckets is None and factors[0] > 64:  # two hashes of about its root make one: their cost stays linear in T
            first = 2 * math.ceil(math.sqrt(factors[0]) / 2)
            factors = [first, 2 * math.ceil(factors[0] / first / 2)]
        generator = torch.Generator().manual_seed(self.seed)
        bucket = 0
        for n in factors:
            rotations = torch.randn(self.num_heads, self.rounds, D, n // 2, generator=generator)
            turned = q.detach().float().unsqueeze(2) @ rotations.to(q.device)
            most, least = turned.max(-1), turned.min(-1)
            bucket = bucket * n + torch.where(most.values >= -least.values, most.indices, least.indices + n // 2)
        return bucket

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        self._one_length(q, k)
        N, H, T, _ = q.shape
        if T == 0:
            return torch.zeros_like(v)
        bucket = self.hashes(q)
        if hidden is not None:
            bucket = bucket.masked_fill(hidden.transpose(-1, -2), bucket.amax().item() + 1)  # behind all others
        order = torch.argsort(bucket, dim=-1, stable=True)  # (N, H, rounds, T)
        chunks = -(-T // self.chunk)
        padding = chunks * self.chunk - T
        slots = F.pad(order, (0, padding), value=-1).unflatten(-1, (chunks, self.chunk))
        slots = F.pad(slots, (0, 0, 1, 0), value=-1)  # an empty chunk ahead: a round doesn't see the end of the one before it
        slots = slots.flatten(2, 3)
        of_round = torch.arange(self.rounds, device=q.device).repeat_interleave(chunks + 1)[:, None]
        ids = F.pad(bucket, (0, 1), value=-1)  # a slot of -1 finds the last
        shown = None if hidden is None else F.pad(~hidden[..., 0], (0, 1))  # (N, 1, T + 1)

        def rule(i: Tensor, j: Tensor) -> Tensor:
            def hashed(x: Tensor) -> Tensor:
                at = (x.flatten(3) % (T + 1)) + of_round * (T + 1)
                return ids.flatten(2).gather(2, at.flatten(2)).view(x.shape)

            meets = (hashed(i) == hashed(j)) & (i != j)
            if causal:
                meets = meets & (j < i)
            if shown is not None:
                meets = meets & shown.expand(N, H, -1).gather(2, (j % (T + 1)).flatten(2)).view(j.shape)
            return meets

        k = F.normalize(q.float(), dim=-1).to(q.dtype)
        o, lse = ops.gathered_attention(
            q, k, v, slots, look_back=1, rule=rule, dropout_p=self._dropout_p(), return_lse=True
        )  # fmt: skip
        alone = lse == float("-inf")
        if hidden is not None:
            alone = alone & ~hidden[..., 0]
        return torch.where(alone.unsqueeze(-1), v, o)


class RoutingAttention(_GatheredAttention):
    r"""Attention within clusters of tokens: cost linear in the length.

    Queries and keys are compared with ``clusters`` centroids a head (by their directions); each centroid takes the ``window``
    queries and the ``window`` keys nearest to it, and these attend to each other. What a token gets in several clusters is
    merged by log-sum-exp; a query that no centroid takes gets 0. In training the centroids move to the mean direction of the
    tokens nearest to them: k-means, online.

    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv 2003.05997); Hung-yi
    Lee's lectures on self-attention.

    Parameters and ``state_dict`` are :class:`torch.nn.MultiheadAttention`'s and the buffer ``centroids`` (H, clusters, D); so
    are the arguments of :meth:`forward`.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        clusters: centroids of a head.
        window: tokens that each takes, at most all.
        decay: of the moving centroids.
        **options: dropout, bias, kdim, vdim, batch_first, device, dtype, as :class:`torch.nn.MultiheadAttention`'s.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, clusters: int, window: int = 64, *, decay: float = 0.999, **options
    ) -> None:
        super().__init__(embed_dim, num_heads, options)
        self.clusters = _natural("RoutingAttention", "clusters", clusters)
        self.window = _natural("RoutingAttention", "window", window)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"RoutingAttention: decay must be in [0, 1]; got {decay}")
        self.decay = decay
        start = F.normalize(torch.randn(num_heads, clusters, self.head_dim, device=self.out_proj.weight.device), dim=-1)
        self.register_buffer("centroids", start)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, clusters={self.clusters}, window={self.window}"

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        if causal:
            self._one_length(q, k)
        nearness = [self._nearness(x) for x in (q, k)]  # (N, H, clusters, T)
        if hidden is not None:
            nearness[1] = nearness[1].masked_fill(hidden.transpose(-1, -2), float("-inf"))
        if self.training and self.decay < 1.0:
            self._move_centroids((q, k), nearness)
        slots = []
        for near in nearness:
            value, index = near.topk(min(self.window, near.shape[-1]), -1)
            index = index.masked_fill(value == float("-inf"), near.shape[-1])  # hidden ones: last, then none
            index = index.sort(-1).values
            slots.append(index.masked_fill(index == near.shape[-1], -1))
        rule = (lambda i, j: j <= i) if causal else None
        return ops.gathered_attention(q, k, v, *slots, rule=rule, dropout_p=self._dropout_p())

    def _nearness(self, x: Tensor) -> Tensor:
        return self.centroids @ F.normalize(x.detach().float(), dim=-1).transpose(-1, -2)

    @torch.no_grad()
    def _move_centroids(self, tokens, nearness) -> None:
        total = torch.zeros_like(self.centroids)
        for x, near in zip(tokens, nearness):
            x = F.normalize(x.detach().float(), dim=-1).transpose(0, 1).flatten(1, 2)  # (H, N * T, D)
            value, nearest = near.transpose(0, 1).transpose(2, 3).flatten(1, 2).max(-1)
            x = x.masked_fill((value == float("-inf")).unsqueeze(-1), 0.0)
            total.scatter_add_(1, nearest.unsqueeze(-1).expand_as(x), x)
        moved = self.decay * self.centroids + (1.0 - self.decay) * F.normalize(total, dim=-1)
        self.centroids.copy_(torch.where((total != 0).any(-1, keepdim=True), F.normalize(moved, dim=-1), self.centroids))


class SinkhornAttention(_GatheredAttention):
    r"""Attention to the own block and to one that a learned sorting brings next to it.

    Each block of queries is described by its first token, each block of keys by its mean; two learned matrices make scores of
    these, :math:`s_{nm}`, and Sinkhorn's alternate normalisation of :math:`e^{s / \tau}` a nearly doubly stochastic matrix
    :math:`P` (with Gumbel noise in training). The keys and values that block n gets besides its own are
    :math:`\sum_m P_{nm}` times those of the ``mixed`` blocks m of largest weight. Time is
    :math:`O(T \cdot block \cdot D)` for attention and :math:`O((T / block)^2)` for the sorting, which is small for blocks of
    about :math:`\sqrt T`.

    Causal: a block sorts among earlier blocks only, with weights normalised over these alone, because what is normalised over
    other queries would tell of them; the first block has its own keys only.

    Source: Tay et al. 2020, "Sparse Sinkhorn Attention" (arXiv 2002.11296); Hung-yi Lee's lectures on self-attention.

    Parameters and ``state_dict`` are :class:`torch.nn.MultiheadAttention`'s and the two matrices ``sort_q``, ``sort_k``
    (H, D, D); so are the arguments of :meth:`forward`, for which query, key and value must be of one length.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        block: tokens of a block.
        mixed: blocks of which the sorted one is made; None is all of them, as in the paper, at (T / block) times the cost.
        iterations: of the normalisation.
        temperature: tau.
        **options: dropout, bias, kdim, vdim, batch_first, device, dtype, as :class:`torch.nn.MultiheadAttention`'s.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        block: int = 64,
        *,
        mixed: int | None = 1,
        iterations: int = 8,
        temperature: float = 0.75,
        **options,
    ) -> None:
        super().__init__(embed_dim, num_heads, options)
        self.block = _natural("SinkhornAttention", "block", block)
        self.mixed = None if mixed is None else _natural("SinkhornAttention", "mixed", mixed)
        self.iterations = _natural("SinkhornAttention", "iterations", iterations)
        if not temperature > 0.0:
            raise ValueError(f"SinkhornAttention: temperature must be positive; got {temperature}")
        self.temperature = temperature
        D = self.head_dim
        for name in ("sort_q", "sort_k"):
            weight = self.out_proj.weight.new_empty(num_heads, D, D)
            setattr(self, name, torch.nn.Parameter(torch.nn.init.normal_(weight, std=D**-0.5)))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, block={self.block}, mixed={self.mixed}"

    def sorting(self, q: Tensor, k: Tensor, hidden: Tensor | None = None, causal: bool = False) -> Tensor:
        """P (N, H, blocks, blocks) of blocks q, k (N, H, blocks, block, D); hidden (N, 1, blocks, block, 1) or None."""
        if hidden is None:
            means, empty = k.mean(3), None
        else:
            count = (~hidden).sum(3)
            means = k.masked_fill(hidden, 0.0).sum(3) / count.clamp(min=1)
            empty = (count == 0).transpose(-1, -2)  # (N, 1, 1, blocks)
        s = (q[:, :, :, 0] @ self.sort_q) @ (means @ self.sort_k).transpose(-1, -2)
        s = s.float() * (q.shape[-1] ** -0.5 / self.temperature)
        if self.training:
            s = s - torch.empty_like(s).exponential_().log() / self.temperature  # Gumbel noise
        n = s.shape[-1]
        none = torch.zeros(n, n, dtype=torch.bool, device=s.device)
        if causal:
            none = torch.ones_like(none).triu()
        if empty is not None:
            none = none | empty
        low = -torch.finfo(s.dtype).max / 4
        for _ in range(1 if causal else self.iterations):
            for dim in (-1,) if causal else (-2, -1):
                s = s.masked_fill(none, low)
                s = s - s.logsumexp(dim, keepdim=True)
        return s.exp().masked_fill(none, 0.0)

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        self._one_length(q, k)
        N, H, T, _ = q.shape
        if T == 0:
            return torch.zeros_like(v)
        padding, b = -T % self.block, self.block
        q, k, v = (F.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, b)) for t in (q, k, v))
        n = q.shape[2]
        if padding and hidden is None:
            hidden = torch.zeros(1, 1, T, 1, dtype=torch.bool, device=q.device)
        if hidden is not None:
            hidden = F.pad(hidden, (0, 0, 0, padding), value=True).unflatten(2, (-1, b))  # (N|1, 1, n, b, 1)
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        weights = self.sorting(q, k, hidden, causal)
        seen = torch.ones(1, 1, 1, 1, 2 * b, dtype=torch.bool, device=q.device)
        if causal:
            local = torch.ones(b, b, dtype=torch.bool, device=q.device).tril()
            first = torch.arange(n, device=q.device)[:, None, None] == 0
            seen = torch.cat([~first.expand(n, b, b), local.expand(n, b, b)], -1)[None, None]
        sorted_k, sorted_v, shown = self._sorted(weights, k, v, hidden)
        if hidden is not None:
            seen = seen & torch.cat([shown, ~hidden[..., 0].expand(N, H, n, b)], -1).unsqueeze(-2)
        plain = hidden is None and not causal
        o = ops.attention(
            q.flatten(0, 1),
            torch.cat([sorted_k, k], 3).flatten(0, 1),
            torch.cat([sorted_v, v], 3).flatten(0, 1),
            pattern=None if plain else seen.flatten(0, 1),
            dropout_p=self._dropout_p(),
        )
        return o.reshape(N, H, n * b, v.shape[-1])[:, :, :T]

    def _sorted(self, weights, k, v, hidden):
        """Keys and values that each block gets besides its own, and (N, H, n, b) which of them are there."""
        N, H, n, b, _ = k.shape
        shown = (~hidden[..., 0]).expand(N, H, n, b) if hidden is not None else weights.new_ones(N, H, n, b, dtype=torch.bool)
        if self.mixed is None or self.mixed >= n:
            mixtures = (torch.einsum("zhnm,zhmbd->zhnbd", weights.to(x.dtype), x) for x in (k, v))
            return *mixtures, (weights > 0).float() @ shown.float() > 0
        weight, block = weights.topk(self.mixed, -1)  # (N, H, n, mixed)

        at = (block + torch.arange(N * H, device=k.device).view(N, H, 1, 1) * n).flatten()

        def mixture(x: Tensor) -> Tensor:
            rows = F.embedding(at, x.flatten(3).flatten(0, 2)).view(N, H, n, self.mixed, b * x.shape[-1])
            return (weight.to(x.dtype).unsqueeze(-1) * rows).sum(3).unflatten(-1, (b, x.shape[-1]))

        there = shown.flatten(0, 2)[at].view(N, H, n, self.mixed, b)
        return mixture(k), mixture(v), (there & (weight > 0).unsqueeze(-1)).any(3)
