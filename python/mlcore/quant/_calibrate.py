"""Packing that looks further than the nearest code: at the error of a group (MSE) or at the inputs of the layer (GPTQ).
All of it ends in the same PackedWeight, with the same speed, as pack()'s.
"""

from __future__ import annotations

import torch

from ._pack import _asymmetric, _grouped, _int_bits, _quotient, _symmetric
from ._packed import PackedWeight, pack_codes, spread


def _checked(name: str, weight: torch.Tensor, format: str, group_size: int | None) -> tuple[torch.Tensor, int, int]:
    """weight in float32, bits, group size."""
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: weight must be floating and finite, (N, K); got {weight.dtype} {tuple(weight.shape)}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"{name}: group_size must be at least 1; got {group_size}")
    K = max(weight.shape[1], 1)
    return weight.detach().float(), _int_bits(format), K if group_size is None else min(group_size, K)


def _codes(weight, scales, zeros, bits, group_size):
    """The nearest codes under given scales and zero points, (N, K) float."""
    K = weight.shape[1]
    return (_quotient(weight, scales, group_size).round() + spread(zeros, group_size, K)).clamp(0, 2**bits - 1)


def _fitted(weight, bits, group_size, symmetric):
    """Scales and zero points (N, G) of plain rounding."""
    _, scales, zeros = (_symmetric if symmetric else _asymmetric)(weight, bits, group_size)
    return scales, torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros.float()


def _best_scales(weight, bits, group_size, symmetric, steps=40, least=0.5):
    """Scales and zero points whose codes have the least squared error in each group, over `steps` narrower ranges."""
    scales, zeros = _fitted(weight, bits, group_size, symmetric)
    best, chosen = torch.full_like(scales, torch.inf), scales
    for shrink in torch.linspace(1, least, steps).tolist():
        tried = scales * shrink
        codes = _codes(weight, tried, zeros, bits, group_size)
        kept = (codes - spread(zeros, group_size, weight.shape[1])) * spread(tried, group_size, weight.shape[1])
        error = _grouped((weight - kept).square(), group_size).sum(2)
        chosen, best = torch.where(error < best, tried, chosen), torch.minimum(error, best)
    return chosen, zeros


def _finish(codes, scales, zeros, bits, group_size, symmetric) -> PackedWeight:
    zeros = None if symmetric else zeros.to(torch.uint8)
    return pack_codes(codes.to(torch.uint8), scales, bits=bits, group_size=group_size, zeros=zeros)


def pack_mse(
    weight: torch.Tensor, format: str = "int4", *, group_size: int | None = None, symmetric: bool = True
) -> PackedWeight:
    """Ranges that are clipped where this lowers a group's squared error. Needs no data.

    Args and errors: as pack()'s, for int formats.
    """
    weight, bits, size = _checked("pack_mse", weight, format, group_size)
    scales, zeros = _best_scales(weight, bits, size, symmetric)
    return _finish(_codes(weight, scales, zeros, bits, size), scales, zeros, bits, size, symmetric)


def pack_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    damping: float = 0.01,
) -> PackedWeight:
    """GPTQ (Frantar et al. 2022): columns are rounded in turn, and what a column lost is made up for in those that follow, so
    that the layer's outputs for the inputs seen change least.

    Args:
        hessian: (K, K), the sum of x x^T over rows x of the layer's input (see mlcore.quantize's batches).
        damping: part of the mean diagonal that is added to it.
        weight, format, group_size, symmetric: as pack()'s, for int formats.

    Raises:
        ValueError: as pack(), or hessian isn't finite, (K, K).
    """
    weight, bits, size = _checked("pack_gptq", weight, format, group_size)
    K = weight.shape[1]
    if hessian.shape != (K, K) or not bool(hessian.isfinite().all()):
        raise ValueError(f"pack_gptq: hessian must be finite, ({K}, {K}); got {tuple(hessian.shape)}")
    if 0 in weight.shape:
        return _finish(weight, *_fitted(weight, bits, size, symmetric), bits, size, symmetric)
    H = hessian.double()
    mean = H.diagonal().mean().item()
    H = H + torch.eye(K, dtype=H.dtype, device=H.device) * (damping * mean if mean > 0 else 1.0)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    rest, codes, all_scales, all_zeros = weight.clone(), torch.empty_like(weight), [], []
    for begin in range(0, K, size):
        end = min(begin + size, K)
        scales, zeros = _best_scales(rest[:, begin:end], bits, end - begin, symmetric)
        all_scales.append(scales)
        all_zeros.append(zeros)
        lost = torch.empty_like(rest[:, begin:end])
        for k in range(begin, end):
            column = rest[:, k : k + 1]
            codes[:, k : k + 1] = q = _codes(column, scales, zeros, bits, 1)
            lost[:, k - begin] = ((column - (q - zeros) * scales) / upper[k, k]).squeeze(1)
            rest[:, k:end] -= lost[:, k - begin, None] * upper[k, k:end]
        rest[:, end:] -= lost @ upper[begin:end, end:]
    return _finish(codes, torch.cat(all_scales, 1), torch.cat(all_zeros, 1), bits, size, symmetric)
