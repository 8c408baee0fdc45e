"""One encoder and one decoder layer of "Attention Is All You Need". Stacks of them: transformer.py.

Standalone modules, unlike MultiheadAttention: torch.nn.TransformerEncoder hands nested tensors to whatever is a
torch.nn.TransformerEncoderLayer, and a padded batch to every other layer.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Dropout, Linear, Module

from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def _activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not isinstance(activation, str):
        return activation
    if activation not in _ACTIVATIONS:
        raise RuntimeError(f"activation must be 'relu', 'gelu' or a callable; got {activation!r}")
    return _ACTIVATIONS[activation]


class TransformerEncoderLayer(Module):
    """Self-attention and feed-forward block, a drop-in replacement of :class:`torch.nn.TransformerEncoderLayer`.

    Post-norm (default): ``x = norm1(x + SA(x)); x = norm2(x + FF(x))``. Pre-norm (``norm_first``):
    ``x = x + SA(norm1(x)); x = x + FF(norm2(x))``. ``FF(x) = linear2(activation(linear1(x)))``, with dropout after
    the activation and after each block.

    Source: "Attention Is All You Need" (arXiv 1706.03762); pre-norm: arXiv 2002.04745; Hung-yi Lee's lectures on
    the Transformer. Constructor, results and ``state_dict`` are torch's; masks and fully masked rows behave as
    :class:`mlcore.nn.MultiheadAttention` says. Training and inference take the same path.

    Args:
        d_model: model dimension E.
        nhead: number of heads, a divisor of ``d_model``.
        dim_feedforward: width of the feed-forward block.
        dropout: probability, for attention weights and activations.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        layer_norm_eps: epsilon of the norms.
        batch_first: ``(N, L, E)`` instead of ``(L, N, E)``.
        norm_first: pre-norm.
        bias: additive biases in linear and norm layers.
        device, dtype: of the parameters.

    Raises:
        RuntimeError: an unknown ``activation`` name.
    """

    __constants__ = ["norm_first"]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kwargs = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=batch_first, **kwargs)
        self.linear1 = Linear(d_model, dim_feedforward, **kwargs)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **kwargs)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.activation = _activation(activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the layer's output, shaped as ``src``.

        Args:
            src: ``(L, N, E)``, ``(N, L, E)`` if ``batch_first``, or ``(L, E)``.
            src_mask: ``(L, L)`` or ``(N * nhead, L, L)``; bool (True hides) or float (added).
            src_key_padding_mask: ``(N, L)`` or ``(L,)``; bool (True hides) or float (added).
            is_causal: ``src_mask`` is the causal mask; it is then not read.
        """
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return self.dropout1(_attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class TransformerDecoderLayer(Module):
    """Self-attention, attention to the memory and feed-forward block: :class:`torch.nn.TransformerDecoderLayer`.

    Post-norm (default): ``x = norm1(x + SA(x)); x = norm2(x + MHA(x, memory)); x = norm3(x + FF(x))``. Pre-norm
    (``norm_first``): ``x = x + SA(norm1(x)); x = x + MHA(norm2(x), memory); x = x + FF(norm3(x))``.

    Source and arguments: as :class:`TransformerEncoderLayer`. Constructor, results and ``state_dict`` are torch's.

    Raises:
        RuntimeError: an unknown ``activation`` name.
    """

    __constants__ = ["norm_first"]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kwargs = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=batch_first, **kwargs)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=batch_first, **kwargs)
        self.linear1 = Linear(d_model, dim_feedforward, **kwargs)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **kwargs)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.norm3 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.dropout3 = Dropout(dropout)
        self.activation = _activation(activation)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Return the layer's output, shaped as ``tgt``.

        Args:
            tgt: ``(L, N, E)``, ``(N, L, E)`` if ``batch_first``, or ``(L, E)``.
            memory: the encoder's output: ``(S, N, E)``, ``(N, S, E)`` or ``(S, E)``.
            tgt_mask, memory_mask: ``(L, L)`` and ``(L, S)``, or with ``N * nhead`` first; bool (True hides) or float.
            tgt_key_padding_mask, memory_key_padding_mask: ``(N, L)`` and ``(N, S)``, unbatched without N.
            tgt_is_causal, memory_is_causal: the mask is the causal mask; if square it is then not read.
        """
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            x = x + self._mha_block(self.norm2(x), memory, memory_mask, memory_key_padding_mask, memory_is_causal)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal))
        x = self.norm2(x + self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal))
        return self.norm3(x + self._ff_block(x))

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return self.dropout1(_attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal))

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        return self.dropout2(_attend(self.multihead_attn, x, mem, attn_mask, key_padding_mask, is_causal))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))


def _attend(mha, x, memory, attn_mask, key_padding_mask, is_causal) -> Tensor:
    return mha(
        x,
        memory,
        memory,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        attn_mask=attn_mask,
        is_causal=is_causal,
    )[0]
