"""separable_conv on a GPU against torch's convolutions in channels_last, alone and compiled: MobileNetV1's blocks with folded
norms, and a training step with both norms. The rates count the products' multiplications.
"""

import sys

import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random, run, shape_of

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
    return make_group(ours, stock, inputs, training, flops=2 * pixels * C * (J + 9) * (3 if training else 1))


def words(shape, J, stride):
    return f"{shape_of(shape)}->{J} s{stride}"


def main(argv=None) -> int:
    return run("separable_conv", PROBLEMS, words, group, argv, passes=("fwd", "bwd with norms"))


if __name__ == "__main__":
    sys.exit(main())
