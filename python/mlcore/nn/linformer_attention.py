"""Attention to a few representative keys, with MultiheadAttention's calling convention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._pairless import PairlessAttention


class LinformerAttention(PairlessAttention):
    r"""Multi-head attention to ``num_keys`` mixtures of the keys and values: cost linear in the length.

    :math:`o = \text{softmax}(q (E k)^\top / \sqrt{D}) \, (F v)` with learned :math:`E, F` of shape (``num_keys``, S).

    Source: Wang et al. 2020, "Linformer" (arXiv 2006.04768); Hung-yi Lee's lectures on self-attention, which choose the
    representative keys by strided convolution too. Mixtures hold later tokens, so it can't be causal.

    Parameters and ``state_dict`` are those of :class:`torch.nn.MultiheadAttention` and the mixing weights; so are the arguments
    of :meth:`forward`.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        max_length: the longest sequence of keys. Shorter ones use the weights of their first tokens.
        num_keys: representative keys; with "convolution" those of a sequence of ``max_length``, shorter ones have fewer.
        projection: "matrix" learns a weight for each position; "convolution" a kernel of ``ceil(max_length / num_keys)`` tokens
            with that stride, the same wherever it stands.
        per_head: every head mixes in its own way.
        share_kv: values are mixed as keys are (the paper's key-value sharing).
        dropout: probability of dropping an attention weight in training.
        bias: add a bias to the projections.
        kdim, vdim: feature dimensions of ``key`` and ``value``; ``None`` is ``embed_dim``.
        batch_first: batched tensors are ``(N, L, E)``; ``False`` is ``(L, N, E)``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_length: int,
        num_keys: int,
        *,
        projection: str = "matrix",
        per_head: bool = False,
        share_kv: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype
        )
        if projection not in ("matrix", "convolution"):
            raise ValueError(f"LinformerAttention: projection must be 'matrix' or 'convolution'; got {projection!r}")
        if not 1 <= num_keys <= max_length:
            raise ValueError(f"LinformerAttention: num_keys must be 1 to max_length {max_length}; got {num_keys}")
        self.max_length, self.num_keys, self.projection = max_length, num_keys, projection
        self.stride = -(-max_length // num_keys)
        sets = num_heads if per_head else 1
        shape = (sets, num_keys, max_length) if projection == "matrix" else (sets, self.stride)
        self.key_mix = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.value_mix = None if share_kv else torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_mixtures()

    def reset_mixtures(self) -> None:
        """Mixing weights as at the start: around a mean over the tokens that one mixture stands for."""
        for weight in (self.key_mix, self.value_mix):
            if weight is not None:
                torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, {self.max_length}, {self.num_keys}, projection={self.projection!r}"

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        if causal:
            raise ValueError("LinformerAttention: is_causal must be False: a representative key mixes all tokens")
        if k.shape[2] > self.max_length:
            raise ValueError(f"LinformerAttention: key must have at most max_length {self.max_length} tokens; got {k.shape[2]}")
        if hidden is not None:
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        value_mix = self.key_mix if self.value_mix is None else self.value_mix
        return ops.attention(
            q, self._mixed(k, self.key_mix), self._mixed(v, value_mix), dropout_p=self.dropout if self.training else 0.0
        )

    def _mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, H, representatives, D) of (N, H, S, D)."""
        if self.projection == "matrix":
            return weight[..., : x.shape[2]] @ x
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.stride)).unflatten(2, (-1, self.stride))  # (N, H, representatives, stride, D)
        return torch.einsum("nhmsd,hs->nhmd", x, weight.expand(self.num_heads, -1))
