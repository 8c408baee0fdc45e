"""The Triton kernels of aft and their launchers; the equations are in aft.h.

Forward and the gradients of keys are one kernel over sources and sinks. A tile's sums are products of exponentials where that
is exact enough, else every pair has its own; sources outside of a band come as sums over groups of GROUP. All as in aft.cu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import sum_partials, sum_partials_spec

GROUP = tl.constexpr(32)  # sources that are summed together
FLOOR = tl.constexpr(-1e38)  # below every exponent; finite, so that differences of maxima are numbers
REACH = tl.constexpr(40.0)  # exponents of e that may lie between a tile's sum and its scale
INF = tl.constexpr(float("inf"))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def number(x):
    """x, with NaN as FLOOR: maxima leave NaN out."""
    return tl.where(x == x, tl.maximum(x, FLOOR), FLOOR)


@triton.jit
def place(tiles, BD: tl.constexpr):
    """(item, tile of it, features) of a program, where the first axis of the grid has the tiles of all items."""
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), program % tiles, tl.program_id(1) * BD + tl.arange(0, BD)


@triton.jit
def exp3(a, b, c):
    """e^(a + b + c), to which what the sums lose is added: exponents may be large, and roundings of small ones count too."""
    s = a + b
    x = s + c
    t, u = s - a, x - s
    lost = ((a - (s - t)) + (b - t)) + ((s - (x - u)) + (c - u))
    return tl.exp(x) * (1.0 + tl.where(tl.abs(x) < INF, lost, 0.0))


@triton.jit
def weight(bias, t, j, T, S, window, columns, bias_st, CAUSAL: tl.constexpr, BANDED: tl.constexpr):
    """w[t,j] of a head; -inf where the pair doesn't exist."""
    there = (t < T) & (j >= 0) & (j < S)
    if CAUSAL:
        there = there & (j <= t)
    w = tl.where(there, 0.0, -INF)
    if bias is not None:
        c = j
        inside = there
        if BANDED:
            c = j - t + window - 1
            inside = there & (c >= 0) & (c < columns)
        w = tl.where(inside, tl.load(bias + t.to(tl.int64) * bias_st + c, mask=inside, other=0.0), w)
    return w


