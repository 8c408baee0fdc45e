"""PackedWeight: a quantized (N, K) weight as a handful of tensors and numbers. It computes nothing with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ._layout import LAYOUTS, ROWS, Geometry, from_vectors, to_vectors

FORMATS = ("int", "ternary", "codebook", "binary")  # a layer's state_dict has the number: append only
TENSORS = ("codes", "scales", "zeros", "codebook")


def _check(ok: bool, text: str) -> None:
    if not ok:
        raise ValueError(f"PackedWeight: {text}")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) in codes q of 1 to 8 bits, with a scale for each `group_size` weights along K.

    w[n, k] = (q - z) * scale, with z a zero point a group or, without zeros, the number `offset`; or codebook[q] * scale.

    Args:
        codes: bytes, as `layout` orders them.
        scales: (P, G, 16) float32, P = ceil(N / 16), G = ceil(K / group_size). Finite; may be negative.
        zeros: (P, G, 16) uint8, or None.
        codebook: (T, 2^bits) float32, or None; row n of W uses table n // ceil(N / T).
        shape: (N, K).
        bits, group_size, offset: as above.
        format: "int", "ternary", "codebook", or "binary": a codebook of -1 and 1.
        layout: how the codes lie; "panel16" is what the kernels read.

    Raises:
        ValueError: tensors and numbers contradict each other, or a scale or codebook entry isn't finite.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    codebook: torch.Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int
    offset: int
    format: str = "int"
    layout: str = "panel16"

    def __post_init__(self) -> None:
        numbers = (*self.shape, self.bits, self.group_size, self.offset)
        _check(all(isinstance(i, int) and not isinstance(i, bool) for i in numbers), f"numbers must be integers; got {numbers}")
        _check(len(self.shape) == 2 and min(self.shape) >= 0, f"shape must be (N, K); got {self.shape}")
        _check(1 <= self.bits <= 8, f"bits must be 1 to 8; got {self.bits}")
        _check(self.group_size >= 1, f"group_size must be at least 1; got {self.group_size}")
        _check(0 <= self.offset < 2**self.bits, f"offset must be a code, 0 to {2**self.bits - 1}; got {self.offset}")
        _check(self.format in FORMATS, f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        _check(self.layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}")
        with_codebook = self.format in ("codebook", "binary")
        _check((self.codebook is not None) == with_codebook, f"format {self.format!r} and codebook contradict")
        _check(self.format != "binary" or self.bits == 1, f"format 'binary' has 1 bit; got {self.bits}")
        _check(self.zeros is None or self.format == "int", f"zeros don't go with format {self.format!r}")
        g, tables = self.geometry, None
        if self.codebook is not None:
            _check(self.codebook.dim() == 2, f"codebook must be (T, 2^bits); got {tuple(self.codebook.shape)}")
            tables = (min(max(len(self.codebook), 1), max(self.shape[0], 1)), 2**self.bits)
        expected = {
            "codes": (torch.uint8, g.codes_shape),
            "scales": (torch.float32, g.vectors_shape),
            "zeros": (torch.uint8, g.vectors_shape),
            "codebook": (torch.float32, tables),
        }
        for name, (dtype, shape) in expected.items():
            t = getattr(self, name)
            if t is not None:
                _check(
                    t.dtype == dtype and tuple(t.shape) == shape,
                    f"{name} must be {dtype} {shape}; got {t.dtype} {tuple(t.shape)}",
                )
                _check(t.device == self.codes.device, f"{name} must be on {self.codes.device}; got {t.device}")
                _check(t.is_contiguous(), f"{name} must be contiguous; got strides {t.stride()}")

    @property
    def geometry(self) -> Geometry:
        return Geometry(*self.shape, self.bits, self.group_size)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros, self.codebook) if t is not None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, object]:
        """All that isn't a tensor, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in TENSORS}

    def check_finite(self) -> PackedWeight:
        """self; raises ValueError where a scale or a codebook entry is NaN or infinite."""
        for name in ("scales", "codebook"):
            t = getattr(self, name)
            _check(t is None or bool(t.isfinite().all()), f"{name} must be finite; got NaN or infinity")
        signs = self.format != "binary" or bool((self.codebook == self.codebook.new_tensor([-1.0, 1.0])).all())
        _check(signs, "the codebook of format 'binary' must be -1, 1")
        return self

    def to(self, device) -> PackedWeight:
        """The same weight on another device."""
        return dataclasses.replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes (N, K) uint8, scales (N, G) float32, zeros (N, G) uint8 or None: what pack_codes takes."""
        g = self.geometry
        zeros = None if self.zeros is None else from_vectors(self.zeros, g)
        return LAYOUTS[self.layout].unpack(self.codes, g), from_vectors(self.scales, g), zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights themselves, (N, K)."""
        codes, scales, zeros = self.unpack()
        rows = torch.arange(self.shape[0], device=self.codes.device)
        return (self.values(codes, rows, zeros) * spread(scales, self.group_size, self.shape[1])).to(dtype)

    def rows(self, numbers: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of the weights by their numbers (n), each from 0 to N - 1: (n, K), as an embedding reads them."""
        codes = LAYOUTS[self.layout].rows(self.codes, self.geometry, numbers)
        panel, lane = numbers // ROWS, numbers % ROWS
        zeros = None if self.zeros is None else self.zeros[panel, :, lane]
        scales = spread(self.scales[panel, :, lane], self.group_size, self.shape[1])
        return (self.values(codes, numbers, zeros) * scales).to(dtype)

    def values(self, codes: torch.Tensor, rows: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """What codes (n, K) of rows `rows` (n) stand for before they are scaled: (n, K) float32."""
        if self.codebook is not None:
            return self.codebook[(rows // -(-max(self.shape[0], 1) // len(self.codebook)))[:, None], codes.long()]
        return codes.float() - (self.offset if zeros is None else spread(zeros.float(), self.group_size, self.shape[1]))


def spread(per_group: torch.Tensor, group_size: int, K: int) -> torch.Tensor:
    """(N, G) to (N, K): each group's number for all of its weights."""
    return per_group.repeat_interleave(group_size, 1)[:, :K] if K else per_group[:, :0]


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    zeros: torch.Tensor | None = None,
    offset: int | None = None,
    codebook: torch.Tensor | None = None,
    format: str | None = None,
    layout: str = "panel16",
) -> PackedWeight:
    """A PackedWeight from codes that something else found (GPTQ, AWQ, HQQ, a checkpoint).

    Args:
        codes: (N, K), integers from 0 to 2^bits - 1.
        scales: (N, G), G = ceil(K / group_size), finite.
        bits: 1 to 8.
        group_size: weights along K that share a scale; needn't divide K. At least 1.
        zeros: (N, G), integers from 0 to 2^bits - 1: w = (code - zero) * scale.
        offset: the zero point of all weights where zeros is None; default 2^(bits - 1).
        codebook: (T, E) or (E), 2 to 2^bits entries, finite: w = codebook[code] * scale.
        format: "int", "ternary", "codebook" or "binary"; default by the other arguments.
        layout: see PackedWeight.

    Raises:
        ValueError: one of these rules is broken.
    """
    _check(
        codes.dim() == 2 and not codes.is_floating_point(),
        f"codes must be integers (N, K); got {codes.dtype} {tuple(codes.shape)}",
    )
    _check(isinstance(bits, int) and 1 <= bits <= 8, f"bits must be 1 to 8; got {bits}")
    _check(isinstance(group_size, int) and group_size >= 1, f"group_size must be at least 1; got {group_size}")
    _check(layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    N, K = codes.shape
    group_size = min(group_size, max(K, 1))
    g = Geometry(N, K, bits, group_size)
    for name, t in (("codes", codes), ("zeros", zeros)):
        if t is not None and t.numel():
            low, high = int(t.min()), int(t.max())
            _check(low >= 0 and high < 2**bits, f"{name} must be 0 to {2**bits - 1} with {bits} bits; got {low} to {high}")
    for name, t in (("scales", scales), ("zeros", zeros)):
        if t is not None:
            _check(tuple(t.shape) == (N, g.groups), f"{name} must be (N, G) = ({N}, {g.groups}); got {tuple(t.shape)}")
    if codebook is not None:
        codebook = codebook.float().reshape(-1, codebook.shape[-1])
        _check(2 <= codebook.shape[1] <= 2**bits, f"codebook must have 2 to {2**bits} entries; got {codebook.shape[1]}")
        codebook = torch.nn.functional.pad(codebook, (0, 2**bits - codebook.shape[1])).contiguous()
    return PackedWeight(
        LAYOUTS[layout].pack(codes.to(torch.uint8), g),
        to_vectors(scales.float(), g, 0.0),
        None if zeros is None else to_vectors(zeros.to(torch.uint8), g, 0),
        codebook,
        (N, K),
        bits,
        group_size,
        (0 if codebook is not None else 2 ** (bits - 1)) if offset is None else offset,
        format or ("int" if codebook is None else "codebook"),
        layout,
    ).check_finite()


def concatenate(weights: list[PackedWeight]) -> PackedWeight:
    """The rows of several weights of one K and one format in one weight: y of it is their y side by side.

    Raises:
        ValueError: no weights, or they differ in K, bits, group_size, offset, format, zero points or codebook.
    """
    _check(len(weights) > 0, "concatenate needs at least one weight")
    first = weights[0]
    for other in weights[1:]:
        for name in ("bits", "group_size", "offset", "format", "layout"):
            a, b = getattr(first, name), getattr(other, name)
            _check(a == b, f"concatenate needs one {name}; got {a} and {b}")
        _check(first.shape[1] == other.shape[1], f"concatenate needs one K; got {first.shape[1]} and {other.shape[1]}")
        _check((first.zeros is None) == (other.zeros is None), "concatenate needs zero points in all or none")
        same = first.codebook is None or (len(first.codebook) == 1 and torch.equal(first.codebook, other.codebook))
        _check(same, "concatenate needs one codebook, the same for all rows")
    codes, scales, zeros = zip(*(weight.unpack() for weight in weights))
    how = {name: getattr(first, name) for name in ("bits", "group_size", "offset", "format", "layout", "codebook")}
    return pack_codes(torch.cat(codes), torch.cat(scales), zeros=None if zeros[0] is None else torch.cat(zeros), **how)
