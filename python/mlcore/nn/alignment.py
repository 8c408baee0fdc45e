"""Attention of sequence-to-sequence decoders: additive scores, location-aware and monotonic alignment, guided attention.

Lengths are those of speech and translation, so the pairwise scores stand in memory; nothing here has a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


class AdditiveAttention(torch.nn.Module):
    r"""Attention with the score :math:`e_{ij} = w^\top \tanh(W q_i + U k_j + b)`.

    Source: Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate" (arXiv 1409.0473);
    Hung-yi Lee's lectures on self-attention, which call it the additive score.

    Args:
        query_dim, key_dim: features of queries and keys.
        attention_dim: features A inside the tanh.
        device, dtype: of the parameters.
    """

    def __init__(self, query_dim: int, key_dim: int, attention_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("attention_dim", attention_dim)):
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1; got {size}")
        factory = {"device": device, "dtype": dtype}
        self.query_proj = torch.nn.Linear(query_dim, attention_dim, bias=False, **factory)
        self.key_proj = torch.nn.Linear(key_dim, attention_dim, **factory)
        self.score = torch.nn.Linear(attention_dim, 1, bias=False, **factory)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from every query to all keys.

        Args:
            query: (B, L, query_dim), one decoder step being L = 1.
            key: (B, S, key_dim).
            value: (B, S, V); None is key.
            key_padding_mask: (B, S) boolean, True hides the key.

        Returns:
            (context (B, L, V), weights (B, L, S)); where every key is hidden both are 0.

        Raises:
            ValueError: shapes or dtypes break the rules above.
        """
        value = self._checked(query, key, value, key_padding_mask)
        weights = _softmax(self._energies(query, key), key_padding_mask)
        return weights @ value, weights

    def _energies(self, query: Tensor, key: Tensor, extra: Tensor | None = None) -> Tensor:
        """(B, L, S). extra: (B, L | 1, S, A), added inside the tanh."""
        inside = self.query_proj(query).unsqueeze(2) + self.key_proj(key).unsqueeze(1)  # (B, L, S, A)
        return self.score(torch.tanh(inside if extra is None else inside + extra)).squeeze(-1)

    def _checked(self, query: Tensor, key: Tensor, value: Tensor | None, hidden: Tensor | None) -> Tensor:
        name, value = type(self).__name__, key if value is None else value
        if query.dim() != 3 or query.shape[2] != self.query_proj.in_features:
            want = f"(B, L, {self.query_proj.in_features})"
            raise ValueError(f"{name}: query must be {want}; got {tuple(query.shape)}")
        if key.dim() != 3 or key.shape[0] != query.shape[0] or key.shape[2] != self.key_proj.in_features:
            want = f"({query.shape[0]}, S, {self.key_proj.in_features})"
            raise ValueError(f"{name}: key must be {want}; got {tuple(key.shape)}")
        if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
            raise ValueError(f"{name}: value must be (B, S, V) with key's B, S; got {tuple(value.shape)}")
        if hidden is not None and (hidden.dtype != torch.bool or hidden.shape != key.shape[:2]):
            want = f"boolean, (B, S) = {tuple(key.shape[:2])}"
            raise ValueError(f"{name}: key_padding_mask must be {want}; got {hidden.dtype}, {tuple(hidden.shape)}")
        return value

    def _check_previous(self, previous: Tensor, key: Tensor) -> None:
        want = (key.shape[0], 1, key.shape[1])
        if previous.shape != want:
            raise ValueError(f"{type(self).__name__}: previous must be (B, 1, S) = {want}; got {tuple(previous.shape)}")


