"""linear_attention on a GPU against torch's chunked form. The rates count q, k, v in and o out;
backward those and do in, dq, dk, dv out."""

import sys

import _gpu
import torch
import torch.nn.functional as F
from _gpu_ops import make_group, random

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

    others = {"torch chunked": plain, "torch.compile chunked": torch.compile(plain)}
    moved = (7 if backward else 4) * inputs[0].numel() * dtype.itemsize
    return make_group(lambda *t, impl: linear_attention(*t, gate=gate, impl=impl), plain, others, inputs, backward, moved)


def main(argv=None) -> int:
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, gated in PROBLEMS:
            for backward in (False, True):
                words = f"{'bwd' if backward else 'fwd'} {str(dtype)[6:]} ({','.join(map(str, shape))}) {gated or ''}"
                args = shape, gated, dtype, backward
                groups.append((f"linear_attention {words}".rstrip(), lambda args=args: group(*args)))
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
