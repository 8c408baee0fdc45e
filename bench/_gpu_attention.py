"""The problems of gpu_attention.py: full, causal, window and masked attention, forward and backward alone. Rates count the
products of the pairs that are seen: 4 D a pair forward, 10 D backward, as flash-attention's authors count them.
"""

from __future__ import annotations

from dataclasses import dataclass

import _gpu
import torch
import torch.nn.functional as F
from harness import Group, relative_error

from mlcore.ops import attention
from mlcore.patterns import Causal, Documents, Pattern, Window

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}  # of the norm of the error


@dataclass(frozen=True)
class Problem:
    """(B, H, Hkv, T, D), and who sees whom."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    pattern: Pattern | None = None

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]} {self.shape}" + (f" {self.pattern}" if self.pattern is not None else "").replace(
            "\n", " "
        )


def problems() -> list[Problem]:
    cuts = torch.arange(0, 8193, 1024)
    return [
        *(Problem((2, 16, 16, 8192, D), pattern=p) for D in (64, 128) for p in (None, Causal())),
        Problem((16, 16, 16, 1024, 128), pattern=Causal()),
        Problem((2, 32, 8, 4096, 128), pattern=Causal()),
        Problem((2, 8, 8, 4096, 256), pattern=Causal()),
        Problem((2, 16, 16, 8192, 128), pattern=Causal() & Window(511, 0)),
        Problem((1, 16, 16, 8192, 128), pattern=Causal() & Documents(cuts)),
        Problem((2, 16, 16, 2048, 64), torch.float32, Causal()),
    ]


def group(problem: Problem, backward: bool) -> Group:
    """Rows: our kernels, and torch's with the mask that the pattern is."""
    B, H, Hkv, T, D = problem.shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, D), (B, H, T, D))
    *tensors, d_o = (torch.randn(s, device="cuda", generator=generator).to(problem.dtype) for s in sizes)
    pattern = problem.pattern
    dense = None if pattern is None else pattern.to_dense(T, T).cuda()
    causal = dense is not None and bool((dense == torch.ones_like(dense).tril()).all())
    mask = None if causal else dense

    def torch_way(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=Hkv != H)

    def call_of(fn, dtype=problem.dtype):
        inputs = [t.to(dtype).detach().requires_grad_(backward) for t in tensors]
        if not backward:
            return lambda: [fn(*inputs)]
        o = fn(*inputs)
        return lambda: list(torch.autograd.grad(o, inputs, d_o.to(dtype), retain_graph=True))

    want = call_of(torch_way, torch.float32)()  # float32 throughout: float64 takes minutes at these lengths

    def check(row: str, got: list[torch.Tensor]) -> float:
        error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
        assert not row.startswith("mlcore") or error < TOLERANCE[problem.dtype], f"{row}: relative error {error}"
        return error

    seen = T * T if dense is None else int(dense.sum())
    rows = {f"mlcore {impl}": _lazy(call_of, impl, pattern) for impl in ("cuda", "triton")}
    rows["torch"] = call_of(torch_way)
    return Group(rows, check, flops=(10 if backward else 4) * B * H * seen * D)


def _lazy(call_of, impl: str, pattern):
    """A row that is set up by its first call, so that a backend which is not there raises in the row and not before."""
    made = []

    def call():
        if not made:
            made.append(call_of(lambda q, k, v: attention(q, k, v, pattern=pattern, impl=impl)))
        return made[0]()

    return call


def main(argv: list[str] | None = None) -> int:
    groups = []
    for problem in problems():
        for backward in (False, True):
            name = f"attention {'bwd' if backward else 'fwd'} {problem}"
            groups.append((name, lambda problem=problem, backward=backward: group(problem, backward)))
    return _gpu.main(groups, argv)
