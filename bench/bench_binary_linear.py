"""binary_linear against torch's fp32 linear, which it stands in for: work is counted as 2 M N K operations. mlcore's rows
begin with float x: packing it is within them, but in "packed x".
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Group

from mlcore.ops import binary_linear, pack_signs
from mlcore.quant import pack

ROWS = ["mlcore", "mlcore packed x, packed y", "mlcore with activation scale", "torch fp32"]


@dataclass(frozen=True)
class Problem:
    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"({self.M};{self.K}->{self.N})"


PROBLEMS = [Problem(M, 4096, 4096) for M in (1, 16, 128, 512)]
PROBLEMS += [Problem(128, 1024, 1024), Problem(128, 768, 3072), Problem(128, 2880, 2880)]


def group(problem: Problem) -> Group:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, problem.K, generator=generator) for n in (problem.M, problem.N))
    bias, packed, bits = torch.zeros(problem.N), pack(weight, "binary"), pack_signs(x)
    dense, signs = packed.dequantize(), 1 - 2 * (x < 0).float()
    sums = (signs @ (1 - 2 * (weight < 0).float()).T) * packed.dequantize().abs()[:, 0]
    rows = {
        "mlcore": lambda: binary_linear(x, packed, bias),
        "mlcore packed x, packed y": lambda: binary_linear(bits, packed, bias, packed_output=True).words,
        "mlcore with activation scale": lambda: binary_linear(x, packed, bias, activation_scale=True),
        "torch fp32": lambda: F.linear(signs, dense, bias),
    }
    exact = {
        "mlcore": sums,
        "mlcore packed x, packed y": pack_signs(sums).words,
        "mlcore with activation scale": sums * x.abs().mean(1, keepdim=True),
        "torch fp32": sums,
    }

    def check(row, got):
        if row in ("mlcore", "mlcore packed x, packed y"):
            assert torch.equal(got, exact[row]), f"{row}: not exact"
            return 0.0
        error = ((got - exact[row]).norm() / exact[row].norm()).item()
        assert error < 1e-5, f"{row}: relative error {error}"
        return error

    return Group(rows, check, flops=2 * problem.M * problem.N * problem.K)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_linear(race, problem, row):
    race(f"binary_linear {problem}", row, lambda: group(problem))