class LocationAwareAttention(AdditiveAttention):
    r"""Additive attention that also sees where it looked before: :math:`e_j = w^\top \tanh(W q + U k_j + V f_j + b)`, where
    :math:`f` is a convolution of the previous step's weights.

    Source: Chorowski et al. 2015, "Attention-Based Models for Speech Recognition" (arXiv 1506.07503).

    Args:
        query_dim, key_dim, attention_dim, device, dtype: as AdditiveAttention's.
        filters: channels of the convolution.
        kernel_size: its width in keys, odd.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        filters: int = 32,
        kernel_size: int = 31,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(query_dim, key_dim, attention_dim, device=device, dtype=dtype)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"LocationAwareAttention: kernel_size must be odd and positive; got {kernel_size}")
        factory = {"device": device, "dtype": dtype}
        self.location = torch.nn.Conv1d(1, filters, kernel_size, padding=kernel_size // 2, bias=False, **factory)
        self.location_proj = torch.nn.Linear(filters, attention_dim, bias=False, **factory)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One decoder step.

        Args:
            query: (B, 1, query_dim).
            key, value, key_padding_mask: as AdditiveAttention's.
            previous: (B, 1, S), the weights of the step before (or their sum over all steps, as Tacotron 2); None is zeros.

        Returns:
            (context (B, 1, V), weights (B, 1, S)).
        """
        value = self._checked(query, key, value, key_padding_mask)
        if query.shape[1] != 1:
            raise ValueError(f"LocationAwareAttention: query must be one step, (B, 1, query_dim); got {tuple(query.shape)}")
        if previous is None:
            previous = key.new_zeros(key.shape[0], 1, key.shape[1])
        self._check_previous(previous, key)
        features = self.location_proj(self.location(previous).transpose(1, 2)).unsqueeze(1)  # (B, 1, S, A)
        weights = _softmax(self._energies(query, key, features), key_padding_mask)
        return weights @ value, weights


class MonotonicAttention(AdditiveAttention):
    r"""Hard monotonic alignment, trained in expectation: each step scans on from where the last one stopped and stops at key j
    with probability :math:`p_{ij} = \sigma(e_{ij} + r)`.

    In training the weights are the expected alignment,
    :math:`\alpha_{ij} = p_{ij} \sum_{k \le j} \alpha_{i-1,k} \prod_{k \le l < j} (1 - p_{il})`,
    with noise on the energies so that they learn to be decisive; in evaluation the alignment is hard (:math:`p > 1/2`).

    Source: Raffel et al. 2017, "Online and Linear-Time Attention by Enforcing Monotonic Alignments" (arXiv 1704.00784).

    Args:
        query_dim, key_dim, attention_dim, device, dtype: as AdditiveAttention's.
        noise: standard deviation of the noise in training.
        initial_offset: r at the start; negative, so that attention begins by reading on.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        noise: float = 1.0,
        initial_offset: float = -1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(query_dim, key_dim, attention_dim, device=device, dtype=dtype)
        if not noise >= 0:
            raise ValueError(f"MonotonicAttention: noise must not be negative; got {noise}")
        self.noise = noise
        self.offset = torch.nn.Parameter(torch.full((), initial_offset, device=device, dtype=dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Steps of a decoder, each behind the last.

        Args:
            query, key, value, key_padding_mask: as AdditiveAttention's.
            previous: (B, 1, S), the weights of the step before the first query; None: at the first key.

        Returns:
            (context (B, L, V), weights (B, L, S)). A row sums to less than 1 by the probability of running past the end.
        """
        value = self._checked(query, key, value, key_padding_mask)
        B, S = key.shape[:2]
        energies = self._energies(query, key) + self.offset
        if previous is None:
            previous = torch.nn.functional.one_hot(torch.zeros(B, 1, dtype=torch.int64, device=key.device), max(S, 1))
            previous = previous[..., :S].to(energies.dtype)
        self._check_previous(previous, key)
        if self.training and self.noise:
            energies = energies + self.noise * torch.randn_like(energies)
        stop = torch.sigmoid(energies) if self.training else (energies > 0).to(energies.dtype)
        if key_padding_mask is not None:
            stop = stop.masked_fill(key_padding_mask.unsqueeze(1), 0.0)
        rows, last = [], previous[:, 0]
        for p in stop.unbind(1):
            last = _expected_alignment(p, last) if self.training else _hard_alignment(p, last)
            rows.append(last)
        weights = torch.stack(rows, 1) if rows else energies
        return weights @ value, weights


