"""Stacks of Transformer layers and the whole encoder-decoder model. The layers: transformer_layer.py."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.nn.init import xavier_uniform_

from .layer_norm import LayerNorm
from .transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer


def _is_causal_mask(mask: Tensor | None, is_causal: bool | None) -> bool:
    """Return the hint, or without one whether ``mask`` is exactly the causal ``(L, L)`` mask.

    The look at the mask waits for the device, and is not taken while compiling: the mask is then applied as it is,
    with the same result.
    """
    if is_causal is not None or mask is None or torch.compiler.is_compiling():
        return bool(is_causal)
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.device.type == "meta":
        return False
    L = mask.shape[0]
    upper = torch.ones(L, L, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype != torch.bool:
        upper = torch.zeros_like(mask).masked_fill_(upper, float("-inf"))
    return torch.equal(mask.detach(), upper)


class TransformerEncoder(Module):
    """A stack of encoder layers, a drop-in replacement of :class:`torch.nn.TransformerEncoder`.

    Source: "Attention Is All You Need" (arXiv 1706.03762); Hung-yi Lee's lectures on the Transformer. Results at
    positions that are not padding, and the ``state_dict``, are torch's. All layers start as copies of
    ``encoder_layer``.

    Args:
        encoder_layer: the layer that is copied; :class:`mlcore.nn.TransformerEncoderLayer` or any with its arguments.
        num_layers: how many.
        norm: applied to the last output.
        enable_nested_tensor: accepted and kept as an attribute; it does not change what is computed. The batch stays
            padded in training and in inference, so the two agree everywhere. A padded position attends to the keys
            that are not padding, as every other position does, and its output is of no meaning; torch in inference
            may instead write ``norm(0)`` (0 without ``norm``) there.
        mask_check: as ``enable_nested_tensor``: it guards torch's conversion to nested tensors.
    """

    __constants__ = ["norm"]

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return the encoding of ``src``, in its shape.

        Args:
            src: ``(L, N, E)``, ``(N, L, E)`` if the layers are batch first, or ``(L, E)``.
            mask: ``(L, L)`` or ``(N * nhead, L, L)``; bool (True hides) or float (added).
            src_key_padding_mask: ``(N, L)`` or ``(L,)``; bool (True hides) or float (added).
            is_causal: ``mask`` is the causal mask; it is then not read. ``None`` looks at the mask.
        """
        is_causal = _is_causal_mask(mask, is_causal)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(Module):
    """A stack of decoder layers, a drop-in replacement of :class:`torch.nn.TransformerDecoder`.

    Source: "Attention Is All You Need" (arXiv 1706.03762); Hung-yi Lee's lectures on the Transformer. All layers
    start as copies of ``decoder_layer``.

    Args:
        decoder_layer: the layer that is copied; :class:`mlcore.nn.TransformerDecoderLayer` or any with its arguments.
        num_layers: how many.
        norm: applied to the last output.
    """

    __constants__ = ["norm"]

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__()
        self.layers = ModuleList([copy.deepcopy(decoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Return the decoding of ``tgt`` given ``memory``, in the shape of ``tgt``.

        Arguments are those of :class:`TransformerDecoderLayer`; ``tgt_is_causal=None`` looks at ``tgt_mask``.
        """
        tgt_is_causal = _is_causal_mask(tgt_mask, tgt_is_causal)
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else self.norm(x)


class Transformer(Module):
    """The encoder-decoder model, a drop-in replacement of :class:`torch.nn.Transformer`.

    Source: "Attention Is All You Need" (arXiv 1706.03762); Hung-yi Lee's lectures on the Transformer. Constructor,
    results and ``state_dict`` are torch's, and ``torch.manual_seed`` gives the same parameters.

    Args:
        d_model, nhead: model dimension E and number of heads.
        num_encoder_layers, num_decoder_layers: depth of the two stacks.
        dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as
            :class:`TransformerEncoderLayer`.
        custom_encoder, custom_decoder: modules used in place of the stacks.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        layer_args = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first)
        kwargs = {"bias": bias, "device": device, "dtype": dtype}
        if custom_encoder is None:
            layer = TransformerEncoderLayer(*layer_args, **kwargs)
            norm = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
            custom_encoder = TransformerEncoder(layer, num_encoder_layers, norm)
        self.encoder = custom_encoder
        if custom_decoder is None:
            layer = TransformerDecoderLayer(*layer_args, **kwargs)
            norm = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
            custom_decoder = TransformerDecoder(layer, num_decoder_layers, norm)
        self.decoder = custom_decoder
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encode ``src``, decode ``tgt`` against it; return the decoder's output, shaped as ``tgt``.

        Args:
            src: ``(S, N, E)``, ``(N, S, E)`` if ``batch_first``, or ``(S, E)``.
            tgt: ``(T, N, E)``, ``(N, T, E)`` if ``batch_first``, or ``(T, E)``.
            src_mask, tgt_mask, memory_mask: ``(S, S)``, ``(T, T)`` and ``(T, S)``, or with ``N * nhead`` first; bool
                (True hides) or float (added).
            src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: ``(N, S)``, ``(N, T)`` and
                ``(N, S)``, unbatched without N; bool (True hides) or float (added).
            src_is_causal, tgt_is_causal, memory_is_causal: the mask is the causal mask. ``None`` looks at the mask.

        Raises:
            RuntimeError: ``src`` and ``tgt`` differ in batch size, or have not ``d_model`` features.
        """
        batch = 0 if self.batch_first else 1
        if src.dim() == 3 and src.shape[batch] != tgt.shape[batch]:
            got = f"{src.shape[batch]} and {tgt.shape[batch]}"
            raise RuntimeError(f"Transformer: src and tgt must have the same batch size; got {got}")
        if src.shape[-1] != self.d_model or tgt.shape[-1] != self.d_model:
            got = f"d_model = {self.d_model} features; got {src.shape[-1]} and {tgt.shape[-1]}"
            raise RuntimeError(f"Transformer: src and tgt must have {got}")
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    @staticmethod
    def generate_square_subsequent_mask(
        sz: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the float causal mask ``(sz, sz)``: 0 on and below the diagonal, -inf above."""
        return torch.full((sz, sz), float("-inf"), dtype=dtype, device=device).triu(1)

    def _reset_parameters(self) -> None:
        for p in self.parameters():
            if p.dim() > 1:
                xavier_uniform_(p)
