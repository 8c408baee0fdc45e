"""depthwise_conv against torch's convolutions, contiguous (NCHW) and channels_last, which torch serves by different code.

The rows of ours are named by the layout of x, too. Bytes are those that must move: x in, y out; backward reads dy and x and
writes dx.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error

from mlcore import ops

OURS = {1: ops.depthwise_conv1d, 2: ops.depthwise_conv2d, 3: ops.depthwise_conv3d}
TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, ...]  # (N, C, *sizes)
    kernel: int = 3
    stride: int = 1
    dilation: int = 1

    @property
    def padding(self) -> int:
        return (self.kernel - 1) * self.dilation // 2

    def __str__(self) -> str:
        words = [f"k{self.kernel}", f"s{self.stride}" * (self.stride > 1), f"d{self.dilation}" * (self.dilation > 1)]
        return f"({','.join(map(str, self.shape))}) {' '.join(w for w in words if w)}"


PROBLEMS = [
    Problem((8, 256, 56, 56)),
    # MobileNetV1
    Problem((1, 32, 112, 112)),
    Problem((1, 64, 112, 112), stride=2),
    Problem((1, 128, 56, 56)),
    Problem((1, 128, 56, 56), stride=2),
    Problem((1, 256, 28, 28)),
    Problem((1, 256, 28, 28), stride=2),
    Problem((1, 512, 14, 14)),
    Problem((1, 512, 14, 14), stride=2),
    Problem((1, 1024, 7, 7)),
    # ConvNeXt, larger kernels, dilation, 1-D and 3-D
    Problem((8, 96, 56, 56), 7),
    Problem((8, 192, 28, 28), 7),
    Problem((8, 384, 14, 14), 7),
    Problem((4, 256, 28, 28), 5),
    Problem((8, 144, 56, 56), 5, stride=2),
    Problem((4, 128, 56, 56), dilation=2),
    Problem((4, 256, 1024), 31),
    Problem((2, 32, 16, 28, 28)),
]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_group(problem: Problem, backward: bool) -> Group:
    generator = torch.Generator().manual_seed(0)
    C, dims = problem.shape[1], len(problem.shape) - 2
    x = torch.randn(problem.shape, generator=generator)
    weight = torch.randn(C, 1, *[problem.kernel] * dims, generator=generator) / problem.kernel**dims
    numbers = (None, problem.stride, problem.padding, problem.dilation)
    want = TORCH[dims](x, weight, *numbers, C)
    dy = torch.randn(want.shape, generator=generator)

    def call_of(fn, layout, *groups):
        leaves = [layout(x).detach(), weight]
        if not backward:
            return lambda: [fn(*leaves, *numbers, *groups)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        y, seed = fn(*leaves, *numbers, *groups), layout(dy)
        return lambda: list(torch.autograd.grad(y, leaves, seed, retain_graph=True))

    def same(t):
        return t

    calls = {
        "mlcore": call_of(OURS[dims], same),
        "mlcore (channels_last)": call_of(OURS[dims], channels_last),
        "torch": call_of(TORCH[dims], same, C),
        "torch (channels_last)": call_of(TORCH[dims], channels_last, C),
    }
    wide = [t.double().requires_grad_() for t in (x, weight)]
    y = TORCH[dims](*wide, *numbers, C)
    truth = [t.detach() for t in (torch.autograd.grad(y, wide, dy.double()) if backward else [y])]

    def check(row, got):
        error = max(relative_error(a, b) for a, b in zip(got, truth, strict=True))
        assert error < 2e-5, f"{row}: relative error {error}"
        return error

    numbers_moved = 2 * x.numel() + want.numel() if backward else x.numel() + want.numel()
    return Group(calls, check, bytes=4 * numbers_moved)


@pytest.mark.parametrize("row", ["mlcore", "mlcore (channels_last)", "torch", "torch (channels_last)"])
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_depthwise_conv(race, problem, backward, row):
    name = f"depthwise_conv float32 {'bwd' if backward else 'fwd'} {problem}"
    race(name, row, lambda: make_group(problem, backward))
