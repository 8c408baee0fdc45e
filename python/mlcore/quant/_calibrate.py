"""Packing that looks further than the nearest code: at a group's distribution (percentile, MSE, HQQ) or at the inputs of the
layer (GPTQ, AWQ). All of it ends in the same PackedWeight, with the same speed, as pack()'s.
"""

from __future__ import annotations

import torch

from ._pack import Rounded, _asymmetric, _grouped, _int_bits, _quotient, _symmetric
from ._packed import PackedWeight, spread


def _checked(name: str, weight: torch.Tensor, format: str, group_size: int | None) -> tuple[torch.Tensor, int, int]:
    """weight in float32, bits, group size."""
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: weight must be floating and finite, (N, K); got {weight.dtype} {tuple(weight.shape)}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"{name}: group_size must be at least 1; got {group_size}")
    K = max(weight.shape[1], 1)
    return weight.detach().float(), _int_bits(format, name, ()), K if group_size is None else min(group_size, K)


def _check_hessian(name: str, hessian: torch.Tensor, K: int) -> None:
    if hessian.shape != (K, K) or not bool(hessian.isfinite().all()):
        raise ValueError(f"{name}: hessian must be finite, ({K}, {K}); got {tuple(hessian.shape)}")


def _codes(weight, scales, zeros, bits, group_size):
    """The nearest codes under given scales and zero points, (N, K) float."""
    K = weight.shape[1]
    return (_quotient(weight, scales, group_size).round() + spread(zeros, group_size, K)).clamp(0, 2**bits - 1)


def _values(codes, scales, zeros, group_size):
    K = codes.shape[1]
    return (codes - spread(zeros, group_size, K)) * spread(scales, group_size, K)


def _fitted(weight, bits, group_size, symmetric):
    """Scales and zero points (N, G) of plain rounding."""
    _, scales, zeros = (_symmetric if symmetric else _asymmetric)(weight, bits, group_size)
    return scales, torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros.float()


def _best_scales(weight, bits, group_size, symmetric, importance=1.0, steps=25, least=0.5):
    """Scales and zero points whose codes have the least squared error in each group, over `steps` narrower ranges; importance
    (K) weighs the columns' errors.
    """
    scales, zeros = _fitted(weight, bits, group_size, symmetric)
    best, chosen = torch.full_like(scales, torch.inf), scales
    for shrink in torch.linspace(1, least, steps).tolist():
        tried = scales * shrink
        kept = _values(_codes(weight, tried, zeros, bits, group_size), tried, zeros, group_size)
        error = _grouped((weight - kept).square() * importance, group_size).sum(2)
        chosen, best = torch.where(error < best, tried, chosen), torch.minimum(error, best)
    return chosen, zeros


def _finish(codes, scales, zeros, bits, group_size, symmetric) -> Rounded:
    return Rounded(codes, scales, bits, group_size, None if symmetric else zeros)


def rounded_mse(weight, format="int4", group_size=None, symmetric=True) -> Rounded:
    """pack_mse before the codes are laid out."""
    weight, bits, size = _checked("pack_mse", weight, format, group_size)
    scales, zeros = _best_scales(weight, bits, size, symmetric)
    return _finish(_codes(weight, scales, zeros, bits, size), scales, zeros, bits, size, symmetric)


def pack_mse(
    weight: torch.Tensor, format: str = "int4", *, group_size: int | None = None, symmetric: bool = True
) -> PackedWeight:
    """Ranges that are clipped where this lowers a group's squared error. Needs no data.

    Args and errors: as pack()'s, for int formats.
    """
    return rounded_mse(weight, format, group_size, symmetric).pack()


