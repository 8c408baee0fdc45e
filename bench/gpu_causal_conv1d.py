"""causal_conv1d on a GPU against F.conv1d, eager and compiled. The rates count x in, y out; backward x and dy in, dx out."""

import sys

import _gpu
import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random

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
    others = {"torch": stock, "torch.compile": torch.compile(stock)}
    moved = (3 if backward else 2) * x.numel() * dtype.itemsize
    return make_group(
        lambda *t, impl: causal_conv1d(*t, activation=activation, impl=impl), truth, others, inputs, backward, moved
    )


def main(argv=None) -> int:
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, width, activation, channels_last in PROBLEMS:
            for backward in (False, True):
                words = f"w{width} {activation or ''} {'channels_last' * channels_last}".split()
                name = f"causal_conv1d {'bwd' if backward else 'fwd'} {str(dtype)[6:]} {shape} {' '.join(words)}"
                args = shape, width, activation, channels_last, dtype, backward
                groups.append((name.replace(", ", ","), lambda args=args: group(*args)))
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
