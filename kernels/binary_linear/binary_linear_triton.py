"""The Triton kernels of binary_linear and their launchers; the equations are in binary_linear.h.

A program counts a tile (BM, BN) of y, BK words of K at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import triton_signs as signs


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
        counts += signs.count(a, signs.load_columns(codes, n, k, N, W), valid[None, :])
    scale = None
    if row_scale is not None:
        scale = tl.load(row_scale + m, mask=m < M, other=0.0)
    v = signs.finish(K - 2 * counts, scales, scale, bias, n, N)
    if y.dtype.element_ty == tl.int32:
        signs.store_words(v, y, m, n, M, N, BM, BN)
    else:
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(y + m.to(tl.int64)[:, None] * y_stride + n[None, :], v.to(y.dtype.element_ty), mask=inside)


def pack(x, words, row_scale) -> None:
    """As mlc_binary_linear_pack."""
    with torch.cuda.device_of(x):
        signs.pack_rows(x, words, row_scale)


def fwd(words, codes, scales, row_scale, bias, N, K, y) -> None:
    """As mlc_binary_linear_fwd."""
    M, W = words.shape
    if not M * N:
        return
    how = signs.tile(M)
    grid = (triton.cdiv(M, how["BM"]) * triton.cdiv(N, how["BN"]),)
    with torch.cuda.device_of(words):
        product_kernel[grid](
            words, signs.words_of(codes), scales, row_scale, bias, y, M, N, K, W, signs.tail_of(K), y.stride(0), **how,
            **signs.OPTIONS,
        )  # fmt: skip


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    return [
        signs.spec(product_kernel, "bf16", ("row_scale", "bias"), **signs.tile(512)),
        signs.spec(product_kernel, "fp32", **signs.tile(1)),
        signs.spec(product_kernel, "i32", ("bias",), **signs.tile(512)),
        signs.spec(product_kernel, "i32", **signs.tile(1)),
        signs.spec(signs.pack_rows_kernel, "bf16", ("scale",), BW=32),
        signs.spec(signs.pack_rows_kernel, "fp32", BW=1),
    ]
