"""Multi-head attention by recurrence, with MultiheadAttention's calling convention. Gates are here, the recurrence is
mlcore.ops.linear_attention's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._pairless import PairlessAttention


class LinearAttention(PairlessAttention):
    r"""Multi-head attention with :math:`\varphi(q) \varphi(k)^\top` in place of the softmax: cost linear in the length.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236); Hung-yi Lee's lectures on self-attention.

    Parameters and ``state_dict`` are those of :class:`torch.nn.MultiheadAttention`, as are the arguments of :meth:`forward`;
    in a Transformer only the class's name changes.

    Args:
        embed_dim: model dimension E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        bias: add a bias to the projections.
        kdim, vdim: feature dimensions of ``key`` and ``value``; ``None`` is ``embed_dim``.
        batch_first: batched tensors are ``(N, L, E)``; ``False`` is ``(L, N, E)``.
        feature_map, normalize: as :func:`mlcore.ops.linear_attention`'s.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        feature_map: str | Callable[[Tensor], Tensor] | None = "elu",
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype
        )
        self.feature_map, self.normalize = feature_map, normalize

    def _attend(self, key: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, causal: bool) -> Tensor:
        """(N, H, T, D). hidden: (N, 1, S, 1), True where a key counts for nothing, or None."""
        feature_map = self.feature_map
        if hidden is not None:  # behind the feature map, as phi(0) need not be 0
            q, k, feature_map = _mapped(q, feature_map), _mapped(k, feature_map).masked_fill(hidden, 0.0), None
            v = v.masked_fill(hidden, 0.0)
        return ops.linear_attention(q, k, v, feature_map=feature_map, normalize=self.normalize, causal=causal)

    def _gate_input(self, key: Tensor) -> Tensor:
        """The keys' tokens as (N, S, kdim)."""
        return key if self.batch_first else key.transpose(0, 1)


class _Gated(LinearAttention):
    """What the causal layers without a feature map share: they are causal whatever is_causal says."""

    def __init__(self, embed_dim, num_heads, bias=True, batch_first=False, *, device=None, dtype=None) -> None:
        super().__init__(
            embed_dim, num_heads, bias, batch_first=batch_first, feature_map=None, normalize=False, device=device, dtype=dtype
        )


class RetentionLayer(_Gated):
    r"""Multi-head retention: head h forgets by :math:`\gamma_h = 1 - 2^{-5-h}` a token; causal whatever ``is_causal`` says.

    Source: Sun et al. 2023, "Retentive Network" (arXiv 2307.08621). Queries are scaled by :math:`1 / \sqrt{D}`; each head's
    output is normalised by its root mean square before ``out_proj``. The paper's rotary positions and output gate are the
    caller's.

    Args:
        embed_dim, num_heads, bias, batch_first, device, dtype: as :class:`LinearAttention`'s.
    """

    def __init__(self, embed_dim, num_heads, bias=True, batch_first=False, *, device=None, dtype=None) -> None:
        super().__init__(embed_dim, num_heads, bias, batch_first, device=device, dtype=dtype)
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(num_heads, dtype=torch.float64))))
        self.register_buffer("decay", decay.to(device=device, dtype=torch.float32), persistent=False)

    def _attend(self, key, q, k, v, hidden, causal):
        q = q * self.head_dim**-0.5
        gate, decay = None, self.decay
        if hidden is not None:  # a hidden token adds nothing and decays nothing
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            decay, gate = None, self.decay.view(1, -1, 1).expand(q.shape[:3]).masked_fill(hidden.squeeze(3), 0.0)
        o = ops.linear_attention(q, k, v, feature_map=None, normalize=False, decay=decay, gate=gate)
        return ops.rms_norm(o)


