"""The Triton backward kernels of attention; attention_triton.py launches them. Scores are recomputed from lse:
p = exp(s - lse) * factor, ds = p * (dp - delta), with dp = do v^T and delta = <o, do> - d_lse.

dq and (dk, dv) are passes of their own, so that each output has one owner and no sum depends on the order of programs;
ds_sum_kernel computes once more what bias and relative need.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_triton_tile import (
    INF,
    LOG2E,
    TILE,
    any_of,
    find_tile,
    is_finite,
    is_masked,
    kept,
    key_range,
    load_rows,
    query_block,
    query_range,
    store_rows,
    tile_scores,
)

_HASHED = ["seed_lo", "seed_hi", "drop_below"]


@triton.jit
def row_delta_kernel(
    o, d_o, lse, d_lse, delta, o_sb, o_sh, o_st, d_o_sb, d_o_sh, d_o_st, H, Tq,
    DV: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """delta = <o, do> - d_lse for BQ rows a program."""
    blocks = tl.cdiv(Tq, BQ)
    i0, head = tl.program_id(0) % blocks * BQ, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    ii = tl.arange(0, BQ)
    left = load_rows(o + b * o_sb + h * o_sh, o_st, i0, ii, Tq, DV, BDV).to(tl.float32)
    right = load_rows(d_o + b * d_o_sb + h * d_o_sh, d_o_st, i0, ii, Tq, DV, BDV).to(tl.float32)
    total = tl.sum(left * right, 1)
    at, inside = head * Tq + i0 + ii, i0 + ii < Tq
    if d_lse is not None:
        seen = tl.load(lse + at, mask=inside, other=-INF) != -INF
        total -= tl.load(d_lse + at, mask=inside & seen, other=0.0)
    tl.store(delta + at, total, mask=inside)


@triton.jit
def load_statistics(lse, delta, all_rows, at, inside):
    """(lse in log2 units, its factor, delta) of rows; rows that aren't there get p = 0."""
    log = tl.load(lse + at, mask=inside, other=INF)
    factor = tl.load(lse + all_rows + at, mask=inside, other=0.0)
    return tl.where(log == -INF, 0.0, log * LOG2E), factor, tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def tile_gradients(
    product, dp, log, factor, delta, head, i, j, masked, tile, bits, bias, bias_sq, bias_sk, relative, Tq, Tk, left, right,
    offset, scale, cap, seed_lo, seed_hi, drop_below, keep_scale,
    SOFTCAP: tl.constexpr, LISTED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(the weights that v met, ds, the gradient of product / scale) from q k^T and do v^T; log, factor, delta of the rows."""
    s, t = tile_scores(
        product, i, j, masked, tile, bits, bias, bias_sq, bias_sk, relative, Tq, Tk, left, right, offset, scale, cap,
        SOFTCAP, LISTED,
    )  # fmt: skip
    seen = s != -INF
    p = tl.where(seen, tl.exp2(s - log) * factor, 0.0)
    used = p
    if DROPOUT:
        keep = kept(seed_lo, seed_hi, drop_below, head, i, j)
        used = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = tl.where(seen, p * (dp - delta), 0.0)
    dx = ds
    if SOFTCAP:
        dx = tl.where(seen, ds * (1.0 - t * t), 0.0)
    return used, ds, dx


@triton.jit(do_not_specialize=_HASHED)
def dq_kernel(
    q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits, lse, d_o, delta,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, d_o_sb, d_o_sh, d_o_st,
    bias_sb, bias_sh, bias_sq, bias_sk, relative_sb, relative_sh, set_sb, set_sh,
    H, group, Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi, drop_below, keep_scale,
    dq, dq_sb, dq_sh, dq_st, q_scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """BQ queries of one head a program, as fwd_kernel."""
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
    d_o_tile = load_rows(d_o + b * d_o_sb + h * d_o_sh, d_o_st, i0, ii, Tq, DV, BDV)  # (BQ, DV)
    all_rows = (tl.num_programs(0) // tl.cdiv(Tq, BQ)).to(tl.int64) * Tq
    log, factor, rows = load_statistics(lse, delta, all_rows, head.to(tl.int64) * Tq + i0 + ii, i0 + ii < Tq)
    log, factor, rows = log[:, None], factor[:, None], rows[:, None]
    acc = tl.zeros([BQ, BD], tl.float32)
    for piece in range(begin * PIECES, end * PIECES):
        entry = piece // PIECES
        kt, tile = entry, -1
        if LISTED:
            kt, tile = tl.load(cols + entry), tl.load(ids + entry)
        j0 = kt * TILE + (piece - entry * PIECES) * BK
        k_tile = load_rows(k, k_st, j0, jj, Tk, D, BD)  # (BK, D)
        v_tile = load_rows(v, v_st, j0, jj, Tk, DV, BDV)  # (BK, DV)
        masked = is_masked(i0, j0, tile, Tk, left, right, offset, BQ, BK)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (BQ, BK)
        dp = tl.dot(d_o_tile, tl.trans(v_tile), input_precision=PRECISION)
        _, _, dx = tile_gradients(
            product, dp, log, factor, rows, head, i, (j0 + jj)[None, :], masked, tile, bits, bias, bias_sq, bias_sk, relative,
            Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi, drop_below, keep_scale, SOFTCAP, LISTED, DROPOUT,
        )  # fmt: skip
        if masked | (bias is not None):
            wide = k_tile.to(tl.float32)
            if any_of(is_finite(wide) == 0):  # unseen: must not meet 0; seen: dx already is NaN
                k_tile = tl.where(is_finite(wide), wide, 0.0).to(k_tile.dtype)
        acc = tl.dot(dx.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq + b * dq_sb + h * dq_sh, dq_st, i0, ii, Tq, D, BD, acc * q_scale)


@triton.jit(do_not_specialize=_HASHED)
def dkv_kernel(
    q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits, lse, d_o, delta,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, d_o_sb, d_o_sh, d_o_st,
    bias_sb, bias_sh, bias_sq, bias_sk, relative_sb, relative_sh, set_sb, set_sh,
    H, group, Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi, drop_below, keep_scale,
    dk, dv, dk_sb, dk_sh, dk_st, dv_sb, dv_sh, dv_st, q_scale, sets,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """BK keys of one key head a program; scores are (keys, queries), so that p and ds are left operands as they come."""
    LISTED: tl.constexpr = row_ptr is not None
    PRECISION: tl.constexpr = "ieee"
    PIECES: tl.constexpr = TILE // BQ
    blocks = tl.cdiv(Tk, BK)
    j0, pair = tl.program_id(0) % blocks * BK, tl.program_id(0) // blocks
    key_heads = H // group
    b, hkv = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    ii, jj = tl.arange(0, BQ), tl.arange(0, BK)
    j = (j0 + jj)[:, None]
    k_tile = load_rows(k + b * k_sb + hkv * k_sh, k_st, j0, jj, Tk, D, BD)  # (BK, D)
    v_tile = load_rows(v + b * v_sb + hkv * v_sh, v_st, j0, jj, Tk, DV, BDV)  # (BK, DV)
    all_rows = (tl.num_programs(0) // blocks).to(tl.int64) * group * Tq
    dk_acc = tl.zeros([BK, BD], tl.float32)
    dv_acc = tl.zeros([BK, BDV], tl.float32)
    for g in range(group):
        h = hkv * group + g
        head = b * H + h
        bias_h, relative_h = bias, relative
        if bias is not None:
            bias_h = bias + b * bias_sb + h * bias_sh
        if relative is not None:
            relative_h = relative + b * relative_sb + h * relative_sh
        begin, end = query_range(j0 // TILE, Tq, Tk, left, right, offset)
        if LISTED:  # the rows of key tiles follow those of query tiles
            row = sets * tl.cdiv(Tq, TILE) + (b * set_sb + h * set_sh) * tl.cdiv(Tk, TILE) + j0 // TILE
            begin, end = tl.load(row_ptr + row).to(tl.int32), tl.load(row_ptr + row + 1).to(tl.int32)
        for piece in range(begin * PIECES, end * PIECES):
            entry = piece // PIECES
            qt, tile = entry, -1
            if LISTED:
                qt, tile = tl.load(cols + entry), tl.load(ids + entry)
            i0 = qt * TILE + (piece - entry * PIECES) * BQ
            q_tile = load_rows(q + b * q_sb + h * q_sh, q_st, i0, ii, Tq, D, BD)  # (BQ, D)
            d_o_tile = load_rows(d_o + b * d_o_sb + h * d_o_sh, d_o_st, i0, ii, Tq, DV, BDV)  # (BQ, DV)
            log, factor, rows = load_statistics(lse, delta, all_rows, head * Tq + i0 + ii, i0 + ii < Tq)
            masked = is_masked(i0, j0, tile, Tk, left, right, offset, BQ, BK)
            product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # (BK, BQ)
            dp = tl.dot(v_tile, tl.trans(d_o_tile), input_precision=PRECISION)
            used, _, dx = tile_gradients(
                product, dp, log[None, :], factor[None, :], rows[None, :], head, (i0 + ii)[None, :], j, masked, tile, bits,
                bias_h, bias_sq, bias_sk, relative_h, Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi, drop_below,
                keep_scale, SOFTCAP, LISTED, DROPOUT,
            )  # fmt: skip
            dv_acc = tl.dot(used.to(d_o_tile.dtype), d_o_tile, dv_acc, input_precision=PRECISION)
            dk_acc = tl.dot(dx.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_rows(dk + b * dk_sb + hkv * dk_sh, dk_st, j0, jj, Tk, D, BD, dk_acc * q_scale)
    store_rows(dv + b * dv_sb + hkv * dv_sh, dv_st, j0, jj, Tk, DV, BDV, dv_acc)


@triton.jit(do_not_specialize=_HASHED)
def ds_sum_kernel(
    q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits, lse, d_o, delta,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, d_o_sb, d_o_sh, d_o_st,
    bias_sb, bias_sh, bias_sq, bias_sk, relative_sb, relative_sh, set_sb, set_sh,
    H, group, Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi, drop_below, keep_scale,
    out, out_heads, out_rows, sum_b, sum_h, all_rows,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """ds summed over all that shares one place of the bias: out (b, h, Tq|1, Tk), whose head is the sum of sum_b sequences and
    sum_h heads; or, where DIAGONAL, along a diagonal of blocks: out (b, h, diagonals, 2 BQ), at j - i + BQ within a block."""
    LISTED: tl.constexpr = row_ptr is not None
    PRECISION: tl.constexpr = "ieee"
    q_blocks, k_blocks = tl.cdiv(Tq, BQ), tl.cdiv(Tk, BK)
    ii, jj = tl.arange(0, BQ), tl.arange(0, BK)
    if DIAGONAL:
        diagonals = q_blocks + k_blocks - 1
        ahead, place = tl.program_id(0) % diagonals - (q_blocks - 1), tl.program_id(0) // diagonals
        q_first, k_first = tl.maximum(-ahead, 0), tl.maximum(ahead, 0)
        along = tl.minimum(q_blocks - q_first, k_blocks - k_first)
    else:
        k_first, rest = tl.program_id(0) % k_blocks, tl.program_id(0) // k_blocks
        out_blocks = tl.cdiv(out_rows, BQ)
        q_first, place = rest % out_blocks, rest // out_blocks
        along = tl.where(out_rows == 1, q_blocks, 1)
    acc = tl.zeros([BQ, BK], tl.float32)
    for n in range(sum_b * sum_h * along):
        b = place // out_heads + n // along // sum_h
        h = place % out_heads + n // along % sum_h
        b, h = b.to(tl.int64), h.to(tl.int64)
        i0 = (q_first + n % along) * BQ
        j0 = k_first * BK
        if DIAGONAL:
            j0 += n * BK
        begin, end = key_range(i0 // TILE, Tq, Tk, left, right, offset)
        tile, visited = -1, (j0 // TILE >= begin) & (j0 // TILE < end)
        if LISTED:
            row = (b * set_sb + h * set_sh) * tl.cdiv(Tq, TILE) + i0 // TILE
            entry, visited = find_tile(row_ptr, cols, row, j0 // TILE)
            tile = tl.load(ids + entry, mask=visited, other=-1)
        if visited:
            bias_h, relative_h = bias, relative
            if bias is not None:
                bias_h = bias + b * bias_sb + h * bias_sh
            if relative is not None:
                relative_h = relative + b * relative_sb + h * relative_sh
            head = b * H + h
            q_tile = load_rows(q + b * q_sb + h * q_sh, q_st, i0, ii, Tq, D, BD)
            k_tile = load_rows(k + b * k_sb + h // group * k_sh, k_st, j0, jj, Tk, D, BD)
            v_tile = load_rows(v + b * v_sb + h // group * v_sh, v_st, j0, jj, Tk, DV, BDV)
            d_o_tile = load_rows(d_o + b * d_o_sb + h * d_o_sh, d_o_st, i0, ii, Tq, DV, BDV)
            log, factor, rows = load_statistics(lse, delta, all_rows, head * Tq + i0 + ii, i0 + ii < Tq)
            masked = is_masked(i0, j0, tile, Tk, left, right, offset, BQ, BK)
            product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            dp = tl.dot(d_o_tile, tl.trans(v_tile), input_precision=PRECISION)
            _, ds, _ = tile_gradients(
                product, dp, log[:, None], factor[:, None], rows[:, None], head, (i0 + ii)[:, None], (j0 + jj)[None, :], masked,
                tile, bits, bias_h, bias_sq, bias_sk, relative_h, Tq, Tk, left, right, offset, scale, cap, seed_lo, seed_hi,
                drop_below, keep_scale, SOFTCAP, LISTED, DROPOUT,
            )  # fmt: skip
            acc += ds
    if DIAGONAL:
        to = out + tl.program_id(0).to(tl.int64) * (2 * BQ) + jj
        below, above = jj[None, :] + ii[:, None] - BQ, jj[None, :] + ii[:, None]  # the columns of row i on diagonal j, BQ + j
        lower = tl.gather(acc, tl.maximum(below, 0), 1)
        upper = tl.gather(acc, tl.minimum(above, BK - 1), 1)
        tl.store(to, tl.sum(tl.where(below >= 0, lower, 0.0), 0))
        tl.store(to + BQ, tl.sum(tl.where(above < BK, upper, 0.0), 0))
    else:
        to = out + place.to(tl.int64) * out_rows * Tk + k_first * BK + jj
        inside = k_first * BK + jj < Tk
        if out_rows == 1:
            tl.store(to, tl.sum(acc, 0), mask=inside)
        else:
            i = q_first * BQ + ii
            tl.store(to[None, :] + i.to(tl.int64)[:, None] * Tk, acc, mask=(i < out_rows)[:, None] & inside[None, :])
