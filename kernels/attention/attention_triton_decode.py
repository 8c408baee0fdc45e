"""Attention's Triton kernels over a key-value cache: decoding, the sum of its parts, appending. The equations and what is not
checked are in attention.h; keys are cut at the same positions as by attention_decode.cu, and scratch is the same.

One program works on 16 rows of a (sequence, key head), which are queries of its grouped heads, and a part of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_triton_tile import INF, LN2, LOG2E, LOWEST, any_of, infinities, is_finite, tanh, with_sink

PART = tl.constexpr(256)  # kPart of attention_decode.cuh
ROWS = tl.constexpr(16)
CHAINS = tl.constexpr(8)  # of parts


@triton.jit
def within(x, limit):
    return tl.minimum(tl.maximum(x, 0), limit).to(tl.int32)


@triton.jit
def sequence(lengths, starts, b, Tq, room, left, parts):
    """(length, start, the keys [lo, hi) that some query sees, the first part that they lie in, how many parts: at least 1)."""
    length = within(tl.load(lengths + b), room)
    start = length * 0
    if starts is not None:
        start = within(tl.load(starts + b), room)
    lo = tl.maximum(length - Tq - left, start)
    hi = tl.maximum(length, lo)  # the last query stands at the last key
    first = lo // PART
    count = tl.where(hi > lo, tl.minimum((hi - 1) // PART - first + 1, parts), 1)
    return length, start, lo, hi, first, count


@triton.jit
def find_rows(table, table_sb, b, j, there, page_size, pages):
    """(page, row in it, whether it is there) of positions j."""
    page, row = b + j.to(tl.int64) * 0, j
    if table is not None:
        page = tl.load(table + b * table_sb + j // page_size, mask=there, other=-1)
        row = j % page_size
    return page, row, there & (page >= 0) & (page < pages)


# Nothing is specialised for sizes, so that one binary serves a row whatever is around it.
@triton.jit(do_not_specialize=["Hkv", "group", "Tq", "pages", "page_size", "room", "left", "right", "parts"])
def decode_kernel(
    q, k, v, k_scale, v_scale, table, lengths, starts, slopes, sinks, o, lse, sums, tops,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, ks_sb, ks_sh, ks_st, vs_sb, vs_sh, vs_st,
    table_sb, slopes_sb, Hkv, group, Tq, pages, page_size, room, left, right, parts, scale, cap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a (b, key head) and every num_programs(1)-th part a program."""
    PRECISION: tl.constexpr = "ieee"
    rows = group * Tq
    tiles = tl.cdiv(rows, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, hkv = pair // Hkv, pair % Hkv
    length, start, lo, hi, first, count = sequence(lengths, starts, b, Tq, room, left, parts)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = tl.minimum(row, rows - 1)  # rows beyond the last see what it sees
    t, h = row % Tq, hkv * group + row // Tq
    position = length - Tq + t
    row_lo = tl.maximum(position - left, start)[:, None]
    row_hi = tl.minimum(position + right + 1, length)[:, None]
    at = (b * Hkv * group + h) * Tq + t  # the row's number in (B, H, Tq)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    q_tile = tl.load(
        q + (b * q_sb + h * q_sh + t * q_st)[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
    )
    for n in range(tl.program_id(1), count, tl.num_programs(1)):
        begin, end = tl.maximum(lo, (first + n) * PART), tl.minimum(hi, (first + n + 1) * PART)
        acc = tl.zeros([ROWS, BDV], tl.float32)
        m = tl.full([ROWS], -INF, tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        for j0 in range(begin // BK * BK, end, BK):
            j = j0 + tl.arange(0, BK)
            page, key, there = find_rows(table, table_sb, b, j, (j >= begin) & (j < end), page_size, pages)
            k_at = (page * k_sb + hkv * k_sh + key * k_st)[:, None] + d[None, :]
            v_at = (page * v_sb + hkv * v_sh + key * v_st)[:, None] + dv[None, :]
            k_tile = tl.load(k + k_at, mask=there[:, None] & (d < D)[None, :], other=0).to(q_tile.dtype)  # int8: exact
            v_tile = tl.load(v + v_at, mask=there[:, None] & (dv < DV)[None, :], other=0)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (ROWS, BK)
            if k_scale is not None:
                s *= tl.load(k_scale + page * ks_sb + hkv * ks_sh + key * ks_st, mask=there, other=0.0)[None, :]
                factor = tl.load(v_scale + page * vs_sb + hkv * vs_sh + key * vs_st, mask=there, other=0.0)
                v_tile = (v_tile.to(tl.float32) * factor[:, None]).to(q_tile.dtype)
            s *= scale
            if SOFTCAP:
                s = tanh(s) * cap
            if slopes is not None:
                distance = tl.abs(j[None, :] - position[:, None]).to(tl.float32)
                s -= tl.load(slopes + b * slopes_sb + h)[:, None] * distance * LOG2E
            seen = there[None, :] & (j[None, :] >= row_lo) & (j[None, :] < row_hi)
            s = tl.where(seen, s, -INF)
            top = tl.maximum(m, tl.max(s, 1))
            shift = tl.maximum(top, LOWEST)
            alpha = tl.exp2(m - shift)
            p = tl.exp2(s - shift[:, None])
            l = l * alpha + tl.sum(p, 1)
            m = top
            acc = acc * alpha[:, None]
            if any_of(there[None, :] & (seen == 0)):
                wide = v_tile.to(tl.float32)
                if any_of(is_finite(wide) == 0):  # what one query sees and another doesn't must not reach the other
                    acc += infinities(seen, wide, v_tile, PRECISION)
                    v_tile = tl.where(is_finite(wide), wide, 0.0).to(v_tile.dtype)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        store = inside[:, None] & (dv < DV)[None, :]
        if count == 1:
            finish(o + (b * o_sb + h * o_sh + t * o_st)[:, None] + dv[None, :], store, lse, at, inside, sinks, h, m, l, acc)
        else:
            tl.store(sums + (at * parts + n)[:, None] * DV + dv[None, :], acc, mask=store)
            tl.store(tops + (at * parts + n) * 2, m, mask=inside)
            tl.store(tops + (at * parts + n) * 2 + 1, l, mask=inside)


@triton.jit
def finish(to, store, lse, at, inside, sinks, h, m, l, acc):
    """Rows' maxima, sums of weights and sums of weighted values become their outputs and lse."""
    m, l, factor = with_sink(m, l, sinks, h)
    empty = l == 0.0
    acc = tl.where(empty[:, None], 0.0, acc * (factor / tl.where(empty, 1.0, l))[:, None])
    tl.store(to, acc.to(to.dtype.element_ty), mask=store)
    if lse is not None:
        tl.store(lse + at, tl.where(empty, -INF, (m + tl.log2(l)) * LN2), mask=inside)


@triton.jit(do_not_specialize=["H", "Tq", "room", "left", "parts"])
def merge_kernel(
    lengths, starts, sinks, o, lse, sums, tops, o_sb, o_sh, o_st, H, Tq, room, left, parts,
    DV: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """One row of (B, H, Tq) a program: the sum of its parts. A part's chain follows from its own number."""
    at = tl.program_id(0).to(tl.int64)
    t, h, b = at % Tq, at // Tq % H, at // Tq // H
    _, _, _, _, first, count = sequence(lengths, starts, b, Tq, room, left, parts)
    if count > 1:
        tops += at * parts * 2
        sums += at * parts * DV
        chain, dv = tl.arange(0, CHAINS), tl.arange(0, BDV)
        m = tl.full([CHAINS], -INF, tl.float32)
        for n in range(0, count, CHAINS):
            m = tl.maximum(m, tl.load(tops + (n + chain) * 2, mask=n + chain < count, other=-INF))
        m = tl.full([1], 0.0, tl.float32) + tl.max(m, 0)
        shift = tl.maximum(m, LOWEST)
        acc = tl.zeros([CHAINS, BDV], tl.float32)
        l = tl.zeros([CHAINS], tl.float32)
        for n in range(-(first % CHAINS), count, CHAINS):
            i = n + chain
            there = (i >= 0) & (i < count)
            weight = tl.exp2(tl.load(tops + i * 2, mask=there, other=-INF) - shift)
            l += weight * tl.load(tops + i * 2 + 1, mask=there, other=0.0)
            part = tl.load(sums + i[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
            acc += weight[:, None] * part
        total = tl.full([1], 0.0, tl.float32) + tl.sum(l, 0)
        to = o + b * o_sb + h * o_sh + t * o_st + dv[None, :]
        one = tl.arange(0, 1)
        finish(to, (dv < DV)[None, :], lse, at + one, one == 0, sinks, h + one, m, total, tl.sum(acc, 0)[None, :])


@triton.jit
def append_row(x, cache, scale, D: tl.constexpr, BD: tl.constexpr):
    """One row of x to where it belongs; to an int8 cache with its scale."""
    d = tl.arange(0, BD)
    row = tl.load(x + d, mask=d < D, other=0.0)
    if scale is not None:
        wide = row.to(tl.float32)
        most = tl.max(tl.abs(wide), 0)
        step = tl.div_rn(most, 127.0)
        wide = tl.div_rn(wide, tl.where(most > 0.0, step, 1.0) + wide * 0.0)
        wide = tl.minimum(tl.maximum(wide, -127.0), 127.0)
        row = (wide + 12582912.0) - 12582912.0  # 1.5 * 2^23: to whole numbers, half to even
        tl.store(scale, step)
    tl.store(cache + d, row.to(cache.dtype.element_ty), mask=d < D)


@triton.jit
def append_kernel(
    k, v, table, lengths, k_cache, v_cache, k_scale, v_scale,
    k_sb, k_sh, k_st, v_sb, v_sh, v_st, kc_sb, kc_sh, kc_st, vc_sb, vc_sh, vc_st, ks_sb, ks_sh, ks_st, vs_sb, vs_sh, vs_st,
    table_sb, Hkv, count, pages, page_size, room,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The key and the value of one new position of a (b, key head) a program."""
    n = tl.program_id(0).to(tl.int64)
    t, hkv, b = n % count, n // count % Hkv, n // count // Hkv
    position = tl.load(lengths + b) - count + t
    page, row, there = find_rows(table, table_sb, b, position, (position >= 0) & (position < room), page_size, pages)
    if there:
        if k_scale is not None:
            k_scale += page * ks_sb + hkv * ks_sh + row * ks_st
            v_scale += page * vs_sb + hkv * vs_sh + row * vs_st
        k_at, v_at = page * kc_sb + hkv * kc_sh + row * kc_st, page * vc_sb + hkv * vc_sh + row * vc_st
        append_row(k + b * k_sb + hkv * k_sh + t * k_st, k_cache + k_at, k_scale, D, BD)
        append_row(v + b * v_sb + hkv * v_sh + t * v_st, v_cache + v_at, v_scale, DV, BDV)
