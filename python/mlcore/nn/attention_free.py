"""Attention that forms no products of queries and keys, with MultiheadAttention's calling convention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ._pairless import PairlessAttention

_KINDS = ("full", "local", "simple", "conv")


class AttentionFree(PairlessAttention):
    r"""The attention free transformer's layer: weights of a feature come from its keys and a learned position bias alone.

    .. math::
        o_t = \sigma(q_t) \odot \frac{\sum_j \exp(k_j + w_{t,j}) \odot v_j}{\sum_j \exp(k_j + w_{t,j})}

    ========  ===========================================================================================
    kind      position bias w
    ========  ===========================================================================================
    "full"    a parameter, or with ``rank`` the product of two thin ones (the paper's), shared by all heads
    "local"   a parameter where \|t - j\| < ``window``, else 0, shared by all heads
    "simple"  0
    "conv"    a parameter of each head that depends on j - t alone, where \|t - j\| < ``window``, else 0
    ========  ===========================================================================================

    Source: Zhai et al. 2021, "An Attention Free Transformer" (arXiv 2105.14103); Hung-yi Lee's lectures on self-attention.
    Keys have a number for every feature in all kinds, where the paper's AFT-conv has one for every head.

    Parameters and ``state_dict`` are those of :class:`torch.nn.MultiheadAttention` and the bias, as are the arguments of
    :meth:`forward`; in a Transformer only the class's name and the lengths change.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H; heads differ in the bias of "conv" alone.
        max_length: the longest sequence of "full" and "local"; other kinds take any.
        kind: as in the table.
        window: of "local" and "conv".
        rank: of the factors of "full"; ``None`` is one parameter (max_length, max_length).
        bias: add a bias to the projections.
        kdim, vdim: feature dimensions of ``key`` and ``value``; ``None`` is ``embed_dim``.
        batch_first: batched tensors are ``(N, L, E)``; ``False`` is ``(L, N, E)``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_length: int | None = None,
        kind: str = "full",
        *,
        window: int = 32,
        rank: int | None = None,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype
        )
        if kind not in _KINDS:
            raise ValueError(f"AttentionFree: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
        if kind in ("full", "local") and (max_length is None or max_length < 1):
            raise ValueError(f"AttentionFree: kind {kind!r} needs max_length of at least 1; got {max_length}")
        if window < 1 or (rank is not None and rank < 1):
            raise ValueError(f"AttentionFree: window and rank must be at least 1; got {window} and {rank}")
        if rank is not None and kind != "full":
            raise ValueError(f"AttentionFree: rank is of kind 'full'; got kind {kind!r}")
        self.max_length, self.kind, self.window = max_length, kind, window
        T, band = max_length, 2 * window - 1
        shapes = {"full": [(1, T, T)] if rank is None else [(1, T, rank), (1, rank, T)], "local": [(1, T, band)]}
        shapes |= {"simple": [], "conv": [(num_heads, band)]}
        self.position_bias = torch.nn.ParameterList(
            torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes[kind]
        )
        for parameter in self.position_bias:
            torch.nn.init.normal_(parameter, std=0.01)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, {self.max_length}, {self.kind!r}"

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        T, S = q.shape[2], k.shape[2]
        limited = {"full": max(T, S), "local": T}.get(self.kind, 0)
        if limited and limited > self.max_length:
            raise ValueError(f"AttentionFree: sequences must have at most max_length {self.max_length} tokens; got {limited}")
        if hidden is not None:
            k = k.masked_fill(hidden, -torch.inf)
        if self.kind in ("local", "conv"):
            (band,) = self.position_bias
            band = band[:, :T] if self.kind == "local" else band
            band = band[..., : self.window] if causal else band
            return ops.aft(q, k, v, band, window=self.window, causal=causal)
        bias = None
        if self.kind == "full":
            first, *second = self.position_bias
            bias = first[:, :T] @ second[0][:, :, :S] if second else first[:, :T, :S]
        return ops.aft(q, k, v, bias, causal=causal)
