"""causal_conv1d on a GPU against F.conv1d, eager and compiled. The rates count x in, y out; backward x and dy in, dx out."""

import sys

import torch.nn.functional as F
from _gpu_ops import make_group, random, run, shape_of

from mlcore.ops import causal_conv1d

# (B, C, T), width, activation, channels last; the last one is the reproducer of pytorch#192902
PROBLEMS = [
    ((4, 1024, 2048), 4, None, False),
    ((4, 1024, 2048), 4, "silu", False),
    ((4, 1024, 2048), 4, "silu", True),
    ((4, 1024, 2048), 16, None, False),
    ((1, 12288, 16384), 4, None, False),
]


def group(shape, width, activation, channels_last, dtype, backward):
    B, C, T = shape
    x = random(B, T, C, dtype=dtype).transpose(1, 2) if channels_last else random(B, C, T, dtype=dtype)

    def stock(x, weight):
        y = F.conv1d(x, weight[:, None], padding=width - 1, groups=C)[..., :T]
        return F.silu(y) if activation else y

    def truth(x, weight):  # torch's grouped convolution in float64 is slower still
        h = F.pad(x, (width - 1, 0))
        y = sum(weight[:, k, None] * h[..., k : k + T] for k in range(width))
        return F.silu(y) if activation else y

    inputs = [x, random(C, width, dtype=dtype, std=width**-0.5)]
    moved = (3 if backward else 2) * x.numel() * dtype.itemsize

    def ours(x, weight, impl):
        return causal_conv1d(x, weight, activation=activation, impl=impl)

    return make_group(ours, stock, inputs, backward, moved=moved, truth=truth)


def words(shape, width, activation, channels_last):
    return " ".join(f"{shape_of(shape)} w{width} {activation or ''} {'channels_last' * channels_last}".split())


def main(argv=None) -> int:
    return run("causal_conv1d", PROBLEMS, words, group, argv)


if __name__ == "__main__":
    sys.exit(main())
