"""What the layers share that form no weight for a pair of tokens: MultiheadAttention's calling convention around _attend."""

from __future__ import annotations

import torch
from torch import Tensor

from .multihead_attention import MultiheadAttention


class PairlessAttention(MultiheadAttention):
    """MultiheadAttention's projections and arguments; a subclass says in _attend what happens between the projections."""

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
        """As :meth:`MultiheadAttention.forward`, but there are no weights to return, and no mask but the causal one.

        Args:
            query, key, value: as :class:`MultiheadAttention`'s.
            key_padding_mask: ``(N, S)``, unbatched ``(S,)``, boolean: True hides the key.
            need_weights: must be False; ``average_attn_weights`` has then no meaning.
            attn_mask: only with ``is_causal``, which says that it is the causal mask; it is not read.
            is_causal: query t sees keys up to t.

        Returns:
            ``(output, None)``, output shaped as ``query``.

        Raises:
            ValueError: weights or another mask are asked for.
        """
        name = type(self).__name__
        if need_weights:
            raise ValueError(f"{name}: need_weights must be False: weights of pairs are never formed")
        if attn_mask is not None and not is_causal:
            raise ValueError(f"{name}: attn_mask must be the causal mask, with is_causal=True; others need pairs")
        batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal and attn_mask is not None)
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            raise ValueError(f"{name}: key_padding_mask must be boolean; got {key_padding_mask.dtype}")
        if not batched:
            query, key, value, key_padding_mask = self._as_batch(query, key, value, key_padding_mask)
        q, k, v = self._project(query, key, value)  # (N, H, T, D)
        hidden = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
        return self._output(self._attend(key, q, k, v, hidden, is_causal), batched), None

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        """(N, H, T, D) from the projected heads. hidden: (N, 1, S, 1), True where a key counts for nothing, or None."""
        raise NotImplementedError
