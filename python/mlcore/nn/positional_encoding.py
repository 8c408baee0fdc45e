"""Where a token stands, told to attention: added to the token (sinusoidal, learned) or turned into queries and keys (rotary).
What is added to scores instead is attention's own argument: ALiBi, relative tables (mlcore.ops.attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


class _AddedEncoding(torch.nn.Module):
    def __init__(self, embed_dim: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(embed_dim, bool) or not isinstance(embed_dim, int) or embed_dim < 1:
            raise ValueError(f"{name}: embed_dim must be a positive integer; got {embed_dim!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{name}: dropout must be in [0, 1]; got {dropout}")
        self.embed_dim, self.dropout, self.batch_first = embed_dim, dropout, batch_first

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x plus the encoding of its positions, in x's dtype; then dropout in training.

        Args:
            x: ``(N, T, E)`` if ``batch_first`` else ``(T, N, E)``; unbatched ``(T, E)``.
            offset: the position of the first token, where earlier ones are cached.

        Raises:
            ValueError: another shape, a negative offset, or positions that there is no encoding of.
        """
        name = type(self).__name__
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise ValueError(f"{name}: x must be 2-D or 3-D with {self.embed_dim} features; got shape {tuple(x.shape)}")
        if offset < 0:
            raise ValueError(f"{name}: offset must not be negative; got {offset}")
        batched_last = x.dim() == 3 and not self.batch_first
        length = x.shape[0 if batched_last or x.dim() == 2 else 1]
        encoding = self.encoding(offset, length, x.device).to(x.dtype)
        x = x + (encoding.unsqueeze(1) if batched_last else encoding)
        return torch.nn.functional.dropout(x, self.dropout, self.training)

    def encoding(self, offset: int, length: int, device=None) -> Tensor:
        """(length, E) of positions offset, offset + 1, ..."""
        raise NotImplementedError


class SinusoidalEncoding(_AddedEncoding):
    r"""Adds :math:`\sin(p / 10000^{2c / E})` to channel 2c and the cosine to channel 2c + 1 of the token at position p.

    Source: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762). Any length; computed in float32.

    Args:
        embed_dim: features E; an odd number leaves out the last cosine.
        base: 10000 in the formula.
        dropout: applied to the sum in training.
        batch_first: batched tensors are ``(N, T, E)``; ``False`` is ``(T, N, E)``.
    """

    def __init__(self, embed_dim: int, *, base: float = 10000.0, dropout: float = 0.0, batch_first: bool = False) -> None:
        super().__init__(embed_dim, dropout, batch_first)
        if not base > 0.0:
            raise ValueError(f"SinusoidalEncoding: base must be positive; got {base}")
        self.base = base

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, base={self.base}"

    def encoding(self, offset: int, length: int, device=None) -> Tensor:
        """(length, E) of positions offset, offset + 1, ..."""
        angles = _angles(offset, length, (self.embed_dim + 1) // 2, self.embed_dim / 2, self.base, device)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, : self.embed_dim]


class LearnedEncoding(_AddedEncoding):
    """Adds a learned vector for each position, as BERT and GPT do.

    Args:
        max_length: positions.
        embed_dim: features E.
        dropout: applied to the sum in training.
        batch_first: batched tensors are ``(N, T, E)``; ``False`` is ``(T, N, E)``.
        device, dtype: of the parameter ``weight`` (max_length, E), normal with standard deviation 0.02 at the start.
    """

    def __init__(
        self, max_length: int, embed_dim: int, *, dropout: float = 0.0, batch_first: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__(embed_dim, dropout, batch_first)
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"LearnedEncoding: max_length must be a positive integer; got {max_length!r}")
        weight = torch.empty(max_length, embed_dim, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(torch.nn.init.normal_(weight, std=0.02))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.embed_dim}"

    def encoding(self, offset: int, length: int, device=None) -> Tensor:
        """(length, E) of positions offset, offset + 1, ..."""
        if offset + length > self.weight.shape[0]:
            raise ValueError(
                f"LearnedEncoding: there are {self.weight.shape[0]} positions; got {length} tokens from {offset} on"
            )
        return self.weight[offset : offset + length]


class RotaryEncoding(torch.nn.Module):
    """Turns pairs of a head's channels by angles that grow with the position: scores then depend on distance alone.

    Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864). Apply it to queries and keys, not to values.

    Args:
        rotary_dim: channels that turn, an even number; those beyond stay.
        base: pair r turns by base ** (-2 r / rotary_dim) a position.
        interleaved: pairs are neighbours (GPT-J); False: channels r and r + rotary_dim / 2 (GPT-NeoX, LLaMA).
    """

    def __init__(self, rotary_dim: int, *, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int) or rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"RotaryEncoding: rotary_dim must be even and at least 2; got {rotary_dim!r}")
        if not base > 0.0:
            raise ValueError(f"RotaryEncoding: base must be positive; got {base}")
        self.rotary_dim, self.base, self.interleaved = rotary_dim, base, interleaved

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, base={self.base}, interleaved={self.interleaved}"

    def tables(self, length: int, offset: int = 0, device=None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (length, rotary_dim / 2) float32, as mlcore.ops.attention_with_kvcache takes them."""
        angles = _angles(offset, length, self.rotary_dim // 2, self.rotary_dim / 2, self.base, device)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (..., T, D) turned; offset is the position of its first token.

        Raises:
            ValueError: D is below rotary_dim, or offset is negative.
        """
        if offset < 0 or x.shape[-1] < self.rotary_dim:
            raise ValueError(
                f"RotaryEncoding: x must have at least {self.rotary_dim} channels, offset must not be negative; "
                f"got {x.shape[-1]}, {offset}"
            )
        return ops.rotate(x, *self.tables(x.shape[-2], offset, x.device), self.interleaved)


def _angles(offset: int, length: int, pairs: int, whole: float, base: float, device) -> Tensor:
    """(length, pairs): position * base ** (-pair / whole). In float64 until the end: far positions lose no digits."""
    positions = torch.arange(offset, offset + length, dtype=torch.float64, device=device)
    rates = base ** (-torch.arange(pairs, dtype=torch.float64, device=device) / whole)
    return (positions[:, None] * rates).remainder(2 * torch.pi).float()
