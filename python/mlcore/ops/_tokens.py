"""What ops over queries, keys and values (B, H, T, D) share: their first checks, and rows that kernels can read."""

from __future__ import annotations

import torch


def inner_contiguous(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy where its last dimension isn't contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def check_tokens(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layouts: tuple[str, str, str]) -> None:
    """Raises unless q, k and v are 4-D, of one floating dtype and on one device; layouts are what errors call them."""
    for name, t, layout in zip("qkv", (q, k, v), layouts):
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} must be {layout}; got shape {tuple(t.shape)}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{op}: q, k and v must have the same floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"{op}: q, k and v must be on the same device; got {q.device}, {k.device}, {v.device}")
