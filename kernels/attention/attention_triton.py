"""The Triton kernels of attention: forward, and the launchers of both passes; the equations are in attention.h, the schedule
for GPUs in python/mlcore/ops/_attention_device.py. The backward kernels are in attention_triton_bwd.py, those over a cache in
attention_triton_decode.py.

One program works on a tile of 64 queries and visits the tiles of 64 keys that the schedule names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_triton_bwd import dkv_kernel, dq_kernel, ds_sum_kernel, row_delta_kernel
from .attention_triton_decode import append_kernel, decode_kernel, merge_kernel
from .attention_triton_tile import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    TILE,
    any_of,
    infinities,
    is_finite,
    is_masked,
    kept,
    load_rows,
    query_block,
    store_rows,
    tile_scores,
    with_sink,
)


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "drop_below"])
def fwd_kernel(
    q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits, o, lse,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st,
    bias_sb, bias_sh, bias_sq, bias_sk, relative_sb, relative_sh, set_sb, set_sh,
    H, group, Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi, drop_below, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """BQ queries of one head a program."""
    LISTED: tl.constexpr = row_ptr is not None
    PRECISION: tl.constexpr = "ieee"
    PIECES: tl.constexpr = TILE // BK
    i0, head, b, h, begin, end = query_block(row_ptr, set_sb, set_sh, H, Tq, Tk, left, right, offset, BQ)
    k += b * k_sb + h // group * k_sh
    v += b * v_sb + h // group * v_sh
    if bias is not None:
        bias += b * bias_sb + h * bias_sh
    if relative is not None:
        relative += b * relative_sb + h * relative_sh
    ii, jj = tl.arange(0, BQ), tl.arange(0, BK)
    i = (i0 + ii)[:, None]
    q_tile = load_rows(q + b * q_sb + h * q_sh, q_st, i0, ii, Tq, D, BD)  # (BQ, D)
    acc = tl.zeros([BQ, BDV], tl.float32)
    m = tl.full([BQ], -INF, tl.float32)
    l = tl.zeros([BQ], tl.float32)
    for piece in range(begin * PIECES, end * PIECES):
        entry = piece // PIECES
        kt, tile = entry, -1
        if LISTED:
            kt, tile = tl.load(cols + entry), tl.load(ids + entry)
        j0 = kt * TILE + (piece - entry * PIECES) * BK
        j = (j0 + jj)[None, :]
        k_tile = load_rows(k, k_st, j0, jj, Tk, D, BD)  # (BK, D)
        v_tile = load_rows(v, v_st, j0, jj, Tk, DV, BDV)  # (BK, DV)
        masked = is_masked(i0, j0, tile, Tk, left, right, offset, BQ, BK)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (BQ, BK)
        s, _ = tile_scores(
            product, i, j, masked, tile, bits, bias, bias_sq, bias_sk, relative, Tq, Tk, left, right, offset, scale, cap,
            SOFTCAP, LISTED,
        )  # fmt: skip
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.maximum(top, LOWEST)
        alpha = tl.exp2(m - shift)  # rescales what was summed under the old maximum
        p = tl.exp2(s - shift[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = top
        if DROPOUT:
            p = tl.where(kept(seed_lo, seed_hi, drop_below, head, i, j), p * keep_scale, 0.0)
        acc = acc * alpha[:, None]
        if masked | (bias is not None):
            wide = v_tile.to(tl.float32)
            if any_of(is_finite(wide) == 0):  # what a query doesn't see must not reach it, not even as 0 * inf
                acc += infinities(s != -INF, wide, v_tile, PRECISION)
                v_tile = tl.where(is_finite(wide), wide, 0.0).to(v_tile.dtype)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    m, l, factor = with_sink(m, l, sinks, h)
    empty = l == 0.0
    acc = tl.where(empty[:, None], 0.0, acc * (factor / tl.where(empty, 1.0, l))[:, None])
    store_rows(o + b * o_sb + h * o_sh, o_st, i0, ii, Tq, DV, BDV, acc)
    if lse is not None:
        log = tl.where(empty, -INF, (m + tl.log2(l)) * LN2)
        at = lse + head.to(tl.int64) * Tq + i0 + ii
        inside = i0 + ii < Tq
        tl.store(at, log, mask=inside)
        rounding = tl.where(empty, 1.0, tl.exp2(log * LOG2E - m) / l)
        tl.store(at + (tl.num_programs(0) // tl.cdiv(Tq, BQ)).to(tl.int64) * Tq, rounding, mask=inside)


class _Problem:
    """What the kernels of both passes take: tensors, strides, numbers, and what is fixed at compile time."""

    def __init__(
        self, q, k, v, bias, relative, sinks, left, right, offset, row_ptr, cols, ids, bits, set_b, set_h, scale, softcap,
        dropout_p, seed,
    ):  # fmt: skip
        self.B, self.H, self.Tq, self.D = q.shape
        self.Hkv, self.Tk, self.Dv = k.shape[1], k.shape[2], v.shape[3]
        if row_ptr is not None:
            rows = set_b * set_h * (triton.cdiv(self.Tq, 64) + triton.cdiv(self.Tk, 64))
            if row_ptr.numel() != rows + 1:
                raise ValueError(
                    f"attention: row_ptr must have {rows + 1} elements, as on_device() makes it; got {row_ptr.numel()}"
                )
        self.tensors = (q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits)
        unlimited = self.Tq + self.Tk + abs(offset)
        band = (min(left, unlimited) if left >= 0 else unlimited, min(right, unlimited) if right >= 0 else unlimited, offset)
        self.sets = set_b * set_h
        sets = (0 if set_b == 1 else set_h, 0 if set_h == 1 else 1)
        bias_strides = (0,) * 4 if bias is None else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride()))
        relative_strides = (0, 0)
        if relative is not None:
            relative_strides = tuple(0 if n == 1 else s for n, s in zip(relative.shape[:2], relative.stride()))
        self.inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.extras = (*bias_strides, *relative_strides, *sets)
        scales = (scale / softcap, softcap * LOG2E.value) if softcap > 0 else (scale * LOG2E.value, 0.0)
        below = min(int(dropout_p * 4294967296.0), 0xFFFFFFFF)
        halves = [(x & 0xFFFFFFFF) - (1 << 32 if x & 0x80000000 else 0) for x in (seed, seed >> 32, below)]
        keep_scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
        self.numbers = (self.H, self.H // max(self.Hkv, 1), self.Tq, self.Tk, *band, *scales, *halves, keep_scale)
        self.scale = scale
        self.shape = {
            "D": self.D, "DV": self.Dv, "BD": max(triton.next_power_of_2(self.D), 16),
            "BDV": max(triton.next_power_of_2(self.Dv), 16), "SOFTCAP": softcap > 0, "DROPOUT": dropout_p > 0,
        }  # fmt: skip
        self.dtype_and_width = q.element_size(), max(self.shape["BD"], self.shape["BDV"])


def fwd_options(itemsize: int, width: int) -> dict[str, int]:
    """Tile, warps and stages of the forward, by what fits in 99 KiB of shared memory; float32, whose FMAs bound it, takes one
    stage. Not measured."""
    if itemsize == 4:
        return {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    return {
        "BQ": 64,
        "BK": 64,
        "num_warps": 4 if width <= 128 else 8,
        "num_stages": 3 if width <= 64 else 2 if width <= 128 else 1,
    }


def bwd_options(itemsize: int, width: int) -> dict[str, int]:
    """The same for the backward, which holds four such tiles and two of sums."""
    if itemsize == 4 or width > 128:
        return {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    return {"BQ": 64, "BK": 64, "num_warps": 4 if width <= 64 else 8, "num_stages": 2 if width <= 64 else 1}


def fwd(q, k, v, bias, relative, sinks, *rest) -> None:
    """As mlc_attention_fwd, with a tile list as _attention_device.on_device() makes it."""
    *schedule_and_numbers, o, lse = rest
    p = _Problem(q, k, v, bias, relative, sinks, *schedule_and_numbers)
    options = fwd_options(*p.dtype_and_width)
    programs = p.B * p.H * triton.cdiv(p.Tq, options["BQ"])
    if programs == 0:
        return
    with torch.cuda.device_of(q):
        fwd_kernel[(programs,)](
            *p.tensors, o, lse, *p.inputs, *o.stride()[:3], *p.extras, *p.numbers, **p.shape, **options
        )  # fmt: skip


def bwd(q, k, v, bias, relative, sinks, *rest) -> None:
    """As mlc_attention_bwd, with a tile list as _attention_device.on_device() makes it."""
    *schedule_and_numbers, o, lse, d_o, d_lse, dq, dk, dv, dbias, drelative, delta = rest
    p = _Problem(q, k, v, bias, relative, sinks, *schedule_and_numbers)
    options = bwd_options(*p.dtype_and_width)
    blocks, key_blocks = triton.cdiv(p.Tq, options["BQ"]), triton.cdiv(p.Tk, options["BK"])
    if p.B * p.H == 0:
        return
    common = (*p.tensors, lse, d_o, delta, *p.inputs, *d_o.stride()[:3], *p.extras, *p.numbers)
    with torch.cuda.device_of(q):
        if blocks > 0:
            row_delta_kernel[(p.B * p.H * blocks,)](
                o, d_o, lse, d_lse, delta, *o.stride()[:3], *d_o.stride()[:3], p.H, p.Tq,
                DV=p.Dv, BDV=p.shape["BDV"], BQ=options["BQ"],
            )  # fmt: skip
            dq_kernel[(p.B * p.H * blocks,)](*common, dq, *dq.stride()[:3], p.scale, **p.shape, **options)
        if key_blocks > 0:
            dkv_kernel[(p.B * p.Hkv * key_blocks,)](
                *common, dk, dv, *dk.stride()[:3], *dv.stride()[:3], p.scale, p.sets, **p.shape, **options
            )  # fmt: skip
        if blocks > 0 and key_blocks > 0 and dbias is not None:
            rows, sums = dbias.shape[2], (p.B // dbias.shape[0], p.H // dbias.shape[1])
            programs = dbias.shape[0] * dbias.shape[1] * triton.cdiv(rows, options["BQ"]) * key_blocks
            ds_sum_kernel[(programs,)](
                *common, dbias, dbias.shape[1], rows, *sums, p.B * p.H * p.Tq, **p.shape, **options, DIAGONAL=False
            )  # fmt: skip
        if blocks > 0 and key_blocks > 0 and drelative is not None:
            block, diagonals = options["BQ"], blocks + key_blocks - 1
            partial = torch.empty(p.B, p.H, diagonals, 2 * block, dtype=torch.float32, device=q.device)
            ds_sum_kernel[(p.B * p.H * diagonals,)](
                *common, partial, p.H, 1, 1, 1, p.B * p.H * p.Tq, **p.shape, **options, DIAGONAL=True
            )  # fmt: skip
            whole = torch.nn.functional.pad(partial[..., :block], (0, 0, 0, 1))
            whole[:, :, 1:] += partial[..., block:]
            first = block * blocks - p.Tq + 1
            drelative.copy_(whole.flatten(2)[:, :, first : first + p.Tq + p.Tk - 1])


_MOST_PROGRAMS = 1 << 14  # beyond, programs take several parts in turns, as attention_decode.cu's blocks do


def decode_options(itemsize: int, width: int) -> dict[str, int]:
    """Keys a step, warps and stages of decoding. Not measured."""
    if itemsize * width >= 1024:
        return {"BK": 16, "num_warps": 4, "num_stages": 2}
    return {"BK": 32 if itemsize == 4 else 64, "num_warps": 4, "num_stages": 2 if itemsize * width >= 512 else 3}


def _cache_arguments(k_cache, v_cache, k_scale, v_scale, page_table):
    """(strides of scales and table, D, Dv, page size, room), and what is fixed at compile time."""
    strides = [s for scale in (k_scale, v_scale) for s in ((0, 0, 0) if scale is None else scale.stride())]
    D, Dv, page_size = k_cache.shape[3], v_cache.shape[3], k_cache.shape[2]
    room = page_size * (1 if page_table is None else page_table.shape[1])
    shape = {"D": D, "DV": Dv, "BD": max(triton.next_power_of_2(D), 16), "BDV": max(triton.next_power_of_2(Dv), 16)}
    return [*strides, 0 if page_table is None else page_table.stride(0)], (k_cache.shape[0], page_size, room), shape


def decode(
    q, k_cache, v_cache, k_scale, v_scale, page_table, lengths, starts, slopes, sinks, left, right, scale, softcap, o, lse,
    scratch,
):  # fmt: skip
    """As mlc_attention_decode on a GPU."""
    B, H, Tq, _ = q.shape
    strides, sizes, shape = _cache_arguments(k_cache, v_cache, k_scale, v_scale, page_table)
    if B * H * Tq == 0:
        return
    Hkv, parts, sums, tops = k_cache.shape[1], 1, None, None
    if scratch is not None:
        parts, flat = scratch.shape[3], scratch.view(-1)
        sums, tops = flat[: B * H * Tq * parts * v_cache.shape[3]], flat[B * H * Tq * parts * v_cache.shape[3] :]
    far = 1 << 30
    left, right = (min(n, far) if n >= 0 else far for n in (left, right))
    scales = (scale / softcap, softcap * LOG2E.value) if softcap > 0 else (scale * LOG2E.value, 0.0)
    slopes_sb = 0 if slopes is None or slopes.shape[0] == 1 else H
    blocks = B * Hkv * triton.cdiv(H // Hkv * Tq, 16)
    turns = min(parts, max(1, min(65535, _MOST_PROGRAMS // blocks)))
    with torch.cuda.device_of(q):
        decode_kernel[(blocks, turns)](
            q, k_cache, v_cache, k_scale, v_scale, page_table, lengths, starts, slopes, sinks, o, lse, sums, tops,
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *o.stride()[:3], *strides, slopes_sb,
            Hkv, H // Hkv, Tq, *sizes, left, right, parts, *scales,
            **shape, **decode_options(q.element_size(), max(shape["BD"], shape["BDV"])), SOFTCAP=softcap > 0,
        )  # fmt: skip
        if parts > 1:
            merge_kernel[(B * H * Tq,)](
                lengths, starts, sinks, o, lse, sums, tops, *o.stride()[:3], H, Tq, sizes[2], left, parts,
                DV=shape["DV"], BDV=shape["BDV"],
            )  # fmt: skip


def append(k, v, page_table, lengths, k_cache, v_cache, k_scale, v_scale) -> None:
    """As mlc_attention_append on a GPU."""
    B, Hkv, count, _ = k.shape
    strides, sizes, shape = _cache_arguments(k_cache, v_cache, k_scale, v_scale, page_table)
    if B * Hkv * count == 0:
        return
    with torch.cuda.device_of(k):
        append_kernel[(B * Hkv * count,)](
            k, v, page_table, lengths, k_cache, v_cache, k_scale, v_scale, *k.stride()[:3], *v.stride()[:3],
            *k_cache.stride()[:3], *v_cache.stride()[:3], *strides, Hkv, count, *sizes, **shape,
        )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("bias", "relative", "sinks", "lse", "d_lse", "delta", "out", "sums", "tops"), "*fp32"),
    **dict.fromkeys(("k_scale", "v_scale", "slopes"), "*fp32"), **dict.fromkeys(("table", "lengths", "starts"), "*i64"),
    **dict.fromkeys(("cols", "ids"), "*i32"), **dict.fromkeys(("row_ptr", "bits"), "*i64"),
    **dict.fromkeys(("scale", "cap", "keep_scale", "q_scale"), "fp32"),
}  # fmt: skip
_TENSORS = ("q", "k", "v", "o", "d_o", "dq", "dk", "dv", "k_cache", "v_cache")
_CACHE_OPTIONAL = ("k_scale", "v_scale", "table", "starts", "slopes")


def _compile_spec(kernel, dtype: str, head_dim: int, given=(), int8=(), **constexprs) -> tuple:
    """A kernel for one dtype and head dim; of the arguments that may be None those named by `given` are there. int8: tensors of
    that type."""
    made = {fwd_kernel: fwd_options, decode_kernel: decode_options}.get(kernel, bwd_options)
    options = {} if kernel in (merge_kernel, append_kernel) else made(4 if dtype == "fp32" else 2, head_dim)
    own = {"D": head_dim, "DV": head_dim, "BD": head_dim, "BDV": head_dim, "SOFTCAP": False, "DROPOUT": False, **options}
    optional = {"bias", "relative", "sinks", "row_ptr", "cols", "ids", "bits", "d_lse", *_CACHE_OPTIONAL} - set(given)
    fixed = {**own, **dict.fromkeys(optional), **constexprs}
    fixed = {name: fixed[name] for name in kernel.arg_names if name in fixed}
    signature = {
        n: "constexpr" if n in fixed else "*i8" if n in int8 else f"*{dtype}" if n in _TENSORS else _TYPES.get(n, "i32")
        for n in kernel.arg_names
    }
    even = [n for n, kind in signature.items() if kind[0] == "*" or n.endswith(("_sb", "_sh", "_st"))]
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}  # as of contiguous tensors
    return kernel, signature, fixed, {k: v for k, v in options.items() if k.startswith("num_")}, attrs


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options, attributes) of the variants that tests compile ahead."""
    listed = ("row_ptr", "cols", "ids", "bits")
    everything = (*listed, "bias", "relative", "sinks", "d_lse")
    ones = {"H": 1, "group": 1, "Tq": 1, "out_heads": 1, "out_rows": 1, "sum_b": 1, "sum_h": 1}  # Triton compiles them in
    return [
        _compile_spec(row_delta_kernel, "bf16", 64, ("d_lse",)),
        _compile_spec(fwd_kernel, "bf16", 64),
        _compile_spec(fwd_kernel, "fp16", 128, everything, SOFTCAP=True, DROPOUT=True),
        _compile_spec(fwd_kernel, "fp32", 64, listed, **ones),
        _compile_spec(dq_kernel, "bf16", 128, listed),
        _compile_spec(dkv_kernel, "bf16", 64, ("relative",), **ones),
        _compile_spec(dkv_kernel, "fp16", 256, everything, SOFTCAP=True, DROPOUT=True),
        _compile_spec(ds_sum_kernel, "bf16", 64, everything, DIAGONAL=False),
        _compile_spec(ds_sum_kernel, "bf16", 64, ("bias",), DIAGONAL=False, **ones),
        _compile_spec(ds_sum_kernel, "fp32", 64, ("relative",), DIAGONAL=True),
        _compile_spec(decode_kernel, "bf16", 128, ("table",)),
        _compile_spec(decode_kernel, "fp16", 256, ("table", "starts", "slopes", "sinks"), SOFTCAP=True),
        _compile_spec(decode_kernel, "fp32", 256),
        _compile_spec(merge_kernel, "bf16", 128, ("starts", "sinks")),
        _compile_spec(append_kernel, "bf16", 128, ("table",)),
        _compile_spec(decode_kernel, "bf16", 128, ("table", "k_scale", "v_scale"), ("k", "v")),
        _compile_spec(append_kernel, "fp16", 64, ("k_scale", "v_scale"), ("k_cache", "v_cache")),
    ]
