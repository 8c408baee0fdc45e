"""What LayerNorm and RMSNorm share: from a tensor normalised over several dimensions to the ops' last dimension and back."""

from __future__ import annotations

import torch


def apply_norm(norm, x, residual, shape, weight, *bias, eps):
    """norm(x, weight, *bias) over the trailing dimensions `shape`; y, or the pair (y, s) where there is a residual."""
    n = len(shape)
    if x.dim() < n or x.shape[-n:] != torch.Size(shape):
        raise ValueError(f"{norm.__name__}: x must end in normalized_shape {tuple(shape)}; got shape {tuple(x.shape)}")
    if n == 1:
        return norm(x, weight, *bias, residual=residual, eps=eps)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{norm.__name__}: residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
    flat = [None if t is None else t.flatten(-n) for t in (x, residual, weight, *bias)]  # (..., C), (..., C), (C), (C)
    out = norm(flat[0], *flat[2:], residual=flat[1], eps=eps)
    return out.view(x.shape) if residual is None else tuple(t.view(x.shape) for t in out)
