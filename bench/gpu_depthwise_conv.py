"""depthwise_conv on a GPU against torch in both layouts. The rates count x in and y out; backward x and dy in, dx out."""

import sys

import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random, run, shape_of

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

    def ours(x, weight, impl):
        return depthwise_conv2d(x, weight, stride=stride, padding=kernel // 2, impl=impl)

    return make_group(ours, stock, inputs, backward, moved=moved)


def words(shape, kernel, stride, channels_last):
    return f"{shape_of(shape)} {kernel}x{kernel} s{stride}{' channels_last' * channels_last}"


def main(argv=None) -> int:
    return run("depthwise_conv", PROBLEMS, words, group, argv)


if __name__ == "__main__":
    sys.exit(main())
