"""What each primitive of csrc/cuda must compute, against torch: run on the emulator by test_emu.py and on a GPU by tests/gpu.

Every check takes the Library built from emu/primitives.cu (or emu/flash_attention.cu) and makes its tensors on its device.
"""

from __future__ import annotations

import torch


def _copy_bits(dtype: torch.dtype) -> torch.dtype:
    return {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[dtype]


def mma(lib, dtype: torch.dtype) -> None:
    k = {torch.float32: 8, torch.int8: 32}.get(dtype, 16)
    torch.manual_seed(0)
    # Small integers: every product and sum is exact, so a layout is right or wrong and nothing in between.
    a, b, c = (torch.randint(-8, 9, shape, device=lib.device).to(dtype) for shape in ((16, k), (8, k), (16, 8)))
    wide = torch.int32 if dtype == torch.int8 else torch.float32
    d = torch.full((16, 8), 77, dtype=wide, device=lib.device)
    lib.call("test_mma", a, b, c.to(wide), d, None)
    assert torch.equal(d.double(), a.double() @ b.double().T + c.double())


def mma_bits(lib) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(-(2**31), 2**31, (n, 8), device=lib.device).int() for n in (16, 8))
    c, d = torch.randint(-8, 9, (16, 8), device=lib.device).int(), torch.full((16, 8), 77, device=lib.device).int()
    lib.call("test_mma", a, b, c, d, None)
    both = (a[:, None, :, None] & b[None, :, :, None]) >> torch.arange(32, device=lib.device) & 1
    assert torch.equal(d, both.sum((-1, -2)).int() + c)


def mma_tf32_rounding(lib) -> None:
    a, b = torch.zeros(16, 8, device=lib.device), torch.zeros(8, 8, device=lib.device)
    a[:, 0] = 1 + 2.0**-11  # half a tf32 step above 1: ties go away from zero
    a[1, 0], a[2, 0] = -(1 + 2.0**-11), 1 + 2.0**-12
    b[:, 0] = 1
    d = torch.empty(16, 8, device=lib.device)
    lib.call("test_mma", a, b, torch.zeros(16, 8, device=lib.device), d, None)
    assert d[0, 0] == 1 + 2.0**-10 and d[1, 0] == -(1 + 2.0**-10) and d[2, 0] == 1


def ldmatrix(lib, n: int, trans: bool) -> None:
    x = torch.arange(64 * n, dtype=torch.int16, device=lib.device).view(8 * n, 8)
    r = torch.zeros(n, 32, dtype=torch.int32, device=lib.device)
    lib.call("test_ldmatrix", x, r, int(trans), None)
    pairs = r.view(torch.int16).view(n, 8, 8)  # (matrix, g, 2t and 2t + 1)
    want = x.view(n, 8, 8)
    assert torch.equal(pairs, want.transpose(1, 2) if trans else want)


def cp_async(lib, size: int, left: int) -> torch.Tensor:
    """Returns (copied, wanted): equal when the kernel waited."""
    steps, threads = 4, 32
    torch.manual_seed(1)
    x = torch.randint(0, 255, (steps * threads, size), dtype=torch.uint8, device=lib.device)
    sizes = torch.randint(0, size + 1, (steps * threads,), dtype=torch.int32, device=lib.device)
    ready = (steps - max(left, 0)) * threads
    y = torch.zeros(ready * size, dtype=torch.uint8, device=lib.device)
    lib.call("test_cp_async", x, sizes, y, size, left, None)
    inside = torch.arange(size, device=lib.device) < sizes[:ready, None]
    return y, (x[:ready] * inside).flatten().flip(0)


