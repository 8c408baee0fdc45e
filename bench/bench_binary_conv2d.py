"""binary_conv2d against torch's fp32 convolution, in both memory layouts. Work is counted as twice the products, padding
included. mlcore's rows begin with float x: packing it is within them, but in "packed x".
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Group

from mlcore.ops import binary_conv2d, pack_binary_conv, pack_pixels

ROWS = ["mlcore", "mlcore channels_last", "mlcore packed x, packed y", "torch fp32", "torch fp32 channels_last"]


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, int, int, int]
    out: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        return f"({','.join(map(str, self.shape))})->{self.out} k{self.kernel} s{self.stride}"


PROBLEMS = [
    Problem((1, 256, 56, 56), 256),
    Problem((1, 64, 56, 56), 64),
    Problem((1, 128, 28, 28), 128),
    Problem((1, 256, 28, 28), 512, stride=2),
    Problem((1, 512, 7, 7), 512),
    Problem((8, 256, 14, 14), 256),
    Problem((1, 256, 56, 56), 256, kernel=1),
]


def group(problem: Problem) -> Group:
    generator = torch.Generator().manual_seed(0)
    C, k, last = problem.shape[1], problem.kernel, torch.channels_last
    x, weight = torch.randn(problem.shape, generator=generator), torch.randn(problem.out, C, k, k, generator=generator)
    x_last, packed, bits = x.contiguous(memory_format=last), pack_binary_conv(weight), pack_pixels(x)
    signs, dense = (1 - 2 * (t < 0).float() for t in (x, weight))
    sums = F.conv2d(signs, dense, stride=problem.stride, padding=k // 2)
    exact = sums * weight.permute(0, 2, 3, 1).reshape(problem.out, -1).abs().mean(1)[:, None, None]
    where = {"stride": problem.stride, "padding": k // 2}
    ours = where | {"kernel_size": k}
    signs_last, dense_last = signs.contiguous(memory_format=last), dense.contiguous(memory_format=last)
    rows = {
        "mlcore": lambda: binary_conv2d(x, packed, **ours),
        "mlcore channels_last": lambda: binary_conv2d(x_last, packed, **ours),
        "mlcore packed x, packed y": lambda: binary_conv2d(bits, packed, packed_output=True, **ours).words,
        "torch fp32": lambda: F.conv2d(signs, dense, **where),
        "torch fp32 channels_last": lambda: F.conv2d(signs_last, dense_last, **where),
    }

    def check(row, got):
        want = pack_pixels(exact).words if "packed y" in row else exact if row.startswith("mlcore") else sums
        assert torch.equal(got, want), f"{row}: not exact"
        return 0.0

    return Group(rows, check, flops=2 * sums.numel() * C * k * k)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_conv(race, problem, row):
    race(f"binary_conv2d {problem}", row, lambda: group(problem))