class GatedLinearAttention(_Gated):
    r"""Gated linear attention: every token decides for each feature of the keys how much is forgotten.

    Source: Yang et al. 2024, "Gated Linear Attention Transformers" (arXiv 2312.06635): the log gate is
    :math:`\text{logsigmoid}(x W_1 W_2 + b) / \tau`, :math:`\tau = 16`; causal whatever ``is_causal`` says.

    Args:
        embed_dim, num_heads, bias, batch_first, device, dtype: as :class:`LinearAttention`'s.
        gate_rank: inner dimension of the gate's projection.
        gate_temperature: tau.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        bias=True,
        batch_first=False,
        *,
        gate_rank=16,
        gate_temperature=16.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(embed_dim, num_heads, bias, batch_first, device=device, dtype=dtype)
        self.gate_temperature = gate_temperature
        self.gate_proj = torch.nn.Sequential(
            torch.nn.Linear(embed_dim, gate_rank, bias=False, device=device, dtype=dtype),
            torch.nn.Linear(gate_rank, embed_dim, device=device, dtype=dtype),
        )

    def _attend(self, key, q, k, v, hidden, causal):
        gate = F.logsigmoid(self.gate_proj(self._gate_input(key)).float()) / self.gate_temperature  # (N, S, E)
        gate = gate.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        if hidden is not None:
            k, v, gate = (t.masked_fill(hidden, 0.0) for t in (k, v, gate))
        o = ops.linear_attention(q * self.head_dim**-0.5, k, v, feature_map=None, normalize=False, gate=gate)
        return ops.rms_norm(o)


class DeltaNet(_Gated):
    r"""The delta rule: a token replaces what the state holds under its key by its value, with a strength of its own; with
    ``gated`` all else is forgotten by a factor of its own.

    Sources: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule" (arXiv 2406.06484); gated: Yang et al.
    2025, "Gated Delta Networks" (arXiv 2412.06464). Queries and keys are SiLU'd and have length 1, outputs are normalised as
    :class:`RetentionLayer`'s; causal whatever ``is_causal`` says.

    Args:
        embed_dim, num_heads, bias, batch_first, device, dtype: as :class:`LinearAttention`'s.
        gated: the gated delta rule, with the log gate :math:`-\text{softplus}(x W + b)`.
    """

    def __init__(
        self, embed_dim, num_heads, bias=True, batch_first=False, *, gated=False, device=None, dtype=None
    ) -> None:  # fmt: skip
        super().__init__(embed_dim, num_heads, bias, batch_first, device=device, dtype=dtype)
        self.beta_proj = torch.nn.Linear(embed_dim, num_heads, device=device, dtype=dtype)
        self.gate_proj = torch.nn.Linear(embed_dim, num_heads, device=device, dtype=dtype) if gated else None

    def _attend(self, key, q, k, v, hidden, causal):
        x = self._gate_input(key)
        beta = self.beta_proj(x).float().sigmoid().transpose(1, 2)  # (N, H, S)
        gate = None if self.gate_proj is None else -F.softplus(self.gate_proj(x).float()).transpose(1, 2)
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        if hidden is not None:
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            beta = beta.masked_fill(hidden.squeeze(3), 0.0)
            gate = None if gate is None else gate.masked_fill(hidden.squeeze(3), 0.0)
        return ops.rms_norm(ops.linear_attention(q, k, v, feature_map=None, normalize=False, gate=gate, beta=beta))


def _mapped(x: Tensor, feature_map) -> Tensor:
    if callable(feature_map):
        return feature_map(x)
    named = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "softmax": lambda x: x.softmax(-1), None: lambda x: x}
    return named[feature_map](x)


class RandomFeatures(torch.nn.Module):
    r"""Performer's positive random features (FAVOR+): a feature map whose products estimate the softmax kernel.

    .. math::
        \varphi(x) = \exp(W \hat x - |\hat x|^2 / 2 - c) / \sqrt{m}, \quad \hat x = x / D^{1/4}, \quad
        E[\varphi(q)^\top \varphi(k)] \propto \exp(q^\top k / \sqrt{D})

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv 2009.14794). Rows of W are orthogonal in
    blocks of D, with the lengths of normal vectors. c is the largest exponent of all tokens, without gradient: it keeps the
    numbers small and cancels in ``normalize`` (for causal use too, as it is one number for a head; only how small terms
    underflow depends on later tokens, and a saved state can't be resumed, as its c is another). Use as
    ``LinearAttention(..., feature_map=RandomFeatures(head_dim, 256))``.

    Args:
        head_dim: D.
        num_features: m.
        device, dtype: of W, a buffer.
    """

    def __init__(self, head_dim: int, num_features: int, *, device=None, dtype=None) -> None:
        super().__init__()
        if head_dim < 1 or num_features < 1:
            raise ValueError(f"RandomFeatures: head_dim and num_features must be positive; got {head_dim} and {num_features}")
        self.head_dim, self.num_features = head_dim, num_features
        self.register_buffer("weight", torch.empty(num_features, head_dim, device=device, dtype=dtype))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draws new features."""
        D, m = self.head_dim, self.num_features
        blocks = []
        for _ in range(-(-m // D)):
            rotation, upper = torch.linalg.qr(torch.randn(D, D))
            blocks.append((rotation * upper.diagonal().sign()).mT)  # else the directions aren't uniform: a lasting error
        lengths = torch.randn(m, D).norm(dim=1, keepdim=True)
        self.weight.copy_(torch.cat(blocks)[:m] * lengths)

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, D) to (..., T, num_features)."""
        x = x * self.head_dim**-0.25
        exponent = F.linear(x, self.weight.to(x.dtype)) - x.square().sum(-1, keepdim=True) / 2
        return (exponent - exponent.detach().amax((-2, -1), keepdim=True)).exp() * self.num_features**-0.5
