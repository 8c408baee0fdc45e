"""Attention that also returns its weights: plain torch, O(Tq * Tk) memory.

Not a fast path: mlcore.ops.attention never forms the weights. This is for callers that ask to see them
(MultiheadAttention(need_weights=True), output_attentions=True), where the matrix must exist anyway.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return ``(o, weights)`` for ``o = weights @ v``, with the conventions of :func:`mlcore.ops.attention`.

    Shapes: q ``(B, H, Tq, D)``; k ``(B, Hkv, Tk, D)``; v ``(B, Hkv, Tk, Dv)``; ``keep`` (bool, True = attend) and
    ``bias`` (additive) broadcast to ``(B, H, Tq, Tk)``; ``sinks`` ``(H,)``; o ``(B, H, Tq, Dv)``; weights
    ``(B, H, Tq, Tk)``, after dropout, in q's dtype. A row with every key masked has weights 0. A key that ``keep``
    hides from every query does not reach any output, whatever it holds.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if causal:
        Tq, Tk = q.shape[-2], k.shape[-2]
        tril = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
        keep = tril if keep is None else keep & tril
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if keep is not None:
        # 0 * NaN is NaN, in o as in dq: a hidden key's content goes before it is multiplied.
        hidden = ~keep.any(dim=-2).unsqueeze(-1)
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)

    scores = torch.matmul(q * scale, k.transpose(-2, -1))  # (B, H, Tq, Tk)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    # Softmax of a row of -inf is NaN, and so is its gradient: such rows go through it as zeros.
    dead = None
    if bias is not None and scores.shape[-1] > 0:
        scores = scores if keep is None else scores.masked_fill(~keep, -math.inf)
        dead = scores.detach().amax(dim=-1, keepdim=True) == -math.inf
        scores = scores.masked_fill(dead, 0.0)
    elif keep is not None:
        dead = ~keep.any(dim=-1, keepdim=True)
        scores = torch.where(keep, scores, torch.zeros_like(dead, dtype=scores.dtype).masked_fill(~dead, -math.inf))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)

    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    if dead is not None:
        weights = weights.masked_fill(dead, 0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
    return torch.matmul(weights, v), weights
