"""quant_linear on a GPU against torch's dense product and its own low-bit ones. The rates count the packed weight, x in and y
out for few rows, and flops from 256 rows on.
"""

import sys

import _gpu
import torch
from harness import Group, relative_error

from mlcore.ops import quant_linear
from mlcore.quant import pack

# (N, K), as in 7B models
FORMATS = [("int4", 128, False), ("int8", None, False), ("int8", None, True), ("nf4", 64, False)]  # the last: dynamic int8
SIZES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOLERANCE = 1e-2  # of the norm of the error: one rounding of y to bfloat16, and in the integer mode the same whole numbers


def group(N, K, M, format, group_size, dynamic_int8):
    torch.manual_seed(0)
    packed = pack(torch.randn(N, K) * K**-0.5, format, group_size=group_size).to("cuda")
    x, dense = torch.randn(M, K, device="cuda", dtype=torch.bfloat16), packed.dequantize(torch.bfloat16)
    want = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl="reference")

    def check(row, got):
        error = relative_error(got, want)
        assert not row.startswith("mlcore") or error < TOLERANCE, f"{row}: relative error {error}"
        return error

    rows = {
        f"mlcore {impl}": lambda impl=impl: quant_linear(x, packed, dynamic_int8=dynamic_int8, impl=impl)
        for impl in ("cuda", "triton")
    }
    rows["torch bfloat16"] = lambda: x @ dense.T
    if format == "int4":
        rows["torch int4"] = torch_int4(packed, x)
    many = M >= 256
    moved = packed.nbytes + (M * K + M * N) * 2
    return Group(rows, check, flops=2 * M * N * K if many else 0, bytes=0 if many else moved)


def torch_int4(packed, x):
    """torch's tinygemm on the same weight; raises where it is not made for it."""
    codes, scales, _ = packed.unpack()
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    offsets = torch.stack([scales.T, torch.zeros_like(scales.T)], 2).to(torch.bfloat16).contiguous()
    ready = []

    def call():
        if not ready:
            try:
                ready.append(torch.ops.aten._convert_weight_to_int4pack(pairs, 8))
            except RuntimeError as reason:
                raise NotImplementedError(reason) from None
        return torch.ops.aten._weight_int4pack_mm(x, ready[0], packed.group_size, offsets)

    return call


def main(argv=None) -> int:
    groups = []
    for N, K in SIZES:
        for M in (1, 8, 16, 64, 512):
            for format, group_size, int8 in (
                ("int4", 128, False),
                ("int8", None, False),
                ("int8", None, True),
                ("nf4", 64, False),
            ):
                words = f"M{M} ({K}->{N}) {format}{f' g{group_size}' if group_size else ''}{' int8 x' * int8}"
                args = N, K, M, format, group_size, int8
                groups.append((f"quant_linear {words}", lambda args=args: group(*args)))
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
