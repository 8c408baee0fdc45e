"""What the Triton kernels of binary ops share: counting of differing bits, packing of rows, and what is made of a sum. The
contracts are in kernels/binary_linear/binary_linear.h and kernels/binary_conv2d/binary_conv2d.h.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

POPC = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # the interpreter has no device library
OPTIONS = {"enable_fp_fusion": False}  # a fused multiply-add would round once where the CPU rounds twice


@triton.jit
def popcount(x):
    """Set bits of each int32."""
    if POPC:
        return libdevice.popc(x)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def count(a, w, valid):
    """(BM, BN): in how many valid bits rows a (BM, BK) and columns w (BN, BK) differ. valid: (BM or 1, BK)."""
    return tl.sum(popcount((a[:, None, :] ^ w[None, :, :]) & valid[:, None, :]), 2)


@triton.jit
def load_columns(codes, n, k, N, W):
    """Words k (BK) of columns n (BN) of panels (P, W, 16): (BN, BK)."""
    at = codes + (n // 16).to(tl.int64)[:, None] * W * 16 + k[None, :] * 16 + (n % 16)[:, None]
    return tl.load(at, mask=(n < N)[:, None] & (k < W)[None, :], other=0)


@triton.jit
def finish(sums, scales, scale, bias, n, N):
    """((sums (BM, BN) scales[n]) scale (BM)) + bias[n] in float32, rounded after each step."""
    y = sums.to(tl.float32) * tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    if scale is not None:
        y *= scale[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    return y


@triton.jit
def store_words(y, words, m, n, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Signs of y (BM, BN) to words (M, ceil(N / 32))."""
    # Column 8 j + i of four times eight is bit 8 i + j: the last two axes change places.
    signs = tl.reshape(tl.where(y < 0, 0, 1) * tl.where(n < N, 1, 0)[None, :], [BM, BN // 32, 8, 4])
    signs = tl.reshape(tl.permute(signs, [0, 1, 3, 2]), [BM, BN // 32, 32])
    word = tl.sum(signs << tl.arange(0, 32)[None, None, :], 2)
    L = tl.cdiv(N, 32)
    at = tl.min(n, 0) // 32 + tl.arange(0, BN // 32)
    tl.store(words + m.to(tl.int64)[:, None] * L + at[None, :], word, mask=(m < M)[:, None] & (at < L)[None, :])


@triton.jit
def pack_rows_kernel(x, words, scale, K, W, x_stride, BW: tl.constexpr):
    """A row of x (M, K) as words (M, W), and the mean of its magnitudes."""
    m = tl.program_id(0).to(tl.int64)
    bit = tl.arange(0, 32)
    total = tl.zeros([BW, 32], tl.float32)
    for first in range(0, W, BW):
        w = first + tl.arange(0, BW)
        k = w[:, None] * 32 + (bit % 8 * 4 + bit // 8)[None, :]
        v = tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(words + m * W + w, tl.sum(tl.where((k < K) & ~(v < 0), 1, 0) << bit[None, :], 1), mask=w < W)
        total += tl.abs(v)
    if scale is not None:
        tl.store(scale + m, tl.sum(total) / tl.maximum(K, 1))


def pack_rows(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor | None) -> None:
    """words (M, ceil(K / 32)) and scale (M) of x (M, K) with contiguous rows."""
    (M, K), W = x.shape, words.shape[1]
    if M:
        BW = min(max(triton.next_power_of_2(W), 1), 32)
        pack_rows_kernel[(M,)](x, words, scale, K, W, x.stride(0), BW=BW)


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """A weight's bytes as int32, in one dimension."""
    return (codes if codes.data_ptr() % 16 == 0 else codes.clone()).flatten().view(torch.int32)


def tail_of(terms: int) -> int:
    """The bits of the last word of `terms` signs, as an int32."""
    bits = sum(1 << (8 * (k % 4) + k // 4) for k in range((terms - 1) % 32 + 1))
    return bits - (1 << 32 if bits >> 31 else 0)


def tile(rows: int, columns: int = 64) -> dict[str, int]:
    """The largest tiles that leave nothing in local memory; few rows: small ones, as many programs as columns give. Their
    speed was not measured."""
    few = rows <= 16
    return {"BM": 16, "BN": 32, "BK": 8, "num_warps": 4} if few else {"BM": 64, "BN": columns, "BK": 4, "num_warps": 8}


def spec(kernel, dtype: str, given=(), **fixed) -> tuple:
    """A kernel as compile_specs() lists it: x and y of dtype, of the optional arguments those that are given."""
    absent = dict.fromkeys({"scale", "row_scale", "pixel_scale", "bias"} & set(kernel.arg_names) - set(given))
    options = {k: v for k, v in fixed.items() if k.startswith("num_")} | OPTIONS
    constexprs = {n: v for n, v in (absent | fixed).items() if n in kernel.arg_names}
    kinds = {"x": dtype, "y": dtype, "words": "i32", "codes": "i32"}
    kinds |= dict.fromkeys(("scales", "scale", "row_scale", "pixel_scale", "bias"), "fp32")
    signature = {n: "constexpr" if n in constexprs else f"*{kinds[n]}" if n in kinds else "i32" for n in kernel.arg_names}
    return kernel, signature, constexprs, options
