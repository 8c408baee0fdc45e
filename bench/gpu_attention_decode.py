"""Decoding on a GPU: one query a sequence over a key-value cache, against torch's attention over the contiguous cache.

Rates count the bytes of the full-precision cache, also in the row of the int8 one; the ceiling is the device's copy.
"""

import sys

import _gpu
import torch
import torch.nn.functional as F
from harness import Group, relative_error

from mlcore.ops import attention_with_kvcache

# (B, H, Hkv, T, D)
PROBLEMS = [
    (1, 32, 8, 4096, 128),
    (1, 32, 8, 32768, 128),
    (16, 32, 8, 8192, 128),
    (64, 32, 8, 2048, 128),
    (8, 16, 16, 16384, 64),
    (8, 64, 1, 16384, 128),
    (16, 8, 4, 8192, 256),
]
PAGE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def group(dtype, B, H, Hkv, T, D):
    torch.manual_seed(0)
    q = torch.randn(B, H, 1, D, device="cuda").to(dtype)
    k, v = (torch.randn(B, Hkv, T, D, device="cuda").to(dtype) for _ in range(2))
    lengths, table = torch.full((B,), T, device="cuda"), torch.randperm(B * T // PAGE, device="cuda").view(B, -1)
    pages = [torch.empty(table.numel(), Hkv, PAGE, D, dtype=dtype, device="cuda") for _ in range(2)]
    for paged, cache in zip(pages, (k, v)):
        paged[table] = cache.unflatten(2, (-1, PAGE)).transpose(1, 2)
    scales = [t.float().abs().amax(-1) / 127 for t in (k, v)]
    small = [(t.float() / s[..., None]).round().to(torch.int8) for t, s in zip((k, v), scales)]

    def ours(k, v, impl="cuda", **options):
        return lambda: attention_with_kvcache(q, k, v, cache_seqlens=lengths, impl=impl, **options)

    rows = {
        "mlcore cuda": ours(k, v),
        "mlcore cuda, pages of 16": ours(*pages, page_table=table),
        "mlcore triton": ours(k, v, "triton"),
        "lossy: mlcore cuda, int8": ours(*small, k_scale=scales[0], v_scale=scales[1]),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=Hkv != H),
        "floor: read": lambda: [t.view(torch.int32).amax() for t in (k, v)],
    }

    def exact(k, v):  # of one sequence
        return F.scaled_dot_product_attention(q[:1].double(), k[:1].double(), v[:1].double(), enable_gqa=Hkv != H)

    want = exact(k, v), exact(*(t[:1].double() * s[:1, ..., None] for t, s in zip(small, scales)))

    def check(row, got):
        if row.startswith("floor"):
            return 0.0
        error = relative_error(got[:1], want["int8" in row])
        assert "mlcore" not in row or error < TOLERANCE[dtype], f"{row}: relative error {error}"
        return error

    return Group(rows, check, bytes=2 * k.numel() * k.element_size())


def main(argv=None) -> int:
    groups = []
    for dtype in (torch.bfloat16, torch.float32):
        for problem in PROBLEMS if dtype == torch.bfloat16 else PROBLEMS[2:3]:
            B, H, Hkv, T, D = problem
            name = f"attention_decode {str(dtype)[6:]} ({B},{H}:{Hkv},1,{D}) over {T} keys"
            groups.append((name, lambda args=(dtype, *problem): group(*args)))
    return _gpu.main(groups, argv)


if __name__ == "__main__":
    sys.exit(main())