def _quantile(grouped: torch.Tensor, part: float) -> torch.Tensor:
    """Of each last row (N, G, size) without its NaN; in slices, because torch takes at most 2^24 numbers at once."""
    rows = max(1, 2**23 // max(grouped[0].numel(), 1)) if len(grouped) else 1
    return torch.cat([torch.nanquantile(some, part, dim=2) for some in grouped.split(rows)])


def rounded_percentile(weight, format="int4", group_size=None, symmetric=True, percentile=99.9) -> Rounded:
    """pack_percentile before the codes are laid out."""
    weight, bits, size = _checked("pack_percentile", weight, format, group_size)
    if not 50 < percentile <= 100:
        raise ValueError(f"pack_percentile: percentile must be above 50, at most 100; got {percentile}")
    clipped = weight
    if weight.numel():
        grouped = _grouped(weight, size, torch.nan)
        if symmetric:
            high = _quantile(grouped.abs(), percentile / 100)
            low = -high
        else:
            low, high = _quantile(grouped, 1 - percentile / 100), _quantile(grouped, percentile / 100)
        K = weight.shape[1]
        clipped = weight.clamp(spread(low, size, K), spread(high, size, K))
    scales, zeros = _fitted(clipped, bits, size, symmetric)
    return _finish(_codes(weight, scales, zeros, bits, size), scales, zeros, bits, size, symmetric)


def pack_percentile(
    weight: torch.Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    percentile: float = 99.9,
) -> PackedWeight:
    """Ranges that hold `percentile` of a group's magnitudes (without symmetry: of its weights, at either end); what lies
    outside gets the outermost code. Needs no data; for large groups, a small one has no tail to cut.

    Args and errors: as pack()'s, for int formats; percentile above 50, at most 100.
    """
    return rounded_percentile(weight, format, group_size, symmetric, percentile).pack()


def rounded_hqq(weight, format="int4", group_size=None, symmetric=True, p=0.7, rounds=20) -> Rounded:
    """pack_hqq before the codes are laid out."""
    weight, bits, size = _checked("pack_hqq", weight, format, group_size)
    K, beta = weight.shape[1], 1.0
    scales, zeros = _fitted(weight, bits, size, symmetric)
    counts = _grouped(torch.ones_like(weight), size).sum(2)
    best, kept = torch.full_like(scales, torch.inf), (scales, zeros)
    for _ in range(rounds):
        codes = _codes(weight, scales, zeros, bits, size)
        lost = weight - _values(codes, scales, zeros, size)
        error = _grouped(lost.square(), size).sum(2)
        kept = tuple(torch.where(error < best, new, old) for new, old in zip((scales, zeros), kept))
        best = torch.minimum(error, best)
        # The generalized soft threshold, in steps of the codes: errors of a few steps are sparse and taken as outliers.
        steps = _quotient(lost, scales, size)
        outliers = steps.sign() * (steps.abs() - steps.abs().clamp(min=1e-6) ** (p - 1) / beta).clamp(min=0)
        target = weight - outliers * spread(scales, size, K)
        if not symmetric:
            shift = _grouped(codes - _quotient(target, scales, size), size).sum(2) / counts.clamp(min=1)
            zeros = shift.round().clamp(0, 2**bits - 1)
        whole = codes - spread(zeros, size, K)
        power = _grouped(whole.square(), size).sum(2)
        scales = torch.where(power > 0, _grouped(whole * target, size).sum(2) / power.clamp(min=1e-30), scales)
        beta *= 1.01
    scales, zeros = kept
    return _finish(_codes(weight, scales, zeros, bits, size), scales, zeros, bits, size, symmetric)


def pack_hqq(
    weight: torch.Tensor, format: str = "int4", *, group_size: int | None = None, symmetric: bool = True
) -> PackedWeight:
    """HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization"): the error is split into sparse outliers, found by shrinkage
    (an l_p norm with p = 0.7), and a rest whose squares are least, in turns. Needs no data.

    Zero points are whole codes here, so that it is scales, and with symmetric=False zero points too, that are solved for. Of
    all turns a group keeps the one with the least squared error, plain rounding among them.

    Args and errors: as pack()'s, for int formats.
    """
    return rounded_hqq(weight, format, group_size, symmetric).pack()


def pack_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    damping: float = 0.01,
) -> PackedWeight:
    """GPTQ (Frantar et al. 2022): columns are rounded in turn, those with large inputs first, and what a column lost is made up
    for in those that follow, so that the layer's outputs for the inputs seen change least. Ranges are clipped as by pack_mse,
    errors weighed by the inputs' squares.

    Args:
        hessian: (K, K), the sum of x x^T over rows x of the layer's input (see mlcore.quantize's batches).
        damping: part of the mean diagonal that is added to it.
        weight, format, group_size, symmetric: as pack()'s, for int formats.

    Raises:
        ValueError: as pack(), or hessian isn't finite, (K, K).
    """
    weight, bits, size = _checked("pack_gptq", weight, format, group_size)
    K = weight.shape[1]
    _check_hessian("pack_gptq", hessian, K)
    if 0 in weight.shape:
        return _finish(weight, *_fitted(weight, bits, size, symmetric), bits, size, symmetric).pack()
    H = hessian.double()
    mean = H.diagonal().mean().item()
    H = H + torch.eye(K, dtype=H.dtype, device=H.device) * (damping * mean if mean > 0 else 1.0)
    scales, zeros = _best_scales(weight, bits, size, symmetric, H.diagonal().float())
    order = H.diagonal().argsort(descending=True, stable=True)
    H = H[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    rest, scale, zero = (t.T[order].contiguous() for t in (weight, spread(scales, size, K), spread(zeros, size, K)))  # (K, N)
    divisor, codes, top = torch.where(scale == 0, 1.0, scale), torch.empty_like(rest), 2**bits - 1
    for begin in range(0, K, 32):  # what follows a block is made up for once a block
        end = min(begin + 32, K)
        lost = torch.empty_like(rest[begin:end])
        for k in range(begin, end):
            codes[k] = q = (rest[k] / divisor[k]).round_().add_(zero[k]).clamp_(0, top)
            lost[k - begin] = error = (rest[k] - (q - zero[k]) * scale[k]) / upper[k, k]
            rest[k:end].addr_(upper[k, k:end], error, alpha=-1)
        rest[end:] -= upper[begin:end, end:].T @ lost
    codes = torch.empty_like(codes).index_copy_(0, order, codes).T
    return _finish(codes, scales, zeros, bits, size, symmetric).pack()


def _output_error(lost: torch.Tensor, hessian: torch.Tensor) -> float:
    """|x lost^T|^2 summed over the inputs x that made the hessian."""
    return float(((lost @ hessian) * lost).sum(dtype=torch.float64))


def pack_awq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    dynamic_int8: bool = False,
    steps: int = 20,
) -> tuple[PackedWeight, torch.Tensor]:
    """AWQ (Lin et al. 2023): columns of W that meet large inputs are magnified before rounding, so that they lose less, and
    the inputs are reduced by as much. Magnifications are rms(x)^alpha, with the alpha that loses least at the output; then
    ranges are clipped as by pack_mse if that loses less. With dynamic_int8 what rounding the inputs loses counts as well, as in
    SmoothQuant (Xiao et al. 2022): a row's peak is taken as four times the rms of its largest column.

    Returns:
        The packed weight, and the input scale (K) float32 that x is multiplied by before it (QuantLinear's input_scale).
        It consists of powers of two from 2^-8 to 2^8: the multiplication is exact.

    Args and errors: as pack_gptq's.
    """
    weight, bits, size = _checked("pack_awq", weight, format, group_size)
    K = weight.shape[1]
    _check_hessian("pack_awq", hessian, K)
    hessian = hessian.float()
    rms = hessian.diagonal().clamp(min=0).sqrt()
    seen = rms > 0
    log = torch.where(seen, rms.clamp(min=1e-30).log2(), 0.0)
    log = torch.where(seen, log - log[seen].mean(), 0.0) if bool(seen.any()) else log

    def attempt(fit, magnify):
        scales, zeros = fit(weight * magnify, bits, size, symmetric)
        codes = _codes(weight * magnify, scales, zeros, bits, size)
        lost = weight - _values(codes, scales, zeros, size) / magnify
        peak = 4 * float((rms / magnify).max()) if dynamic_int8 and K else 0.0
        inputs = (peak / 127) ** 2 / 12 * float((weight * magnify).square().sum(dtype=torch.float64))
        return _output_error(lost, hessian) + inputs, _finish(codes, scales, zeros, bits, size, symmetric), magnify

    found = (attempt(_fitted, 2.0 ** (log * (i / steps)).round().clamp(-8, 8)) for i in range(steps))
    best = min(found, key=lambda one: one[0])
    _, codes, magnify = min(best, attempt(_best_scales, best[2]), key=lambda one: one[0])
    return codes.pack(), 1 / magnify
