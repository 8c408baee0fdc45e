"""What the row-wise Triton kernels share: the launch shape for a row length, pieces of a row, sums of partial rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK = 8192  # columns at a time; with 16 warps a thread holds 16 elements of each operand, beyond that backward spills


def row_shape(cols: int) -> tuple[int, int]:
    """(columns at a time, warps) of a program that works on rows of `cols` elements."""
    block = min(max(triton.next_power_of_2(cols), 128), MAX_BLOCK)
    return block, min(max(block // 512, 4), 16)


def stride_of(t: torch.Tensor | None) -> int:
    """The row stride of an (R, C) tensor; 0 for one left out."""
    return 0 if t is None else t.stride(0)


@triton.jit
def load_sum(x, residual, s, c, inside):
    """x[c], or x[c] + residual[c] rounded to s's dtype and written to it; in float32."""
    v = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + c, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(s.dtype.element_ty)
        tl.store(s + c, rounded, mask=inside)
        v = rounded.to(tl.float32)
    return v


@triton.jit
def load_g(dy, weight, c, inside):
    """(dy[c], dy[c] * weight[c]) in float32."""
    d = tl.load(dy + c, mask=inside, other=0.0).to(tl.float32)
    g = d
    if weight is not None:
        g = d * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    return d, g


@triton.jit
def sum_partials_kernel(partial, out, count, cols, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[c] = sum over p of partial[p, c], for partial (count, cols) float32, in an order fixed by ROWS."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK)
    inside = c < cols
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        p = first + tl.arange(0, ROWS)  # (ROWS)
        at = partial + p[:, None].to(tl.int64) * cols + c[None, :]
        total += tl.load(at, mask=(p[:, None] < count) & inside[None, :], other=0.0)
    tl.store(out + c, tl.sum(total, 0), mask=inside)


def sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out (C) = partial (P, C).sum(0)."""
    count, cols = partial.shape
    if cols > 0:
        sum_partials_kernel[(triton.cdiv(cols, 64),)](partial, out, count, cols, BLOCK=64, ROWS=16)


_POINTERS = {"rstd": "*fp32", "mean": "*fp32", "partial": "*fp32", "weight_partial": "*fp32", "bias_partial": "*fp32"}


def compile_spec(kernel, dtype: str, cols: int, **constexprs) -> tuple:
    """A row kernel for rows of `cols` elements as compile_specs() lists it; every tensor but the statistics has `dtype`."""
    block, warps = row_shape(cols)
    constexprs["BLOCK"] = block
    signature = {}
    for name in kernel.arg_names:
        is_int = name in ("rows", "cols", "count") or name.endswith("_stride")
        type_name = "i32" if is_int else "fp32" if name == "eps" else _POINTERS.get(name, f"*{dtype}")
        signature[name] = "constexpr" if name in constexprs else type_name
    return kernel, signature, constexprs, {"num_warps": warps}


def sum_partials_spec(out: str) -> tuple:
    """sum_partials_kernel for an output of this dtype."""
    kernel, signature, constexprs, options = compile_spec(sum_partials_kernel, out, 64, ROWS=16)
    return kernel, signature, {**constexprs, "BLOCK": 64}, options
