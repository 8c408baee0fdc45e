"""separable_conv on a GPU against torch's convolutions in channels_last, alone and compiled: MobileNetV1's blocks with folded
norms, and a training step with both norms. The rates count the products' multiplications.
"""

import sys

import _gpu
import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random

from mlcore.ops import BatchNorm, separable_conv2d

# (N, C, H, W), J, stride
PROBLEMS = [
    ((32, 32, 112, 112), 64, 1),
    ((32, 128, 56, 56), 128, 1),
    ((32, 256, 28, 28), 512, 2),
    ((32, 512, 14, 14), 512, 1),
    ((32, 1024, 7, 7), 1024, 1),
    ((1, 512, 14, 14), 512, 1),
]


def group(shape, J, stride, dtype, training):
    C = shape[1]
    x = random(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    inputs = [x, random(C, 1, 3, 3, dtype=dtype, std=1 / 3), random(J, C, 1, 1, dtype=dtype, std=C**-0.5)]

    def stock(x, depthwise, pointwise):
        h = F.conv2d(x, depthwise, None, stride, 1, 1, C)
        h = F.silu(F.batch_norm(h, None, None, training=True)) if training else F.relu(h)
        y = F.conv2d(h, pointwise)
        return F.silu(F.batch_norm(y, None, None, training=True)) if training else F.relu(y)

    def ours(x, depthwise, pointwise, impl):
        norms = {"norm": BatchNorm(training=True), "pointwise_norm": BatchNorm(training=True)} if training else {}
        name = "silu" if training else "relu"  # relu's corners are on other sides in float64, and gradients with them
        words = {"activation": name, "pointwise_activation": name, "impl": impl}
        return separable_conv2d(x, depthwise, pointwise, None, None, stride, 1, **norms, **words)

    pixels = shape[0] * (shape[2] // stride) * (shape[3] // stride)
    group = make_group(ours, stock, {"torch": stock, "torch.compile": torch.compile(stock)}, inputs, training, 0)
    group.flops = 2 * pixels * C * (J + 9) * (3 if training else 1)
    return group


def main(argv=None) -> int:
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, J, stride in PROBLEMS:
            for training in (False, True):
                words = f"({','.join(map(str, shape))})->{J} s{stride}"
                name = f"separable_conv {'bwd with norms' if training else 'fwd'} {str(dtype)[6:]} {words}"
                groups.append((name, lambda args=(shape, J, stride, dtype, training): group(*args)))
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