def _expected_alignment(stop: Tensor, previous: Tensor) -> Tensor:
    """(B, S) weights of a step from its stopping probabilities and the last step's weights.

    With mass[j] = previous[j] + (1 - stop[j - 1]) * mass[j - 1], the probability of looking at key j, the weight is
    stop[j] * mass[j]. The recurrence is solved as a triangular product in log space, where no factor is divided by.
    """
    carry = torch.log1p(-stop.clamp(max=1.0 - torch.finfo(stop.dtype).eps))
    passed = torch.nn.functional.pad(carry.cumsum(-1), (1, -1))  # log of the product over the keys before
    reach = (passed.unsqueeze(-1) - passed.unsqueeze(-2)).tril()  # (B, j, k): from key k to key j
    return stop * torch.einsum("bjk,bk->bj", reach.exp().tril(), previous)


def _hard_alignment(stop: Tensor, previous: Tensor) -> Tensor:
    """The same for stops that are 0 or 1: key j is reached from key k where none from k to j - 1 stops."""
    stops = torch.nn.functional.pad(stop.cumsum(-1), (1, -1))
    reach = (stops.unsqueeze(-1) == stops.unsqueeze(-2)).tril().to(previous.dtype)
    return stop * torch.einsum("bjk,bk->bj", reach, previous)


def guided_attention_loss(
    weights: Tensor, query_lengths: Tensor | None = None, key_lengths: Tensor | None = None, sigma: float = 0.2
) -> Tensor:
    r"""Mean of weights times :math:`1 - \exp(-(i / L - j / S)^2 / 2 \sigma^2)`: small where attention follows the diagonal.

    Source: Tachibana et al. 2018, "Efficiently Trainable Text-to-Speech System ... with Guided Attention" (arXiv 1710.08969);
    Hung-yi Lee's lectures, which ask for it where the alignment is known to be monotonic.

    Args:
        weights: (B, L, S), attention weights.
        query_lengths, key_lengths: (B,) integers; None is L and S. What lies beyond counts nothing.
        sigma: width of the band.

    Returns:
        A scalar: the mean over the sequences' own pairs.

    Raises:
        ValueError: weights aren't (B, L, S), or sigma isn't positive.
    """
    if weights.dim() != 3:
        raise ValueError(f"guided_attention_loss: weights must be (B, L, S); got {tuple(weights.shape)}")
    if not sigma > 0:
        raise ValueError(f"guided_attention_loss: sigma must be positive; got {sigma}")
    B, L, S = weights.shape

    def positions(length: int, lengths: Tensor | None):
        i = torch.arange(length, device=weights.device).expand(B, length)
        lengths = torch.full((B,), length, device=weights.device) if lengths is None else lengths.to(weights.device)
        return i / lengths.clamp(min=1).unsqueeze(1), i < lengths.unsqueeze(1)

    (row, row_real), (column, column_real) = positions(L, query_lengths), positions(S, key_lengths)
    penalty = 1.0 - torch.exp(-((row.unsqueeze(2) - column.unsqueeze(1)) ** 2) / (2.0 * sigma**2))
    real = row_real.unsqueeze(2) & column_real.unsqueeze(1)
    return (weights * penalty.to(weights.dtype) * real).sum() / real.sum().clamp(min=1)


def _softmax(scores: Tensor, hidden: Tensor | None) -> Tensor:
    """Over the keys that aren't hidden; 0 where all are."""
    if hidden is None:
        return scores.softmax(-1)
    hidden = hidden.unsqueeze(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return weights.masked_fill(hidden, 0.0)
