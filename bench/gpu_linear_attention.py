"""linear_attention on a GPU against torch's chunked form. The rates count q, k, v in and o out;
backward those and do in, dq, dk, dv out."""

import sys

import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random, run, shape_of

from mlcore.kernels.linear_attention import linear_attention_ref
from mlcore.ops import linear_attention

PROBLEMS = [((1, 8, 4096, 64), None), ((8, 16, 2048, 64), None), ((8, 16, 2048, 64), "scalar"), ((8, 16, 2048, 64), "vector")]


def group(shape, gated, dtype, backward):
    B, H, T, _ = shape
    inputs = [random(*shape, dtype=dtype) for _ in range(3)]
    gate = None
    if gated:
        gate = F.logsigmoid(torch.randn((B, H, T) if gated == "scalar" else shape, device="cuda") + 3)

    def plain(q, k, v):
        chunk = 16 if gated == "vector" else 64
        g = None if gate is None else gate.to(q.dtype)
        return linear_attention_ref.chunked(q, k, v, g, feature="elu", chunk=chunk)[0]

    def ours(q, k, v, impl):
        return linear_attention(q, k, v, gate=gate, impl=impl)

    moved = (7 if backward else 4) * inputs[0].numel() * dtype.itemsize
    return make_group(ours, plain, inputs, backward, moved=moved, form=" chunked")


def words(shape, gated):
    return f"{shape_of(shape)} {gated or ''}".rstrip()


def main(argv=None) -> int:
    return run("linear_attention", PROBLEMS, words, group, argv)


if __name__ == "__main__":
    sys.exit(main())
