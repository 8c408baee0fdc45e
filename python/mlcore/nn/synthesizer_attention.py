"""Attention whose weights are made without comparing tokens, with MultiheadAttention's calling convention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .multihead_attention import MultiheadAttention

_KINDS = ("dense", "factorized_dense", "random", "factorized_random")


class SynthesizerAttention(MultiheadAttention):
    r"""Multi-head attention with synthetic scores: :math:`o = \text{softmax}(A) v`, where no query meets a key.

    ===================  ==============================================================================
    kind                 scores A (L, S) of a head
    ===================  ==============================================================================
    "dense"              row i is :math:`\text{relu}(q_i W_1 + b_1) W_2 + b_2`, from token i alone
    "factorized_dense"   row i is the outer product of two such vectors, of lengths a and b with a b >= S
    "random"             a parameter
    "factorized_random"  :math:`R_1 R_2^\top`, parameters of ``rank`` columns: no L x S matrix anywhere
    ===================  ==============================================================================

    Source: Tay et al. 2021, "Synthesizer" (arXiv 2005.00743); Hung-yi Lee's lectures on self-attention.

    ``in_proj_weight``, ``out_proj`` and the arguments of :meth:`forward` are :class:`torch.nn.MultiheadAttention`'s; the key
    projection is not used, nor the query projection by the random kinds. Scores stand for positions, up to ``max_length``.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        max_length: the longest sequence.
        kind: as in the table.
        rank: of "factorized_random".
        dropout: probability of dropping an attention weight in training.
        bias: add a bias to the projections.
        batch_first: batched tensors are ``(N, L, E)``; ``False`` is ``(L, N, E)``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_length: int,
        kind: str = "dense",
        *,
        rank: int = 8,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        if kind not in _KINDS:
            raise ValueError(f"SynthesizerAttention: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
        if max_length < 1:
            raise ValueError(f"SynthesizerAttention: max_length must be at least 1; got {max_length}")
        if not 1 <= rank <= 256:
            raise ValueError(f"SynthesizerAttention: rank must be 1 to 256; got {rank}")
        self.max_length, self.kind = max_length, kind
        H, D = num_heads, self.head_dim
        short = max(1, round(max_length**0.5))
        self.lengths = {"dense": (max_length,), "factorized_dense": (short, -(-max_length // short))}.get(kind, ())

        def parameter(*shape):
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        dense = bool(self.lengths)
        self.hidden_weight = parameter(H, D, D) if dense else None
        self.hidden_bias = parameter(H, 1, D) if dense else None
        self.score_weight = torch.nn.ParameterList(parameter(H, D, n) for n in self.lengths)
        self.score_bias = torch.nn.ParameterList(parameter(H, 1, n) for n in self.lengths)
        columns = {"random": max_length, "factorized_random": rank}.get(kind)
        self.row_scores = None if dense else parameter(H, max_length, columns)
        self.column_scores = parameter(H, max_length, rank) if kind == "factorized_random" else None
        self.reset_scores()

    def reset_scores(self) -> None:
        """The parameters of the scores as at the start: small, so that attention begins near a mean."""
        for weight in (self.hidden_weight, *self.score_weight, self.row_scores, self.column_scores):
            if weight is not None:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (self.hidden_bias, *self.score_bias):
            if bias is not None:
                torch.nn.init.zeros_(bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, {self.max_length}, {self.kind!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As :meth:`MultiheadAttention.forward`; key is only looked at for its shape.

        Args:
            query, key, value: as :class:`MultiheadAttention`'s, at most ``max_length`` tokens.
            key_padding_mask, attn_mask, is_causal: as :class:`MultiheadAttention`'s.
            need_weights: must be False; ``average_attn_weights`` has then no meaning.

        Returns:
            ``(output, None)``, output shaped as ``query``.

        Raises:
            ValueError: weights are asked for, or a sequence is longer than ``max_length``.
        """
        if need_weights:
            raise ValueError("SynthesizerAttention: need_weights must be False; got True")
        batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        time = (1 if self.batch_first else 0) if batched else 0
        longest = max(query.shape[time], key.shape[time])
        if longest > self.max_length:
            raise ValueError(
                f"SynthesizerAttention: sequences must have at most max_length {self.max_length} tokens; got {longest}"
            )
        if not batched:
            query, key, value, key_padding_mask = self._as_batch(query, key, value, key_padding_mask)
        v = self._heads(value, 2)  # (N, H, S, D)
        q, k, scores = self._scores(query, v)
        causal = is_causal and q.shape[2] == v.shape[2]
        keep, bias = self._masks(q, None if causal else attn_mask, key_padding_mask)
        if scores is not None:
            bias = scores if bias is None else bias + scores
        dropout_p = self.dropout if self.training else 0.0
        o = ops.attention(q, k, v, pattern=keep, causal=causal, bias=bias, scale=1.0, dropout_p=dropout_p)
        return self._output(o, batched), None

    def _heads(self, x: Tensor, part: int) -> Tensor:
        """(N, H, T, D): x by the query (0) or value (2) projection."""
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        x = F.linear(x, self.in_proj_weight[rows], None if self.in_proj_bias is None else self.in_proj_bias[rows])
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))

    def _scores(self, query: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q, k, bias) for which ops.attention's scores, at scale 1, are the synthetic ones."""
        N, H, S, _ = v.shape
        if self.lengths:
            x = self._heads(query, 0)  # (N, H, L, D)
            hidden = torch.relu(x @ self.hidden_weight + self.hidden_bias)
            parts = [hidden @ w + b for w, b in zip(self.score_weight, self.score_bias)]
            scores = parts[0] if len(parts) == 1 else (parts[0].unsqueeze(-1) * parts[1].unsqueeze(-2)).flatten(-2)
            return v.new_zeros(N, H, scores.shape[2], 1), v.new_zeros(N, H, S, 1), scores[..., :S]
        L = query.shape[1 if self.batch_first else 0]
        rows = self.row_scores[:, :L].to(v.dtype)
        if self.column_scores is None:
            return v.new_zeros(N, H, L, 1), v.new_zeros(N, H, S, 1), rows[None, :, :, :S]
        columns = self.column_scores[:, :S].to(v.dtype)
        return rows.expand(N, -1, -1, -1), columns.expand(N, -1, -1, -1), None
