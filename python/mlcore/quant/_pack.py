"""pack: floating weights to a PackedWeight by rounding. Methods that look further (GPTQ, ...) are in _calibrate.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._packed import PackedWeight, pack_codes, spread

_INT = tuple(f"int{bits}" for bits in range(1, 9))
_NOT_INT = ("ternary", "binary", "nf4", "codebook")

# NF4: 16 quantiles of a normal distribution, 0 among them, normalized to [-1, 1] (Dettmers et al. 2023, QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Rounded:
    """A weight in codes that don't lie in any layout yet: what pack_codes takes, under its names."""

    codes: torch.Tensor  # (N, K), whole numbers in any dtype
    scales: torch.Tensor  # (N, G) float32
    bits: int
    group_size: int
    zeros: torch.Tensor | None = None  # (N, G)
    offset: int | None = None
    codebook: torch.Tensor | None = None  # (T, E)
    format: str | None = None

    def pack(self) -> PackedWeight:
        parts = vars(self) | {"codes": self.codes.to(torch.uint8)}
        return pack_codes(**parts | {"zeros": None if self.zeros is None else self.zeros.to(torch.uint8)})

    def dequantize(self) -> torch.Tensor:
        """(N, K) float32: to the bit what pack().dequantize() gives."""
        K = self.codes.shape[1]
        if self.codebook is not None:
            rows = torch.arange(len(self.codes), device=self.codes.device)
            whole = self.codebook[(rows // -(-max(len(rows), 1) // len(self.codebook)))[:, None], self.codes.long()]
        else:
            half = 2 ** (self.bits - 1) if self.offset is None else self.offset
            whole = self.codes.float() - (half if self.zeros is None else spread(self.zeros.float(), self.group_size, K))
        return whole * spread(self.scales, self.group_size, K)


def _grouped(weight: torch.Tensor, group_size: int, fill: float = 0.0) -> torch.Tensor:
    """(N, G, group_size), padded."""
    N, K = weight.shape
    groups = -(-K // group_size)
    return torch.nn.functional.pad(weight, (0, groups * group_size - K), value=fill).view(N, groups, group_size)


def _quotient(weight, scales, group_size):
    """weight / scale; 0 where the scale is 0, as all weights of such a group are."""
    wide = spread(scales, group_size, weight.shape[1])
    return torch.where(wide == 0, 0.0, weight / torch.where(wide == 0, 1.0, wide))


def _symmetric(weight, bits, group_size):
    grouped, half = _grouped(weight, group_size), 2 ** (bits - 1)
    if bits == 8:  # -127 to 127
        scales = grouped.abs().amax(2) / 127
        return _quotient(weight, scales, group_size).round().clamp(-127, 127) + half, scales, None
    # There is one more code below zero than above: the largest magnitude of a group gets it, whatever its sign.
    peak = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = -peak / half
    return _quotient(weight, scales, group_size).round().add(half).clamp(0, 2 * half - 1), scales, None


def _asymmetric(weight, bits, group_size):
    grouped, top = _grouped(weight, group_size), 2**bits - 1
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = (high - low) / top
    zeros = torch.where(scales == 0, 0.0, -low / torch.where(scales == 0, 1.0, scales)).round()
    codes = _quotient(weight, scales, group_size).round() + spread(zeros, group_size, weight.shape[1])
    return codes.clamp(0, top), scales, zeros.to(torch.uint8)


def _ternary(weight, group_size):
    """Ternary Weight Networks (Li et al. 2016): 0 below 0.7 of the mean magnitude, the mean of the rest as scale."""
    counts = _grouped(torch.ones_like(weight), group_size).sum(2)
    magnitude = _grouped(weight.abs(), group_size)
    kept = magnitude > 0.7 * (magnitude.sum(2) / counts)[..., None]
    scales = (magnitude * kept).sum(2) / kept.sum(2).clamp(min=1)
    kept = kept.flatten(1)[:, : weight.shape[1]]
    return weight.sign() * kept + 1, scales


def _nearest(x: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Indices into a sorted codebook."""
    return torch.bucketize(x, (book[1:] + book[:-1]) / 2)


def _binary(weight, group_size):
    counts = _grouped(torch.ones_like(weight), group_size).sum(2)
    scales, signs = _grouped(weight.abs(), group_size).sum(2) / counts, weight.new_tensor([[-1.0, 1.0]])
    return Rounded((weight >= 0).byte(), scales, 1, group_size, codebook=signs, format="binary")


def _cluster(x: torch.Tensor, entries: int, rounds: int = 25) -> torch.Tensor:
    """Lloyd's k-means in one dimension from evenly filled clusters: sorted centres (entries)."""
    x = x.flatten().float().sort().values
    if not len(x):
        return torch.linspace(-1, 1, entries)
    starts = ((torch.arange(entries) + 0.5) / entries * len(x)).long().clamp(max=len(x) - 1)
    centres = x[starts.to(x.device)]
    total = torch.cat([x.new_zeros(1).double(), x.double().cumsum(0)])
    for _ in range(rounds):
        edges = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(x))])
        count = edges.diff()
        mean = total[edges].diff() / count.clamp(min=1)
        centres = torch.where(count > 0, mean.float(), centres).sort().values
    return centres


def pack(
    weight: torch.Tensor,
    format: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    entries: int | None = None,
    codebook: torch.Tensor | None = None,
    tables: int = 1,
) -> PackedWeight:
    """Rounds a weight to a low-bit format.

    Args:
        weight: (N, K), floating and finite.
        format: "int1" to "int8": evenly spaced; "ternary": -1, 0, 1; "binary": -1 and 1 times the mean
            magnitude (Rastegari et al. 2016, "XNOR-Net"), -1 only below 0; "nf4": QLoRA's 16 normal quantiles; "codebook":
            any 2 to 256 numbers, given or found by k-means (weight clustering, Han et al. 2016, "Deep Compression").
        group_size: weights along K that share a scale; any number from 1 on, it needn't divide K. None: a scale a row.
        symmetric: int formats: zero points only where False.
        entries: codebook: how many numbers k-means looks for; default 16.
        codebook: codebook: the numbers (E) or (T, E); groups are scaled so that their largest magnitude is 1 (except with
            group_size None and k-means, where nothing is scaled).
        tables: codebook: k-means makes so many codebooks, each for ceil(N / tables) rows.

    Raises:
        ValueError: one of these rules is broken.
    """
    return rounded(weight, format, group_size, symmetric, entries, codebook, tables).pack()


def rounded(weight, format="int4", group_size=None, symmetric=True, entries=None, codebook=None, tables=1) -> Rounded:
    """pack() before the codes are laid out."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"pack: weight must be floating, (N, K); got {weight.dtype} {tuple(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("pack: weight must be finite; got NaN or infinity")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"pack: group_size must be at least 1; got {group_size}")
    if format != "codebook" and (entries is not None or codebook is not None or tables != 1):
        raise ValueError(f"pack: entries, codebook and tables belong to format 'codebook'; got {format!r}")
    if not symmetric and format in _NOT_INT:
        raise ValueError(f"pack: zero points (symmetric=False) belong to int formats; got {format!r}")
    weight = weight.detach().float()
    N, K = weight.shape
    size = max(K, 1) if group_size is None else min(group_size, max(K, 1))
    if format == "binary":
        return _binary(weight, size)
    if 0 in (N, K):
        bits = {"ternary": 2, "nf4": 4, "codebook": 4}.get(format) or _int_bits(format)
        book = weight.new_zeros(1, 2**bits) if format in ("nf4", "codebook") else None
        kind, offset = ("ternary", 1) if format == "ternary" else (None, None)
        scales = weight.new_ones(N, -(-K // size))
        codes = weight.to(torch.uint8)
        return Rounded(codes, scales, bits, size, codebook=book, format=kind, offset=offset)
    if format == "ternary":
        codes, scales = _ternary(weight, size)
        return Rounded(codes, scales, 2, size, offset=1, format="ternary")
    if format == "nf4":
        codebook, scaled = torch.tensor(NF4, device=weight.device), True
    elif format == "codebook":
        scaled = group_size is not None or codebook is not None
    else:
        bits = _int_bits(format)
        codes, scales, zeros = (_symmetric if symmetric else _asymmetric)(weight, bits, size)
        return Rounded(codes, scales, bits, size, zeros)
    scales = _grouped(weight, size).abs().amax(2) if scaled else weight.new_ones(N, 1)
    unit = _quotient(weight, scales, size)
    if codebook is None:
        entries = 16 if entries is None else entries
        if not 2 <= entries <= 256:
            raise ValueError(f"pack: entries must be 2 to 256; got {entries}")
        if not 1 <= tables <= N:
            raise ValueError(f"pack: tables must be 1 to N = {N}; got {tables}")
        codebook = torch.stack([_cluster(rows, entries) for rows in unit.split(-(-N // tables))])
    books = codebook.float().reshape(-1, codebook.shape[-1]).to(weight.device).sort(1).values
    if not 2 <= books.shape[1] <= 256 or not 1 <= len(books) <= N:
        raise ValueError(f"pack: codebook must be (T, E), 1 <= T <= {N}, 2 <= E <= 256; got {tuple(codebook.shape)}")
    codes = torch.cat([_nearest(rows.contiguous(), b) for rows, b in zip(unit.split(-(-N // len(books))), books)])
    bits = max(1, math.ceil(math.log2(books.shape[1])))
    return Rounded(codes, scales, bits, size, codebook=books)


def _int_bits(format: str, name: str = "pack", others: tuple[str, ...] = _NOT_INT) -> int:
    if format in _INT:
        return _INT.index(format) + 1
    allowed = ", ".join(map(repr, others))
    raise ValueError(f"{name}: format must be 'int1' to 'int8'{allowed and ', ' + allowed}; got {format!r}")


def unpack(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (N, K) uint8, scales (N, G) float32, zeros (N, G) uint8 or None."""
    return packed.unpack()
