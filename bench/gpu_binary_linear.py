"""binary_linear on a GPU against torch's dense product of the same signs. Rows include packing of x, but for "packed x".
The rates count 2 M N K operations.
"""

import sys

import _gpu
import torch
from harness import Group

from mlcore.ops import binary_linear, pack_signs
from mlcore.quant import pack

SIZES = [(M, 4096, 4096) for M in (1, 16, 128, 512, 4096)] + [(128, 768, 3072), (512, 2880, 2880)]  # M, K, N


def group(M, K, N):
    torch.manual_seed(0)
    x, packed = torch.randn(M, K, device="cuda"), pack(torch.randn(N, K), "binary").to("cuda")
    bits, dense = pack_signs(x, impl="reference"), packed.dequantize()
    want = binary_linear(x, packed, impl="reference")
    signs, low = (1 - 2 * (x < 0).float()).bfloat16(), dense.bfloat16()
    rows = {}
    for impl in ("cuda", "triton"):
        rows[f"mlcore {impl}"] = lambda impl=impl: binary_linear(x, packed, impl=impl)
        rows[f"mlcore {impl} packed x, packed y"] = lambda impl=impl: (
            binary_linear(bits, packed, packed_output=True, impl=impl).words
        )
    rows["torch bfloat16"] = lambda: signs @ low.T
    words = pack_signs(want, impl="reference").words

    def check(row, got):
        if row.startswith("mlcore"):
            assert torch.equal(got, words if "packed y" in row else want), f"{row}: not exact"
        return 0.0

    return Group(rows, check, flops=2 * M * N * K)


def main(argv=None) -> int:
    groups = [(f"binary_linear ({M};{K}->{N})", lambda args=(M, K, N): group(*args)) for M, K, N in SIZES]
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
