"""The Triton kernels of quant_linear and their launchers, for every format; equations and storage are in quant_linear.h.

A program owns a tile (BM, BN) of y and walks K in steps of BK codes of one group. The codes are read as they lie in memory, as
words of 32 bits, and become whole numbers; a step's products are scaled as they are added to float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .quant_linear_prepare import exact_codebook, integer_codebook, words_of

SPLIT_PROGRAMS = 396  # as many programs as few rows ask for: three for each multiprocessor of an H100


@triton.jit
def plane(words, block, left, POWER: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The codes' bits of one power of two, shifted to their place: (BN, BK). words (BN): each row's first; block: the first
    block of the step; left: codes that the group has from there on."""
    KB: tl.constexpr = 32 // (BITS & -BITS)
    ABOVE: tl.constexpr = BITS & ~(2 * POWER - 1)  # the planes before it: so many bits below it, so many vectors before it
    VECTORS: tl.constexpr = KB * POWER // 32
    PER: tl.constexpr = 8 // POWER
    v = tl.arange(0, BK * POWER // 32)
    at = (block + v // VECTORS) * (KB * BITS // 2) + (KB * ABOVE // 2) + v % VECTORS * 16
    there = v // VECTORS * KB < left
    word = tl.load(words[:, None] + at[None, :], mask=there[None, :], other=0)
    j = tl.arange(0, 4 * PER)  # units are 4 codes, neighbours share bytes
    field = (word[:, :, None] >> (j % 4 * 8 + j // 4 * POWER)[None, None, :]) & ((1 << POWER) - 1)
    return tl.reshape(field, [BN, BK]) << ABOVE


@triton.jit
def load_codes(words, block, left, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BN, BK) codes in int32."""
    q = tl.zeros([BN, BK], tl.int32)
    if BITS & 8:
        q += plane(words, block, left, 8, BITS, BN, BK)
    if BITS & 4:
        q += plane(words, block, left, 4, BITS, BN, BK)
    if BITS & 2:
        q += plane(words, block, left, 2, BITS, BN, BK)
    if BITS & 1:
        q += plane(words, block, left, 1, BITS, BN, BK)
    return q


@triton.jit
def step_place(i, per_group, group_size, group_padded, K_padded, BITS: tl.constexpr, BK: tl.constexpr):
    """(group, first code within it, first block, codes left) of step i."""
    g = i // per_group
    first = i % per_group * BK
    block = (g * group_padded + first) // (32 // (BITS & -BITS))
    return g, first, block, tl.minimum(group_padded, K_padded - g * group_padded) - first


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """0 none, 1 relu, 2 gelu, 3 gelu with tanh, 4 silu, 5 relu6, of float32."""
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:
        z = z / (1.0 + tl.exp(-1.5957691216057308 * z * (1.0 + 0.044715 * z * z)))
    elif ACTIVATION == 4:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == 5:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    return z


@triton.jit
def finish(c, m, n, M, N, row_steps, table_steps, table_rows, bias, residual, residual_stride, y, y_stride, A: tl.constexpr):
    """y[m, n] from sums c; m and n broadcast to c."""
    inside = (m < M) & (n < N)
    if table_steps is not None:
        c *= tl.load(table_steps + n // table_rows, mask=n < N, other=0.0)
    if row_steps is not None:
        c *= tl.load(row_steps + m, mask=m < M, other=0.0)
    if bias is not None:
        c += tl.load(bias + n, mask=n < N, other=0.0)
    c = activate(c, A)
    if residual is not None:
        c += tl.load(residual + m.to(tl.int64) * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64) * y_stride + n, c.to(y.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x, words, scales, zeros, codebook, row_steps, table_steps, bias, residual, y, partial, M, N, K, x_stride, residual_stride,
    y_stride, group_size, group_padded, K_padded, table_rows, offset, per_group, steps, steps_per_split,
    BITS: tl.constexpr, CENTRED: tl.constexpr, A: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of y, or of partial (splits, M, N): the sums of steps_per_split steps. x is int8 in the integer mode; CENTRED: its
    weights q - z fit into int8 as they are."""
    INT8: tl.constexpr = x.dtype.element_ty == tl.int8
    rows = tl.cdiv(M, BM)
    m = tl.program_id(0) % rows * BM + tl.arange(0, BM)
    n = tl.program_id(0) // rows * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    panel, lane = tl.minimum(n, N - 1) // 16, n % 16
    row_words = words + panel.to(tl.int64) * (K_padded * BITS // 2) + lane
    vectors = panel.to(tl.int64) * tl.cdiv(K, group_size)
    c = tl.zeros([BM, BN], tl.float32)
    for i in range(split * steps_per_split, tl.minimum(steps, (split + 1) * steps_per_split)):
        g, first, block, left = step_place(i, per_group, group_size, group_padded, K_padded, BITS, BK)
        r = first + tl.arange(0, BK)
        k = g * group_size + r
        there = (r < group_size) & (k < K)
        at = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        a = tl.load(at, mask=(m < M)[:, None] & there[None, :], other=0)
        q = load_codes(row_words, block, left, BITS, BN, BK)
        z = offset + n * 0
        if zeros is not None:
            z = tl.load(zeros + (vectors + g) * 16 + lane).to(tl.int32)
        if INT8:
            if codebook is not None:
                w = tl.load(codebook + (tl.minimum(n, N - 1) // table_rows)[:, None] * (1 << BITS) + q)
            elif CENTRED:
                w = (q - z[:, None]).to(tl.int8)
            else:
                w = (q - 128).to(tl.int8)
            d = tl.dot(a, tl.trans(w))
            if codebook is None and not CENTRED:
                d += tl.sum(a.to(tl.int32), 1)[:, None] * (128 - z)[None, :]
            s = d.to(tl.float32)
        elif codebook is not None:
            v = tl.load(codebook + (tl.minimum(n, N - 1) // table_rows)[:, None] * (1 << BITS) + q)
            if a.dtype == tl.float32:
                s = tl.dot(a, tl.trans(v), input_precision="tf32x3")
            else:  # an entry is two numbers of x's type, exact to 16 bits or more
                high = v.to(a.dtype)
                low = (v - high.to(tl.float32)).to(a.dtype)
                s = tl.dot(a, tl.trans(low))
                s = tl.dot(a, tl.trans(high), s)
        else:
            w = (q - z[:, None]).to(a.dtype)  # whole numbers up to 255: exact in every type
            s = tl.dot(a, tl.trans(w), input_precision="tf32x3")
        c += s * tl.load(scales + (vectors + g) * 16 + lane)[None, :]
    if partial is None:
        finish(
            c, m[:, None], n[None, :], M, N, row_steps, table_steps, table_rows, bias, residual, residual_stride, y, y_stride, A
        )
    else:
        at = partial + (split.to(tl.int64) * M + m[:, None]) * N + n[None, :]
        tl.store(at, c, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def finish_kernel(
    partial, row_steps, table_steps, bias, residual, y, M, N, residual_stride, y_stride, table_rows, splits,
    A: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y from partial (splits, M, N), added in their order."""
    m = tl.program_id(0).to(tl.int64) + tl.zeros([BN], tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.zeros([BN], tl.float32)
    for split in range(splits):
        c += tl.load(partial + (split * M + m) * N + n, mask=n < N, other=0.0)
    finish(c, m, n, M, N, row_steps, table_steps, table_rows, bias, residual, residual_stride, y, y_stride, A)


@triton.jit
def round_rows_kernel(x, a, row_steps, K, x_stride, BK: tl.constexpr):
    """Rows of x (M, K) as int8 a (M, K) times row_steps (M): NaN where a row isn't finite, 0 where it is below 1e-35."""
    m = tl.program_id(0).to(tl.int64)
    highest, bad = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.int32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        v = tl.abs(tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32))
        finite = v < float("inf")
        highest, bad = tl.maximum(highest, tl.where(finite, v, 0.0)), bad | tl.where(finite, 0, 1)
    peak, broken = tl.max(highest, 0), tl.max(bad, 0) > 0
    usable = (peak > 1e-35) & ~broken
    factor = tl.where(usable, tl.div_rn(127.0, tl.where(usable, peak, 1.0)), 0.0)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        v = tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        v = tl.where(usable, v * factor, 0.0)
        v = (v + 12582912.0) - 12582912.0  # 1.5 * 2^23: to whole numbers, half to even
        tl.store(a + m * K + k, v.to(tl.int8), mask=k < K)
    tl.store(row_steps + m, tl.where(broken, float("nan"), tl.where(usable, tl.div_rn(peak, 127.0), 0.0)))


@triton.jit
def dequantize_kernel(
    words, scales, zeros, codebook, w, N, K, w_stride, group_size, group_padded, K_padded, table_rows, offset, per_group,
    BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w (N, K): one step of BK codes for BN rows."""
    i = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    panel, lane = tl.minimum(n, N - 1) // 16, n % 16
    vectors = panel.to(tl.int64) * tl.cdiv(K, group_size)
    g, first, block, left = step_place(i, per_group, group_size, group_padded, K_padded, BITS, BK)
    q = load_codes(words + panel.to(tl.int64) * (K_padded * BITS // 2) + lane, block, left, BITS, BN, BK)
    if codebook is not None:
        v = tl.load(codebook + (tl.minimum(n, N - 1) // table_rows)[:, None] * (1 << BITS) + q)
    elif zeros is not None:
        v = (q - tl.load(zeros + (vectors + g) * 16 + lane).to(tl.int32)[:, None]).to(tl.float32)
    else:
        v = (q - offset).to(tl.float32)
    v *= tl.load(scales + (vectors + g) * 16 + lane)[:, None]
    r = first + tl.arange(0, BK)
    k = g * group_size + r
    inside = (n < N)[:, None] & ((r < group_size) & (k < K))[None, :]
    tl.store(w + n.to(tl.int64)[:, None] * w_stride + k[None, :], v.to(w.dtype.element_ty), mask=inside)


def _tile(M: int, group_size: int, wide: bool) -> dict[str, int]:
    """Tiles by the number of rows: the largest that leave nothing in local memory on sm_80 and sm_90, where products of float32
    (wide) take more registers. Their speed was not measured."""
    if M <= 16:
        step = min(max(triton.next_power_of_2(group_size), 32), 64)
        return {"BM": 16, "BN": 32, "BK": step, "num_warps": 4, "num_stages": 4}
    if M <= 128 or wide:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4}
    return {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}


def _weight(codes, bits: int, group_size: int, K: int, BK: int) -> tuple[int, int, int, int]:
    """(group_padded, K_padded, steps a group, steps)."""
    block = 32 // (bits & -bits)
    per_group = max(triton.cdiv(group_size, BK), 1)
    return (
        triton.cdiv(group_size, block) * block,
        codes.shape[1] // (2 * bits),
        per_group,
        per_group * triton.cdiv(K, group_size),
    )


def _splits(M: int, N: int, steps: int, BN: int) -> int:
    """Into how many parts K is cut where rows are few, each of at least four steps."""
    return max(min(triton.cdiv(SPLIT_PROGRAMS, triton.cdiv(N, BN)), steps // 4), 1) if M <= 16 else 1


def fwd(x, codes, scales, zeros, codebook, bias, residual, bits, offset, group_size, activation, int8, y) -> None:
    """As mlc_quant_linear_fwd."""
    (M, K), N = x.shape, y.shape[1]
    if not y.numel():
        return
    tile = _tile(M, min(group_size, max(K, 1)), x.dtype == torch.float32 and not int8)
    padded, K_padded, per_group, steps = _weight(codes, bits, group_size, K, tile["BK"])
    row_steps = table_steps = partial = None
    table_rows = 1 if codebook is None else triton.cdiv(N, len(codebook))
    with torch.cuda.device_of(x):
        if codebook is not None:
            codebook, table_steps = integer_codebook(codebook) if int8 else exact_codebook(codebook, x.dtype)
        if int8:
            a, row_steps = torch.empty(M, K, dtype=torch.int8, device=x.device), x.new_empty(M, dtype=torch.float32)
            round_rows_kernel[(M,)](x, a, row_steps, K, x.stride(0), BK=1024)
            x = a
        splits = _splits(M, N, steps, tile["BN"])
        part = triton.cdiv(steps, splits)
        if splits > 1:
            splits = triton.cdiv(steps, part)
            partial = x.new_empty(splits, M, N, dtype=torch.float32)
        r_stride = 0 if residual is None else residual.stride(0)
        grid = triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]), splits
        product_kernel[grid](
            x, words_of(codes), scales, zeros, codebook, row_steps, table_steps, bias, residual, y, partial, M, N, K,
            x.stride(0), r_stride, y.stride(0), group_size, padded, K_padded, table_rows, offset, per_group, steps, part,
            BITS=bits, CENTRED=bits < 8 or (zeros is None and offset == 128), A=activation, **tile,
        )  # fmt: skip
        if partial is not None:
            finish_kernel[M, triton.cdiv(N, 256)](
                partial, row_steps, table_steps, bias, residual, y, M, N, r_stride, y.stride(0), table_rows, splits,
                A=activation, BN=256,
            )  # fmt: skip


def dequantize(codes, scales, zeros, codebook, bits, offset, group_size, w) -> None:
    """As mlc_quant_linear_dequantize."""
    N, K = w.shape
    if not w.numel():
        return
    BK = min(max(triton.next_power_of_2(min(group_size, K)), 32), 128)
    padded, K_padded, per_group, steps = _weight(codes, bits, group_size, K, BK)
    table_rows = 1 if codebook is None else triton.cdiv(N, len(codebook))
    with torch.cuda.device_of(w):
        dequantize_kernel[triton.cdiv(N, 32), steps](
            words_of(codes), scales, zeros, codebook, w, N, K, w.stride(0), group_size, padded, K_padded, table_rows, offset,
            per_group, BITS=bits, BN=32, BK=BK,
        )  # fmt: skip


def _spec(kernel, dtype: str, given=(), **fixed) -> tuple:
    """A kernel as compile_specs() lists it; of the arguments that may be None those named by `given` are there."""
    floats = dict.fromkeys(("scales", "row_steps", "table_steps", "bias", "partial", "codebook"), "fp32")
    pointers = dict.fromkeys(("x", "y", "w", "residual"), dtype) | {"words": "i32", "zeros": "u8", "a": "i8"} | floats
    options = {k: v for k, v in fixed.items() if k.startswith("num_")}
    optional = {"zeros", "codebook", "row_steps", "table_steps", "bias", "residual", "partial"} - set(given)
    fixed = dict.fromkeys(() if kernel is round_rows_kernel else optional) | fixed
    constexprs = {n: fixed[n] for n in kernel.arg_names if n in fixed}
    if kernel is product_kernel and "row_steps" in given:
        pointers |= {"x": "i8", "codebook": "i8"}
    kinds = {n: f"*{pointers[n]}" if n in pointers else "i32" for n in kernel.arg_names}
    signature = {n: "constexpr" if n in constexprs else kind for n, kind in kinds.items()}
    sizes = ("N", "K", "x_stride", "residual_stride", "y_stride", "w_stride", "group_size", "group_padded", "K_padded")
    even = [i for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*" or n in sizes]
    return kernel, signature, constexprs, options, {(i,): [["tt.divisibility", 16]] for i in even}


def product_spec(dtype: str, M: int, bits: int, given=(), group_size: int = 128, centred: bool = True) -> tuple:
    numbers = {"BITS": bits, "CENTRED": centred, "A": 2 + bits % 3}
    return _spec(product_kernel, dtype, given, **_tile(M, group_size, dtype == "fp32" and "row_steps" not in given), **numbers)


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options, attributes) of the variants that tests compile ahead."""
    product, spec = product_spec, _spec
    return [
        product("bf16", 1, 4, ("zeros", "partial")),
        product("fp16", 64, 4, ("bias", "residual"), 32),
        product("bf16", 512, 8),
        product("fp32", 16, 3, ("bias",)),
        product("bf16", 300, 4, ("codebook", "table_steps")),
        product("fp32", 1, 6, ("codebook", "bias")),
        product("bf16", 512, 8, ("row_steps", "bias")),
        product("bf16", 40, 8, ("row_steps", "zeros"), centred=False),
        product("fp32", 1, 7, ("row_steps", "table_steps", "codebook", "partial")),
        product("fp16", 64, 2, ("row_steps", "bias"), 32),
        spec(finish_kernel, "bf16", ("partial", "row_steps", "bias", "residual"), A=2, BN=256),
        spec(round_rows_kernel, "bf16", BK=1024),
        spec(dequantize_kernel, "bf16", ("zeros",), BITS=4, BN=32, BK=128),
        spec(dequantize_kernel, "fp32", ("codebook",), BITS=5, BN=32, BK=64),
    ]
