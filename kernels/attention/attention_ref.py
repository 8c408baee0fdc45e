"""Softmax attention in plain torch: the oracle of the tests and the fallback for float64 and devices without a kernel.

It holds the T x T matrix, differentiates any number of times, and computes in float32, or float64 for float64 tensors.
"""

from __future__ import annotations

import torch


def band_mask(tq: int, tk: int, left: int | None, right: int | None, offset: int, device=None) -> torch.Tensor:
    """(Tq, Tk) bool: query i sees key j where i + offset - left <= j <= i + offset + right (None: no limit)."""
    relative = torch.arange(tk, device=device)[None, :] - (torch.arange(tq, device=device)[:, None] + offset)
    seen = torch.ones(tq, tk, dtype=torch.bool, device=device)
    if left is not None:
        seen &= relative >= -left
    if right is not None:
        seen &= relative <= right
    return seen


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """A bijective mix of 32 bits (held in int64): multiply-xorshift, twice."""
    mask = 0xFFFFFFFF
    x = (x ^ (x >> 16)) & mask
    x = (x * 0x7FEB352D) & mask
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & mask
    return x ^ (x >> 16)


def dropout_keep(shape: tuple[int, int, int, int], seed: int, dropout_p: float, device=None) -> torch.Tensor:
    """(B, H, Tq, Tk) bool, True with probability 1 - dropout_p: a function of the seed and the position alone.

    As dropout.h states it: hash(hash(hash(seed_lo ^ (b * H + h)) ^ seed_hi ^ i) ^ j) compared with p * 2^32.
    """
    b, h, tq, tk = shape
    threshold = min(int(dropout_p * 4294967296.0), 0xFFFFFFFF)
    head = torch.arange(b * h, device=device).view(b, h, 1, 1)
    row = torch.arange(tq, device=device).view(1, 1, tq, 1)
    column = torch.arange(tk, device=device).view(1, 1, 1, tk)
    lo, hi = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    key = _hash32(_hash32(lo ^ head) ^ hi ^ row)
    return _hash32(key ^ column) >= threshold


def attention(q, k, v, *, mask=None, bias=None, relative=None, sinks=None, scale=1.0, softcap=None, dropout_p=0.0, seed=0):
    """(o, lse) of q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv).

    mask: bool, True = seen; bias: added to scale * q k^T (after the softcap); both broadcastable to (B, H, Tq, Tk).
    relative: (B|1, H|1, Tq + Tk - 1), added at j - i + Tq - 1; sinks: (H), one more score a head, without a value.
    A row that sees nothing gives o = 0 and lse = -inf. Keys that no query sees may hold anything.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if groups != 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is not None:
        mask = mask.expand(shape)
        seen = mask.any(2).unsqueeze(-1)
        k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
    s = scale * (q @ k.transpose(-1, -2))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(wide)
    if relative is not None and shape[2] and shape[3]:
        i, j = torch.arange(shape[2], device=q.device), torch.arange(shape[3], device=q.device)
        s = s + relative.to(wide)[..., j[None, :] - i[:, None] + shape[2] - 1]
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(wide).view(1, -1, 1, 1).expand(*shape[:3], 1)], -1)
    elif shape[3] == 0:
        return q.new_zeros((*shape[:3], v.shape[3])), q.new_full(shape[:3], float("-inf"))
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    p = e / torch.where(empty, torch.ones_like(total), total)
    lse = torch.where(empty, float("-inf"), torch.log(torch.where(empty, torch.ones_like(total), total)) + top).squeeze(-1)
    p = p[..., : shape[3]]
    if dropout_p > 0.0:
        keep = dropout_keep(shape, seed, dropout_p, q.device)
        p = torch.where(keep, p / (1.0 - dropout_p), 0.0) if dropout_p < 1.0 else p * 0.0
    return p @ v, lse