def warp(lib) -> None:
    torch.manual_seed(2)
    x = torch.randint(-99, 100, (32,), dtype=torch.int32, device=lib.device)
    y = torch.zeros(14, 32, dtype=torch.int32, device=lib.device)
    lib.call("test_warp", x, y, None)
    i = torch.arange(32, device=lib.device)
    up8, down16 = torch.where(i % 8 >= 3, i - 3, i), torch.where(i % 16 < 11, i + 5, i)
    bits = sum(1 << int(lane) for lane in i if x[lane] > 0)
    ballot = bits - (1 << 32) if bits >> 31 else bits
    same = torch.ones_like(x)
    want = [
        same * x[5],
        x[i // 8 * 8 + 3],
        x[i ^ 9],
        x[torch.where(i >= 3, i - 3, i)],
        x[up8],
        x[torch.where(i < 27, i + 5, i)],
        x[down16],
        same * ballot,
        same * 2,
        same * 2,
        same * int(x.sum()),
        same * x.max(),
        same * x.min(),
        torch.where(i < 16, x[i ^ 1], int(x[16:].sum())),
    ]
    for row, (got, expected) in enumerate(zip(y, want)):
        assert torch.equal(got, expected.int()), f"row {row}: {got.tolist()} != {expected.tolist()}"


def atomics(lib) -> torch.Tensor:
    """Returns the tickets: the order in which threads came."""
    blocks, threads = 3, 64
    counters = torch.zeros(5, dtype=torch.int32, device=lib.device)
    total = torch.zeros(1, device=lib.device)
    tickets = torch.zeros(blocks * threads, dtype=torch.int32, device=lib.device)
    lib.call("test_atomics", counters, total, tickets, blocks, threads, None)
    n = blocks * threads
    assert counters.tolist() == [n, threads - 1, 1 - threads, 2 * n, n]
    assert total.item() == n / 2
    assert torch.equal(tickets.sort().values, torch.arange(n, dtype=torch.int32, device=lib.device))
    return tickets


def reduce(lib, threads: int) -> None:
    torch.manual_seed(3)
    x = torch.randint(-50, 50, (threads,), device=lib.device).float()
    y = torch.zeros(4, threads, device=lib.device)
    lib.call("test_reduce", x, y, None)
    assert torch.equal(y[0], x.sum().expand(threads))
    assert torch.equal(y[1], x.max().expand(threads))
    assert torch.equal(y[2], x.view(-1, 64).sum(1).repeat_interleave(64))
    assert torch.equal(y[3], x.view(-1, 8).amax(1).repeat_interleave(8))


def convert(lib, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor(
        [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-8, 2.0**-24, 2.0**-25, 3e-8, 6.1e-5, float("inf"), -float("inf")]
    )
    # Every pattern that is half-way between two values of the narrow type, and its neighbours.
    ties = (torch.arange(0, 2**16, 7, dtype=torch.int32) << 16) + 0x8000
    ties16 = (torch.arange(2**18, dtype=torch.int32) << 13) + 0x1000 + (0x38000000 - (1 << 23))
    x = torch.cat([bits.view(torch.float32), edges, ties.view(torch.float32), ties16[::97].view(torch.float32)]).to(lib.device)
    narrow = torch.zeros(x.numel(), dtype=dtype, device=lib.device)
    wide = torch.zeros_like(x)
    lib.call("test_convert", x, narrow, wide, None)
    numbers = ~x.isnan()
    assert torch.equal(narrow.isnan(), ~numbers)
    assert torch.equal(narrow[numbers].view(torch.int16), x.to(dtype)[numbers].view(torch.int16))
    assert torch.equal(wide[numbers], narrow[numbers].float())


def attention(lib, H: int, T: int, left_out: int = 0) -> float:
    """The largest error of the small flash attention against SDPA in float64, NaN counted as infinite."""
    torch.manual_seed(5)
    q, k, v = (torch.randn(H, T, 64).bfloat16().to(lib.device) for _ in range(3))
    o = torch.full_like(q, float("nan"))
    lib.call("test_attention", q, k, v, o, 64**-0.5, left_out, None)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return float((o.double() - want).abs().nan_to_num(nan=float("inf")).max())
