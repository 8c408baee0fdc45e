"""The Triton kernels of binary_linear and their launchers; the equations are in binary_linear.h.

A program counts a tile (BM, BN) of y, BK words of K at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_signs import (
    OPTIONS,
    count,
    finish,
    load_columns,
    pack_rows,
    pack_rows_kernel,
    spec,
    store_words,
    tail_of,
    tile,
    words_of,
)


@triton.jit
def product_kernel(
    words, codes, scales, row_scale, bias, y, M, N, K, W, tail, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y, or where that is int32 the words of its signs."""
    rows = tl.cdiv(M, BM)
    m = tl.program_id(0) % rows * BM + tl.arange(0, BM)
    n = tl.program_id(0) // rows * BN + tl.arange(0, BN)
    counts = tl.zeros([BM, BN], tl.int32)
    for first in range(0, W, BK):
        k = first + tl.arange(0, BK)
        a = tl.load(words + m.to(tl.int64)[:, None] * W + k[None, :], mask=(m < M)[:, None] & (k < W)[None, :], other=0)
        valid = tl.where(k == W - 1, tail, -1)  # a file's bits behind K don't count
        counts += count(a, load_columns(codes, n, k, N, W), valid[None, :])
    scale = None
    if row_scale is not None:
        scale = tl.load(row_scale + m, mask=m < M, other=0.0)
    v = finish(K - 2 * counts, scales, scale, bias, n, N)
    if y.dtype.element_ty == tl.int32:
        store_words(v, y, m, n, M, N, BM, BN)
    else:
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(y + m.to(tl.int64)[:, None] * y_stride + n[None, :], v.to(y.dtype.element_ty), mask=inside)


def pack(x, words, row_scale) -> None:
    """As mlc_binary_linear_pack."""
    with torch.cuda.device_of(x):
        pack_rows(x, words, row_scale)


def fwd(words, codes, scales, row_scale, bias, N, K, y) -> None:
    """As mlc_binary_linear_fwd."""
    M, W = words.shape
    if not M * N:
        return
    how = tile(M)
    grid = (triton.cdiv(M, how["BM"]) * triton.cdiv(N, how["BN"]),)
    with torch.cuda.device_of(words):
        product_kernel[grid](
            words, words_of(codes), scales, row_scale, bias, y, M, N, K, W, tail_of(K), y.stride(0), **how, **OPTIONS
        )


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    return [
        spec(product_kernel, "bf16", ("row_scale", "bias"), **tile(512)),
        spec(product_kernel, "fp32", **tile(1)),
        spec(product_kernel, "i32", ("bias",), **tile(512)),
        spec(product_kernel, "i32", **tile(1)),
        spec(pack_rows_kernel, "bf16", ("scale",), BW=32),
        spec(pack_rows_kernel, "fp32", BW=1),
    ]
