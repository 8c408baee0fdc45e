"""depthwise_conv on a GPU against torch in both layouts. The rates count x in and y out; backward x and dy in, dx out."""

import sys

import _gpu
import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random

from mlcore.ops import depthwise_conv2d

# (N, C, H, W), kernel size, stride, channels last
PROBLEMS = [
    ((8, 256, 56, 56), 3, 1, False),
    ((8, 256, 56, 56), 3, 1, True),
    ((32, 512, 14, 14), 3, 1, True),
    ((32, 128, 56, 56), 3, 2, True),
    ((32, 96, 56, 56), 7, 1, False),
    ((32, 96, 56, 56), 7, 1, True),
]


def group(shape, kernel, stride, channels_last, dtype, backward):
    x = random(*shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x, random(shape[1], 1, kernel, kernel, dtype=dtype, std=1.0 / kernel)]

    def stock(x, weight):
        return F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=shape[1])

    moved = x.numel() * (1 + 1 / stride**2 + (1 if backward else 0)) * dtype.itemsize
    others = {"torch": stock, "torch.compile": torch.compile(stock)}

    def ours(x, weight, impl):
        return depthwise_conv2d(x, weight, stride=stride, padding=kernel // 2, impl=impl)

    return make_group(ours, stock, others, inputs, backward, moved)


def main(argv=None) -> int:
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, kernel, stride, last in PROBLEMS:
            for backward in (False, True):
                words = f"({','.join(map(str, shape))}) {kernel}x{kernel} s{stride}{' channels_last' * last}"
                name = f"depthwise_conv {'bwd' if backward else 'fwd'} {str(dtype)[6:]} {words}"
                args = shape, kernel, stride, last, dtype, backward
                groups.append((name, lambda args=args: group(*args)))
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
