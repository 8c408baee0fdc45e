"""aft on a GPU against the products and running sums that a user would write in torch. The rates of AFT-full count its two
products (in float32 the peak is bfloat16's), those of the other kinds q, k, v and o once; backward twice as much.
"""

import sys

import torch
from _gpu_ops import make_group, random, run, shape_of

from mlcore.kernels.aft import aft_ref
from mlcore.ops import aft

# kind, (B, H, T, D), window
PROBLEMS = [
    ("full", (8, 8, 1024, 64), None),
    ("simple", (8, 8, 4096, 64), None),
    ("local", (8, 8, 1024, 64), 32),
    ("conv", (8, 8, 4096, 64), 16),
]


def group(kind, shape, window, dtype, backward):
    B, H, T, D = shape
    inputs = [random(*shape, dtype=dtype) for _ in range(3)]
    if kind != "simple":
        columns = window or T
        inputs.append(random(H, columns, dtype=torch.float32) if kind == "conv" else random(H, T, columns, dtype=torch.float32))
    options = {"window": window, "causal": True}

    def stock(*tensors):
        tokens, bias = tensors[:3], [t.to(tensors[0].dtype) for t in tensors[3:]]
        return (aft_ref.convolution if kind == "conv" else aft_ref.products)(*tokens, *bias, **options)

    def ours(*tensors, impl):
        return aft(*tensors, **options, impl=impl)

    size = B * H * T * D * (2 if backward else 1)
    flops = 2 * size * T if kind == "full" else 0
    return make_group(ours, stock, inputs, backward, moved=4 * size * dtype.itemsize, flops=flops)


def words(kind, shape, window):
    return f"{kind}{'' if window is None else f' {window}'} causal {shape_of(shape)}"


def main(argv=None) -> int:
    return run("aft", PROBLEMS, words, group, argv)


if __name__ == "__main__":
    sys.exit(main())
