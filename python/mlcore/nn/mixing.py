"""Token mixing without attention: Fourier transforms (FNet), spatial gating (gMLP) and transposed MLPs (MLP-Mixer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Dropout, Linear, Module

from .layer_norm import LayerNorm


class FourierMixing(Module):
    r"""FNet's token mixing, which has no parameters: :math:`\Re(F_L (F_E x))`, Fourier transforms of both dimensions.

    Source: Lee-Thorp et al. 2022, "FNet: Mixing Tokens with Fourier Transforms" (arXiv 2105.03824). Every token reads every
    other one: not causal, and padding counts. Cost O(L log L).

    Args:
        norm: as :func:`torch.fft.fft2`'s; the paper's is ``"backward"``, ``"ortho"`` keeps the variance.
    """

    def __init__(self, norm: str = "backward") -> None:
        super().__init__()
        if norm not in ("forward", "backward", "ortho"):
            raise ValueError(f"FourierMixing: norm must be 'forward', 'backward' or 'ortho'; got {norm!r}")
        self.norm = norm

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., L, E) to (..., L, E), in x's dtype; 16-bit tensors are transformed in float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.fft.fft2(wide, norm=self.norm).real.to(x.dtype)


class SpatialGatingUnit(Module):
    r"""gMLP's token mixing: :math:`u \odot (W \text{norm}(v) + b)` for :math:`x = [u, v]`, W over tokens.

    Source: Liu et al. 2021, "Pay Attention to MLPs" (arXiv 2105.08050). W starts near 0 and b at 1, so that the unit begins as
    the identity of u.

    Args:
        d_ffn: features of x, even.
        seq_len: the longest sequence; a shorter one uses the first rows and columns of W.
        causal: token t reads tokens up to t: W is lower triangular.
        device, dtype: of the parameters.
    """

    def __init__(self, d_ffn: int, seq_len: int, *, causal: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        if d_ffn < 2 or d_ffn % 2 or seq_len < 1:
            raise ValueError(f"SpatialGatingUnit: d_ffn must be even and seq_len positive; got {d_ffn} and {seq_len}")
        self.d_ffn, self.seq_len, self.causal = d_ffn, seq_len, causal
        self.norm = LayerNorm(d_ffn // 2, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(torch.empty(seq_len, seq_len, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.ones(seq_len, device=device, dtype=dtype))
        torch.nn.init.uniform_(self.weight, -1e-3 / seq_len, 1e-3 / seq_len)

    def extra_repr(self) -> str:
        return f"{self.d_ffn}, {self.seq_len}, causal={self.causal}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., L, d_ffn) to (..., L, d_ffn / 2).

        Raises:
            ValueError: more than seq_len tokens.
        """
        L = x.shape[-2]
        if self.seq_len < L:
            raise ValueError(f"SpatialGatingUnit: sequences must have at most seq_len {self.seq_len} tokens; got {L}")
        weight = self.weight[:L, :L]
        u, v = x.chunk(2, -1)
        return u * ((weight.tril() if self.causal else weight) @ self.norm(v) + self.bias[:L, None])


class GatedMLP(Module):
    r"""One block of gMLP: :math:`y = x + \text{SGU}(\text{gelu}(\text{norm}(x) U)) V`.

    Source: Liu et al. 2021, "Pay Attention to MLPs" (arXiv 2105.08050).

    Args:
        d_model: model dimension E.
        d_ffn: inner dimension, even.
        seq_len, causal: as :class:`SpatialGatingUnit`'s.
        device, dtype: of the parameters.
    """

    def __init__(self, d_model: int, d_ffn: int, seq_len: int, *, causal: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model, device=device, dtype=dtype)
        self.proj_in = Linear(d_model, d_ffn, device=device, dtype=dtype)
        self.sgu = SpatialGatingUnit(d_ffn, seq_len, causal=causal, device=device, dtype=dtype)
        self.proj_out = Linear(d_ffn // 2, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., L, E) to (..., L, E)."""
        return x + self.proj_out(self.sgu(F.gelu(self.proj_in(self.norm(x)))))


class MixerBlock(Module):
    r"""One layer of MLP-Mixer: an MLP over tokens, the same for all channels, then one over channels, the same for all tokens.

    .. math::
        u = x + (W_2\, \text{gelu}(W_1\, \text{norm}(x)^\top))^\top, \quad y = u + W_4\, \text{gelu}(W_3\, \text{norm}(u))

    Source: Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision" (arXiv 2105.01601). Not causal, and for
    sequences of one length.

    Args:
        seq_len: number of tokens (the paper's patches).
        d_model: number of channels.
        tokens_mlp_dim, channels_mlp_dim: inner dimensions of the two MLPs.
        dropout: probability, behind both layers of an MLP.
        device, dtype: of the parameters.
    """

    def __init__(
        self, seq_len: int, d_model: int, tokens_mlp_dim: int, channels_mlp_dim: int, dropout: float = 0.0, *, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.seq_len = seq_len
        self.norm1, self.norm2 = (LayerNorm(d_model, **factory) for _ in range(2))
        self.token_mixing = _mlp(seq_len, tokens_mlp_dim, dropout, factory)
        self.channel_mixing = _mlp(d_model, channels_mlp_dim, dropout, factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., seq_len, d_model) to the same.

        Raises:
            ValueError: another number of tokens.
        """
        if x.shape[-2] != self.seq_len:
            raise ValueError(f"MixerBlock: sequences must have seq_len {self.seq_len} tokens; got {x.shape[-2]}")
        x = x + self.token_mixing(self.norm1(x).transpose(-1, -2)).transpose(-1, -2)
        return x + self.channel_mixing(self.norm2(x))


def _mlp(width: int, inner: int, dropout: float, factory: dict) -> torch.nn.Sequential:
    layers = [Linear(width, inner, **factory), torch.nn.GELU(), Dropout(dropout), Linear(inner, width, **factory)]
    return torch.nn.Sequential(*layers, Dropout(dropout))
