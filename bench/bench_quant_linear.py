"""quant_linear against torch's own low-bit products and its fp32 linear. Work is counted as 2 M N K operations;
mlcore's integer rows quantize, dequantize, add the bias and apply GELU within it, torch._int_mm is the product alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error

from mlcore.ops import quant_linear
from mlcore.quant import pack, pack_codes

# Of the exact product with the same codes: fp32 sums, x in 127ths, torch's int4 product in bfloat16.
TOLERANCE = {"mlcore": 1e-5, "lossy: mlcore, int8 x": 2e-2, "torch int4 (bf16 x)": 2e-2, "torch fp32": 1e-5}


@dataclass(frozen=True)
class Problem:
    kind: str  # "int8": integer product with bias and GELU; "int4": weight-only
    M: int
    K: int
    N: int
    group_size: int | None = None

    def __str__(self) -> str:
        group = f" g{self.group_size}" if self.group_size else " bias gelu"
        return f"{self.kind} ({self.M};{self.K}->{self.N}){group}"


INT8 = [Problem("int8", 128, 768, 3072), Problem("int8", 512, 4096, 4096), Problem("int8", 1, 4096, 4096)]
INT4 = [Problem("int4", M, 4096, 4096, group) for M in (1, 2, 4, 8, 16, 32, 128, 512) for group in (128, 32)]
INT4 += [Problem("int4", M, K, N, 128) for K, N in ((4096, 11008), (11008, 4096), (2880, 2880)) for M in (1, 128)]


def int8_group(problem: Problem) -> Group:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, problem.K, generator=generator) for n in (problem.M, problem.N))
    bias, packed = torch.randn(problem.N, generator=generator), pack(weight, "int8")
    codes = packed.unpack()[0].int().sub(128).to(torch.int8).T
    peak = x.abs().amax(1, keepdim=True)
    rounded = (x * (127 / peak)).round().to(torch.int8)
    dense = packed.dequantize()
    want = F.gelu(F.linear(x.double(), dense.double(), bias.double()))
    product = (rounded.double() @ codes.double()).to(torch.int32)
    rows = {
        "mlcore": lambda: quant_linear(x, packed, bias, "gelu", dynamic_int8=True),
        "torch fp32": lambda: F.gelu(F.linear(x, dense, bias)),
    }
    if problem.M > 16:  # what torch._int_mm asks of CUDA tensors, kept here so that the rows mean the same
        rows["torch._int_mm (product alone)"] = lambda: torch._int_mm(rounded, codes)

    def check(row, got):
        if row.startswith("torch._int_mm"):
            assert torch.equal(got, product), f"{row}: the integers differ"
            return 0.0
        error = relative_error(got, want)
        assert error < (2e-2 if row == "mlcore" else 1e-5), f"{row}: relative error {error}"
        return error

    return Group(rows, check, flops=2 * problem.M * problem.N * problem.K)


def int4_group(problem: Problem) -> Group:
    generator = torch.Generator().manual_seed(0)
    M, K, N, group = problem.M, problem.K, problem.N, problem.group_size
    x = torch.randn(M, K, generator=generator)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.int32)
    scales = torch.rand(N, -(-K // group), generator=generator) * 0.02 + 0.01
    packed = pack_codes(codes, scales, bits=4, group_size=group)
    dense = packed.dequantize()
    want = x.double() @ dense.double().T
    rows = {
        "mlcore": lambda: quant_linear(x, packed),
        "lossy: mlcore, int8 x": lambda: quant_linear(x, packed, dynamic_int8=True),
        "torch fp32": lambda: F.linear(x, dense),
    }
    if K % group == 0 and N % 16 == 0:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        both = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).bfloat16().contiguous()  # scale, zero: w = (q - 8) s + z
        narrow = x.bfloat16()
        rows["torch int4 (bf16 x)"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, theirs, group, both)

    def check(row, got):
        error = relative_error(got, want)
        assert error < TOLERANCE[row], f"{row}: relative error {error}, {TOLERANCE[row]} is allowed"
        return error

    return Group(rows, check, flops=2 * M * N * K)


@pytest.mark.parametrize("row", ["mlcore", "torch._int_mm (product alone)", "torch fp32"])
@pytest.mark.parametrize("problem", INT8, ids=str)
def test_int8(race, problem, row):
    if problem.M <= 16 and "_int_mm" in row:
        pytest.skip("not a product that torch._int_mm is made for")
    race(f"quant_linear {problem}", row, lambda: int8_group(problem))


@pytest.mark.parametrize("row", TOLERANCE)
@pytest.mark.parametrize("problem", INT4, ids=str)
def test_int4(race, problem, row):
    if row.startswith("torch int4") and problem.K % problem.group_size:
        pytest.skip("a group that doesn't divide K, which torch refuses")
    race(f"quant_linear {problem}", row, lambda: int4_group(problem))
