"""AFT in plain torch: the weighted means of aft.h, one softmax a feature, which is the oracle and the fallback; and the two
products that a user would write, which is what the benchmarks compare with. Both differentiate, also in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def position_bias(bias, window, T, S):
    """w (G, T, S) from bias as aft.h lays it out, or None."""
    if bias is None or window is None:
        return bias
    if bias.dim() == 2:
        bias = bias[:, None].expand(-1, T, -1)
    column = torch.arange(S, device=bias.device) - torch.arange(T, device=bias.device)[:, None] + window - 1  # (T, S)
    inside = (column >= 0) & (column < bias.shape[2])
    return bias.gather(2, column.clamp(0, bias.shape[2] - 1).expand(bias.shape[0], -1, -1)).where(inside, 0.0)


def aft(q, k, v, bias=None, window=None, causal=False):
    """o of aft.h, in float32 or, for float64 tensors, in float64. Forms (B, H, T, S) numbers, a feature after the other."""
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return weighted_means(*(t.to(wide) for t in (q, k, v)), bias, window, causal).to(q.dtype)


def weighted_means(q, k, v, bias=None, window=None, causal=False):
    """o of aft.h in the tensors' own dtype: a softmax a feature."""
    T, S = q.shape[2], k.shape[2]
    w = position_bias(bias, window, T, S)
    w = q.new_zeros(1, T, S) if w is None else w.to(q.dtype)
    if causal:
        w = w.masked_fill(~torch.ones(T, S, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    columns = []
    for k_d, v_d in zip(k.unbind(3), v.unbind(3)):
        scores = k_d[:, :, None] + w  # (B, H, T, S)
        hidden = scores == -torch.inf
        empty = hidden.all(3, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(3).masked_fill(empty, 0.0)
        columns.append((weights * v_d[:, :, None].masked_fill(hidden, 0.0)).sum(3))
    return q.sigmoid() * (torch.stack(columns, 3) if columns else torch.zeros_like(q))


def products(q, k, v, bias=None, window=None, causal=False):
    """The usual two products in the tensors' own dtype: exp(w) times exp(k) v and exp(k), from their largest exponents."""
    T, S = q.shape[2], k.shape[2]
    w = position_bias(bias, window, T, S)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    k = (k - k.amax(2, keepdim=True).detach()).exp()
    if w is None and not causal:
        return q.sigmoid() * (k * v).sum(2, keepdim=True) / k.sum(2, keepdim=True)
    if w is None:
        return q.sigmoid() * (k * v).cumsum(2) / k.cumsum(2)
    w = w.to(q.dtype)
    if causal:
        w = w.masked_fill(~seen, -torch.inf)
    w = (w - w.amax(2, keepdim=True).detach()).exp()
    return q.sigmoid() * (w @ (k * v)) / (w @ k)


def convolution(q, k, v, bias, window, causal=False):
    """AFT-conv as its paper computes it: depthwise convolutions with exp(w) - 1 and sums over all keys; S = T."""
    B, H, T, D = v.shape
    k = (k - k.amax(2, keepdim=True).detach()).exp()
    weight = bias.expand(H, -1).expm1()
    both = torch.cat([k * v, k.expand_as(v)], 3).permute(0, 3, 1, 2).reshape(B * 2 * D, H, T)
    near = F.conv1d(F.pad(both, (window - 1, 0 if causal else window - 1)), weight[:, None], groups=H)
    far = both.cumsum(2) if causal else both.sum(2, keepdim=True)
    num, den = (near + far).view(B, 2 * D, H, T).permute(0, 2, 3, 1).chunk(2, 3)
    return q.sigmoid() * num / den