@triton.jit
def load_source(z, p1, p2, i, d, n, D, z_st, p_st, BACKWARD: tl.constexpr):
    """Rows i of an item's sources: (k, v, 1), a hidden key's value as 0, or (-peak, dy / den, y dy / den)."""
    inside = (i < n)[:, None] & (d < D)[None, :]
    at, row = i.to(tl.int64)[:, None] * z_st + d[None, :], i.to(tl.int64)[:, None] * p_st + d[None, :]
    exponent = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    exponent = tl.where(inside, -exponent if BACKWARD else exponent, -INF)
    first = tl.load(p1 + row, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        second = tl.load(p2 + row, mask=inside, other=0.0)
    else:
        first = tl.where(exponent < FLOOR, 0.0, first)
        second = tl.where(inside, 1.0, 0.0)
    return exponent, first, second


@triton.jit
def sinks_weight(
    bias, x, i, T, S, window, columns, bias_st, CAUSAL: tl.constexpr, BANDED: tl.constexpr, BACKWARD: tl.constexpr
):
    """w of sinks x by sources i."""
    if BACKWARD:
        w = weight(bias, i[None, :], x[:, None], T, S, window, columns, bias_st, CAUSAL, BANDED)
    else:
        w = weight(bias, x[:, None], i[None, :], T, S, window, columns, bias_st, CAUSAL, BANDED)
    return w


@triton.jit
def top_of(v, there, AXIS: tl.constexpr):
    """The largest along an axis, and how far it is from the smallest that is `there`, at worst."""
    top = tl.max(number(v), AXIS)
    reach = top - tl.min(tl.where(there, v, INF), AXIS)
    return top, tl.max(tl.where(top > FLOOR, reach, 0.0), 0)


@triton.jit
def not_finite(z, p1, p2):
    """1 where a source is neither finite nor hidden."""
    return tl.where((z < INF) & (tl.abs(p1) < INF) & (tl.abs(p2) < INF), 0, 1)


@triton.jit
def group_sums_kernel(
    z, p1, p2, sums, n, D, H, groups, z_sb, z_sh, z_st, p_sb, p_sh, p_st, SHIFT: tl.constexpr, BACKWARD: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """sums[item, group + SHIFT] = (peak, n1, n2) of a group of sources."""
    item, group, d = place(groups, BD)
    b, h = item // H, item % H
    i = group * GROUP + tl.arange(0, GROUP)
    z, first, second = load_source(
        z + b * z_sb + h * z_sh, p1 + b * p_sb + h * p_sh, p2 + b * p_sb + h * p_sh if BACKWARD else p2, i, d, n, D, z_st, p_st,
        BACKWARD,
    )  # fmt: skip
    peak = tl.max(number(z), 0)
    e = tl.exp(z - peak[None, :])
    live = (i < n)[:, None]
    at = sums + (item * (groups + 1) + group + SHIFT) * 3 * D + d
    tl.store(at, peak, mask=d < D)
    tl.store(at + D, tl.sum(tl.where(live, e * first, 0.0), 0), mask=d < D)
    tl.store(at + 2 * D, tl.sum(tl.where(live, e * second, 0.0), 0), mask=d < D)


@triton.jit
def load_sum(sums, d, D):
    n1, n2 = tl.load(sums + D + d, mask=d < D, other=0.0), tl.load(sums + 2 * D + d, mask=d < D, other=0.0)
    return tl.load(sums + d, mask=d < D, other=FLOOR), n1, n2


@triton.jit
def store_sum(sums, d, D, peak, n1, n2):
    tl.store(sums + d, peak, mask=d < D)
    tl.store(sums + D + d, n1, mask=d < D)
    tl.store(sums + 2 * D + d, n2, mask=d < D)


@triton.jit
def add_sum(peak, n1, n2, other, m1, m2):
    top = tl.maximum(peak, number(other))
    old, new = tl.exp(peak - top), tl.exp(other - top)
    return top, n1 * old + m1 * new, n2 * old + m2 * new


@triton.jit
def scan_kernel(ahead, behind, D, groups, BD: tl.constexpr):
    """Sums over groups become sums over all groups before (in ahead) and from a group on (in behind)."""
    item, _, d = place(1, BD)
    first, stride = item * (groups + 1) * 3 * D, 3 * D
    if behind is not None:
        peak, n1, n2 = tl.full([BD], FLOOR, tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
        store_sum(behind + first + groups * stride, d, D, peak, n1, n2)
        for i in range(groups):
            g = groups - 1 - i
            if ahead is not None:
                z, m1, m2 = load_sum(ahead + first + (g + 1) * stride, d, D)
            else:
                z, m1, m2 = load_sum(behind + first + g * stride, d, D)
            peak, n1, n2 = add_sum(peak, n1, n2, z, m1, m2)
            store_sum(behind + first + g * stride, d, D, peak, n1, n2)
    if ahead is not None:
        peak, n1, n2 = tl.full([BD], FLOOR, tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
        store_sum(ahead + first, d, D, peak, n1, n2)
        for g in range(1, groups + 1):
            z, m1, m2 = load_sum(ahead + first + g * stride, d, D)
            peak, n1, n2 = add_sum(peak, n1, n2, z, m1, m2)
            store_sum(ahead + first + g * stride, d, D, peak, n1, n2)


@triton.jit
def add_far(sums, group, own, peak, n1, n2, d, D, BACKWARD: tl.constexpr):
    z, m1, m2 = load_sum(sums + group.to(tl.int64) * 3 * D, d, D)
    if BACKWARD:
        f = tl.exp(z[None, :] + own)
        n1 += f * m1[None, :]
        n2 += f * m2[None, :]
    else:
        peak, n1, n2 = add_sum(peak, n1, n2, tl.broadcast_to(z[None, :], peak.shape), m1[None, :], m2[None, :])
    return peak, n1, n2


@triton.jit
def gather_kernel(
    z, p1, p2, bias, ahead, behind, q, k, v, out, out2, y, den, peak_out, T, S, D, H, bias_heads, window, columns, groups,
    z_sb, z_sh, z_st, p_sb, p_sh, p_st, bias_sh, bias_st, q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh,
    o_st,
    CAUSAL: tl.constexpr, BANDED: tl.constexpr, BACKWARD: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr = "tf32x3",
):  # fmt: skip
    """BX sinks of an item: o (out) from q, with y, den and peak where they are wanted; BACKWARD: dk (out) and dv (out2),
    contiguous, from k and v.
    """
    sinks, sources = S if BACKWARD else T, T if BACKWARD else S
    item, tile, d = place(tl.cdiv(sinks, BX), BD)
    b, h = item // H, item % H
    x0 = tile * BX
    x = x0 + tl.arange(0, BX)
    inside = (x < sinks)[:, None] & (d < D)[None, :]
    z, p1 = z + b * z_sb + h * z_sh, p1 + b * p_sb + h * p_sh
    if BACKWARD:
        p2 += b * p_sb + h * p_sh
    if bias is not None:
        bias += tl.where(bias_heads == 1, 0, h) * bias_sh
    # Sources [begin, end) whose weights for a group of sinks are not all exp(z).
    group, most = x0 // GROUP * GROUP, groups * GROUP
    begin, end = group * 0, sources + group * 0
    if BANDED:
        begin = tl.maximum(group - window + 1, 0) // GROUP * GROUP
        end = (group + 2 * GROUP - 2 + window) // GROUP * GROUP
        if bias is None and not CAUSAL:
            begin, end = most + group * 0, most + group * 0
    if CAUSAL:
        if BACKWARD:
            begin = group
        else:
            end = group + GROUP
    begin = tl.minimum(begin, most)
    end = tl.maximum(begin, tl.minimum(end, sources))
    peak = tl.full([BX, BD], FLOOR, tl.float32)
    n1, n2, own = tl.zeros([BX, BD], tl.float32), tl.zeros([BX, BD], tl.float32), peak
    if BACKWARD:
        at = k + b * k_sb + h * k_sh + x.to(tl.int64)[:, None] * k_st + d[None, :]
        own = tl.load(at, mask=inside, other=FLOOR).to(tl.float32)
    for first in range(begin, end, BY):
        i = first + tl.arange(0, BY)
        s, a1, a2 = load_source(z, p1, p2, i, d, sources, D, z_st, p_st, BACKWARD)
        w = sinks_weight(bias, x, i, T, S, window, columns, bias_st, CAUSAL, BANDED, BACKWARD)
        z_top, z_reach = top_of(s, (i < sources)[:, None] & (d < D)[None, :], 0)
        w_top, w_reach = top_of(w, (x < sinks)[:, None] & (i < sources)[None, :], 1)
        wrong = tl.max(tl.max(not_finite(s, a1, a2), 1), 0) + tl.max(tl.max(tl.where(w < INF, 0, 1), 1), 0)
        if (wrong == 0) & ((z_reach <= REACH) | (w_reach <= REACH)):
            e, seen = exp3(s, -z_top[None, :], 0.0), (w_top > FLOOR)[:, None]
            weights = exp3(w, -w_top[:, None], 0.0)
            m1 = tl.dot(weights, e * a1, input_precision=PRECISION)
            m2 = tl.dot(weights, e * a2, input_precision=PRECISION)
            if BACKWARD:
                f = exp3(own, w_top[:, None], z_top[None, :])
            else:
                pair = z_top[None, :] + w_top[:, None]
                top = tl.maximum(peak, pair)
                old = tl.exp(peak - top)
                n1, n2, peak = n1 * old, n2 * old, top
                f = exp3(z_top[None, :], w_top[:, None], -top)
            n1 += tl.where(seen, f * m1, 0.0)
            n2 += tl.where(seen, f * m2, 0.0)
        else:
            last = tl.minimum(first + BY, sources)
            if not BACKWARD:
                top = peak
                for one in range(first, last):
                    i1 = one + tl.arange(0, 1)
                    s1, b1, b2 = load_source(z, p1, p2, i1, d, sources, D, z_st, p_st, BACKWARD)  # (1, BD)
                    w1 = sinks_weight(bias, x, i1, T, S, window, columns, bias_st, CAUSAL, BANDED, BACKWARD)  # (BX, 1)
                    top = tl.maximum(top, tl.where(w1 != -INF, number(s1 + w1), FLOOR))
                old = tl.exp(peak - top)
                n1, n2, peak = n1 * old, n2 * old, top
            for eight in range(first, last, 8):  # sums of sums lose less
                m1, m2 = tl.zeros([BX, BD], tl.float32), tl.zeros([BX, BD], tl.float32)
                for one in range(eight, tl.minimum(eight + 8, last)):
                    i1 = one + tl.arange(0, 1)
                    s1, b1, b2 = load_source(z, p1, p2, i1, d, sources, D, z_st, p_st, BACKWARD)
                    w1 = sinks_weight(bias, x, i1, T, S, window, columns, bias_st, CAUSAL, BANDED, BACKWARD)
                    e1 = exp3(own, w1, s1) if BACKWARD else exp3(s1, w1, -peak)
                    m1 += tl.where(w1 != -INF, e1 * b1, 0.0)
                    m2 += tl.where(w1 != -INF, e1 * b2, 0.0)
                n1 += m1
                n2 += m2
    if ahead is not None:
        peak, n1, n2 = add_far(ahead + item * (groups + 1) * 3 * D, begin // GROUP, own, peak, n1, n2, d, D, BACKWARD)
    if behind is not None:
        behind += item * (groups + 1) * 3 * D
        peak, n1, n2 = add_far(behind, tl.cdiv(end, GROUP), own, peak, n1, n2, d, D, BACKWARD)
    if BACKWARD:
        value = tl.load(v + b * v_sb + h * v_sh + x.to(tl.int64)[:, None] * v_st + d[None, :], mask=inside, other=0.0)
        value = tl.where(own < FLOOR, 0.0, value.to(tl.float32))
        none = n1 * 0.0 + n2 * 0.0  # a key that no query sees gets 0 whatever its value is
        seen = ((n1 > 0.0) | (n1 < 0.0) | (n2 > 0.0) | (n2 < 0.0)) & ~(own < FLOOR)
        at = (item * S + x)[:, None] * D + d[None, :]
        tl.store(out + at, tl.where(seen, value * n1 - n2, none).to(out.dtype.element_ty), mask=inside)
        tl.store(out2 + at, tl.where(seen, n1, none).to(out.dtype.element_ty), mask=inside)
    else:
        mean = tl.where(n2 > 0.0, n1 / n2, n2 * 0.0)
        at = q + b * q_sb + h * q_sh + x.to(tl.int64)[:, None] * q_st + d[None, :]
        gate = sigmoid(tl.load(at, mask=inside, other=0.0).to(tl.float32))
        at = out + b * o_sb + h * o_sh + x.to(tl.int64)[:, None] * o_st + d[None, :]
        tl.store(at, (gate * mean).to(out.dtype.element_ty), mask=inside)
        if y is not None:
            at = (item * T + x)[:, None] * D + d[None, :]
            tl.store(y + at, mean, mask=inside)
            tl.store(den + at, n2, mask=inside)
            tl.store(peak_out + at, tl.where(n2 > 0.0, peak, INF), mask=inside)  # what sees nothing weighs 0


@triton.jit
def queries_kernel(
    q, d_o, y, den, dq, p1, p2, T, D, H, q_sb, q_sh, q_st, d_sb, d_sh, d_st, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """dq, and the payloads of queries as sources: dy / den and y dy / den; all contiguous."""
    item, tile, d = place(tl.cdiv(T, BT), BD)
    t = tile * BT + tl.arange(0, BT)
    b, h = item // H, item % H
    inside = (t < T)[:, None] & (d < D)[None, :]
    row = t.to(tl.int64)[:, None]
    gate = sigmoid(tl.load(q + b * q_sb + h * q_sh + row * q_st + d[None, :], mask=inside, other=0.0).to(tl.float32))
    dy = gate * tl.load(d_o + b * d_sb + h * d_sh + row * d_st + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = (item * T + row) * D + d[None, :]
    mean, sums = tl.load(y + at, mask=inside, other=0.0), tl.load(den + at, mask=inside, other=1.0)
    tl.store(dq + at, (dy * mean * (1.0 - gate)).to(dq.dtype.element_ty), mask=inside)
    first = tl.where(sums > 0.0, dy / sums, dy * (sums * 0.0))
    tl.store(p1 + at, first, mask=inside)
    tl.store(p2 + at, first * mean, mask=inside)


@triton.jit
def exact_pairs(keys, values, k_st, v_st, j, d, D, live, w, z, first, second):
    """Sums over features for queries by keys j, of both, an exponential each; live: (BT, BC, 1)."""
    inside, row, column = live & (d < D)[None, None, :], j.to(tl.int64)[:, :, None], d[None, None, :]
    key = tl.load(keys + row * k_st + column, mask=inside, other=-INF).to(tl.float32)
    value = tl.load(values + row * v_st + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(key < FLOOR, 0.0, value)
    e = exp3(key, w[:, :, None], z[:, None, :])
    term = tl.where(e > 0.0, e * (first[:, None, :] * value - second[:, None, :]), e * 0.0)
    return tl.sum(tl.where(inside, term, 0.0), 2)


@triton.jit
def bias_gradients_kernel(
    k, v, peak, p1, p2, bias, out, T, S, D, H, items, bias_heads, window, columns, parts, k_sb, k_sh, k_st, v_sb, v_sh, v_st,
    bias_sh, bias_st, CAUSAL: tl.constexpr, BANDED: tl.constexpr, SHARED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr = "tf32x3",
):  # fmt: skip
    """The gradient of BT queries by BC columns of a head of the bias over the items that share it, in order. SHARED: queries
    have one row, sums over a part of them in out (parts, heads, columns).
    """
    c, part, head = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(T, BT)
    whole = tl.zeros([BC], tl.float32)
    for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
        t = tile * BT + tl.arange(0, BT)
        j = c[None, :] + t[:, None] * 0
        if BANDED:
            j += t[:, None] - window + 1
        w = weight(bias + head * bias_sh, t[:, None], j, T, S, window, columns, bias_st, CAUSAL, BANDED)
        live = ((w != -INF) & (c < columns)[None, :])[:, :, None]  # (BT, BC, 1)
        total = tl.zeros([BT, BC], tl.float32)
        for n in range(items):
            item = tl.where(bias_heads == 1, n, n * H + head).to(tl.int64)
            b, h = item // H, item % H
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                at, query = (item * T + t[:, None]) * D + d[None, :], (t < T)[:, None] & (d < D)[None, :]
                z = -tl.load(peak + at, mask=query, other=INF)
                first, second = tl.load(p1 + at, mask=query, other=0.0), tl.load(p2 + at, mask=query, other=0.0)
                keys, values = k + b * k_sb + h * k_sh, v + b * v_sb + h * v_sh
                if BANDED:
                    total += exact_pairs(keys, values, k_st, v_st, j, d, D, live, w, z, first, second)
                else:
                    key, value, one = load_source(keys, values, None, c, d, S, D, k_st, v_st, False)
                    top, reach = top_of(key, (c < S)[:, None] & (d < D)[None, :], 0)
                    wrong = tl.max(tl.max(not_finite(key, value, one), 1), 0)
                    wrong += tl.max(tl.max(not_finite(z, first, second), 1), 0)
                    if (wrong == 0) & (reach <= REACH):
                        row_top = tl.max(number(z + top[None, :]), 1)[:, None]
                        e, f = exp3(key, -top[None, :], 0.0), exp3(z, top[None, :], -row_top)
                        sums = tl.dot(f * first, tl.trans(e * value), input_precision=PRECISION)
                        sums -= tl.dot(f * second, tl.trans(e), input_precision=PRECISION)
                        total += tl.where(w != -INF, exp3(w, row_top, 0.0) * sums, 0.0)
                    else:
                        total += exact_pairs(keys, values, k_st, v_st, j, d, D, live, w, z, first, second)
        if SHARED:
            whole += tl.sum(total, 0)
        else:
            at = out + head * bias_sh + t.to(tl.int64)[:, None] * bias_st + c[None, :]
            tl.store(at, total, mask=(t < T)[:, None] & (c < columns)[None, :])
    if SHARED:
        tl.store(out + (part * bias_heads + head) * columns + c, whole, mask=c < columns)


#: Sinks, sources and features of a program. Not measured.
GATHER = {"BX": 32, "BY": 32, "BD": 32}
BIAS = {"BT": 16, "BC": 16, "BD": 32}
QUERIES = {"BT": 16, "BD": 32}
_MAX_PARTS = 32  # of sums over queries


def _rows(t) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else t.stride()[:3]


class _Problem:
    """The numbers of one call, and where sums over groups stand in `work`."""

    def __init__(self, q, k, bias, window, causal, backward, work):
        self.B, self.H, self.T, self.D = q.shape
        self.S, self.items, self.backward = k.shape[2], self.B * self.H, backward
        self.causal, self.banded, self.window = bool(causal), window > 0 or bias is None, window
        self.columns = (window if causal else 2 * window - 1) if window else self.S
        self.bias, self.heads = bias, 0 if bias is None else bias.shape[0]
        self.bias_strides = (0, 0) if bias is None else (bias.stride(0), bias.stride(1) if bias.dim() == 3 else 0)
        self.sources, self.sinks = (self.T, self.S) if backward else (self.S, self.T)
        self.groups, self.across = triton.cdiv(self.sources, GROUP.value), triton.cdiv(self.D, GATHER["BD"])
        wants = (self.banded and not (causal and backward), self.banded and (bool(backward) if causal else window > 0))
        size = self.items * (self.groups + 1) * 3 * self.D
        self.ahead = work[:size] if wants[0] else None
        self.behind = work[size * wants[0] :][:size] if wants[1] else None

    def gather(self, sources, q, k, v, out, out2, stats) -> None:
        """sources: z, p1 and p2 with their strides."""
        z, p1, p2 = sources
        strides = *_rows(z), *_rows(p1)
        sums = self.behind if self.ahead is None else self.ahead
        if sums is not None:
            if self.groups:
                group_sums_kernel[self.items * self.groups, self.across](
                    z, p1, p2, sums, self.sources, self.D, self.H, self.groups, *strides, BACKWARD=self.backward,
                    SHIFT=int(self.ahead is not None), BD=GATHER["BD"],
                )  # fmt: skip
            scan_kernel[self.items, self.across](self.ahead, self.behind, self.D, self.groups, BD=GATHER["BD"])
        if self.sinks:
            gather_kernel[self.items * triton.cdiv(self.sinks, GATHER["BX"]), self.across](
                z, p1, p2, self.bias, self.ahead, self.behind, q, k, v, out, out2, *stats, self.T, self.S, self.D, self.H,
                self.heads, self.window, self.columns, self.groups, *strides, *self.bias_strides, *_rows(q), *_rows(k),
                *_rows(v), *_rows(out), CAUSAL=self.causal, BANDED=self.banded, BACKWARD=self.backward, **GATHER,
            )  # fmt: skip

    def bias_gradients(self, k, v, peak, p1, p2, dbias, work) -> None:
        shared = dbias.dim() == 2
        parts = min(max(triton.cdiv(self.T, GROUP.value), 1), _MAX_PARTS) if shared else triton.cdiv(self.T, BIAS["BT"])
        out = work[: parts * dbias.numel()] if shared else dbias
        grid = triton.cdiv(self.columns, BIAS["BC"]), parts, self.heads
        if min(grid):
            bias_gradients_kernel[grid](
                k, v, peak, p1, p2, self.bias, out, self.T, self.S, self.D, self.H, self.items if self.heads == 1 else self.B,
                self.heads, self.window, self.columns, parts, *_rows(k), *_rows(v), *self.bias_strides, CAUSAL=self.causal,
                BANDED=self.banded, SHARED=shared, **BIAS,
            )  # fmt: skip
        if shared:
            sum_partials(out.view(parts, -1), dbias.view(-1))


def fwd(q, k, v, bias, window, causal, o, y, den, peak, work) -> None:
    """As mlc_aft_fwd."""
    p = _Problem(q, k, bias, window, causal, False, work)
    if p.items * p.T:
        with torch.cuda.device_of(q):
            p.gather((k, v, None), q, None, None, o, None, (y, den, peak))


def bwd(q, k, v, bias, window, causal, y, den, peak, d_o, dq, dk, dv, dbias, work) -> None:
    """As mlc_aft_bwd; payloads of queries have memory of their own."""
    p = _Problem(q, k, bias, window, causal, True, work)
    p1, p2 = torch.empty_like(y), torch.empty_like(y)
    with torch.cuda.device_of(q):
        if p.items * p.T:
            grid = p.items * triton.cdiv(p.T, QUERIES["BT"]), p.across
            queries_kernel[grid](q, d_o, y, den, dq, p1, p2, p.T, p.D, p.H, *_rows(q), *_rows(d_o), **QUERIES)
        if p.items:
            p.gather((peak, p1, p2), None, k, v, dk, dv, (None, None, None))
        if dbias is not None:
            p.bias_gradients(k, v, peak, p1, p2, dbias, work)


_TENSORS = ("q", "k", "v", "d_o", "dq", "out", "out2")
_FLOATS = ("bias", "ahead", "behind", "y", "den", "peak", "peak_out", "sums")


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""

    def spec(kernel, dtype, wide=(), **constexprs):
        def type_of(name):
            if name in constexprs:
                return "constexpr"
            is_float = name in _FLOATS or name in wide
            return "*fp32" if is_float else f"*{dtype}" if name in (*_TENSORS, "z", "p1", "p2") else "i32"

        return kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs, {"num_warps": 4}

    wide = ("z", "p1", "p2")
    precise, bias = ({"PRECISION": "tf32x3", **how} for how in (GATHER, BIAS))
    keys = {"CAUSAL": True, "BACKWARD": False, "p2": None, "k": None, "v": None, "out2": None, **precise}
    queries = {"BACKWARD": True, "q": None, "y": None, "den": None, "peak_out": None, **precise}
    return [
        spec(gather_kernel, "bf16", BANDED=False, ahead=None, behind=None, **keys),
        spec(gather_kernel, "fp32", BANDED=True, bias=None, behind=None, window=0, **keys),
        spec(gather_kernel, "bf16", wide, BANDED=False, CAUSAL=True, ahead=None, behind=None, **queries),
        spec(gather_kernel, "fp16", wide, BANDED=True, CAUSAL=False, **queries),
        spec(group_sums_kernel, "bf16", p2=None, SHIFT=1, BACKWARD=False, BD=32),
        spec(group_sums_kernel, "fp32", wide, SHIFT=0, BACKWARD=True, BD=32),
        spec(scan_kernel, "fp32", BD=32),
        spec(queries_kernel, "bf16", wide, **QUERIES),
        spec(bias_gradients_kernel, "bf16", (*wide, "out"), CAUSAL=True, BANDED=False, SHARED=False, **bias),
        spec(bias_gradients_kernel, "fp32", wide, CAUSAL=False, BANDED=True, SHARED=True, bias_st=0, **bias),
        sum_partials_spec("fp32"),
    ]
