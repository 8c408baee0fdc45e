"""What attention's Triton kernels share about a tile: its loads, scores, mask, dropout, and products with infinities.

Positions come as 2-D tensors i (queries) and j (keys) of which one is a column and one a row: the same text serves tiles
(queries, keys) and (keys, queries). Scores are in units of log2. An unseen pair's score is -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # as attention_schedule.h
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234e38)  # stands in for a maximum of -inf: exp2(-inf - LOWEST) is 0
INF = tl.constexpr(float("inf"))


@triton.jit
def load_rows(base, stride, first, rows, limit, D: tl.constexpr, BD: tl.constexpr):
    """(rows, BD) of x (limit, D) from row `first`: zero beyond its rows and columns."""
    d = tl.arange(0, BD)
    inside = (first + rows < limit)[:, None]
    if D != BD:
        inside = inside & (d < D)[None, :]
    return tl.load(base + (first + rows).to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, first, rows, limit, D: tl.constexpr, BD: tl.constexpr, x):
    """The counterpart of load_rows; rounds to the pointer's type."""
    d = tl.arange(0, BD)
    inside = (first + rows < limit)[:, None] & (d < D)[None, :]
    at = base + (first + rows).to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """To a few roundings of float32: an odd polynomial (Cephes' tanhf coefficients) near 0, else by exp2."""
    z = x * x
    poly = -5.70498872745e-3 * z + 2.06390887954e-2
    poly = poly * z - 5.37397155531e-2
    poly = poly * z + 1.33314422036e-1
    poly = poly * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(tl.minimum(tl.maximum(x, -9.02), 9.02) * (2.0 * LOG2E)) + 1.0)
    return tl.where(x != x, x, tl.where(z < 0.390625, poly * z * x + x, far))


@triton.jit
def hash32(x):
    """attention_dropout.h's mix of 32 bits."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(seed_lo, seed_hi, drop_below, head, i, j):
    """True where dropout keeps (i, j); seed and bound are 32 bits each, of whatever sign."""
    key = hash32(seed_lo.to(tl.uint32) ^ (head + i * 0).to(tl.uint32))
    key = hash32(key ^ seed_hi.to(tl.uint32) ^ i.to(tl.uint32))
    return hash32(key ^ j.to(tl.uint32)) >= drop_below.to(tl.uint32)


@triton.jit
def key_range(qt, Tq, Tk, left, right, offset):
    """Key tiles [begin, end) that the band lets query tile qt see."""
    last_query = tl.minimum(qt * TILE + TILE, Tq) - 1
    begin = tl.maximum(qt * TILE + offset - left, 0) // TILE
    return begin, (tl.minimum(tl.maximum(last_query + offset + right + 1, 0), Tk) + TILE - 1) // TILE


@triton.jit
def query_range(kt, Tq, Tk, left, right, offset):
    """Query tiles [begin, end) that the band lets see some key of tile kt."""
    last_key = tl.minimum(kt * TILE + TILE, Tk) - 1
    begin = tl.maximum(kt * TILE - offset - right, 0) // TILE
    return begin, (tl.minimum(tl.maximum(last_key - offset + left + 1, 0), Tq) + TILE - 1) // TILE


@triton.jit
def query_block(row_ptr, set_sb, set_sh, H, Tq, Tk, left, right, offset, BQ: tl.constexpr):
    """(first query, b * H + h, b, h, begin, end) of a program over BQ queries: the tiles it visits, or entries of the list.
    The last queries of a head, which causal attention makes the longest, begin."""
    blocks = tl.cdiv(Tq, BQ)
    i0, head = (blocks - 1 - tl.program_id(0) % blocks) * BQ, tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    begin, end = key_range(i0 // TILE, Tq, Tk, left, right, offset)
    if row_ptr is not None:
        row = (b * set_sb + h * set_sh) * tl.cdiv(Tq, TILE) + i0 // TILE
        begin, end = tl.load(row_ptr + row).to(tl.int32), tl.load(row_ptr + row + 1).to(tl.int32)
    return i0, head, b, h, begin, end


@triton.jit
def is_masked(i0, j0, tile, Tk, left, right, offset, BQ: tl.constexpr, BK: tl.constexpr):
    """Whether some of BQ queries from i0 doesn't see some of BK keys from j0, or the keys end there."""
    ahead = j0 - i0 - offset
    return (tile >= 0) | (ahead - (BQ - 1) < -left) | (ahead + (BK - 1) > right) | (j0 + BK > Tk)


@triton.jit
def tile_scores(
    product, i, j, masked, tile, bits, bias, bias_sq, bias_sk, relative, Tq, Tk, left, right, offset, scale, cap,
    SOFTCAP: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """(scores, tanh of the softcap's argument) of a tile from its raw products; bias and relative are the head's."""
    t = product * scale
    s = t
    if SOFTCAP:
        t = tanh(t)
        s = t * cap
    if bias is not None:
        inside = (i < Tq) & (j < Tk)
        b = tl.load(bias + i.to(tl.int64) * bias_sq + j * bias_sk, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(b == -INF, -INF, s + b * LOG2E)
    if relative is not None:
        s += tl.load(relative + (j - i + (Tq - 1)), mask=(i < Tq) & (j < Tk), other=0.0) * LOG2E
    if masked:
        ahead = j - i - offset
        seen = (ahead >= -left) & (ahead <= right) & (j < Tk)
        if LISTED:
            at = tl.maximum(tile, 0).to(tl.int64) * TILE + j % TILE
            word = tl.load(bits + at, mask=j * 0 + tile >= 0, other=-1)
            seen = seen & (((word >> (i % TILE)) & 1) != 0)
        s = tl.where(seen, s, -INF)
    return s, t


@triton.jit
def with_sink(m, l, sinks, h):
    """A row's maximum and sum of weights with head h's sink, a score without a value, and what rescales earlier sums."""
    m = tl.where(l == 0.0, -INF, m)
    factor = tl.zeros_like(l) + 1.0
    if sinks is not None:
        sink = tl.load(sinks + h) * LOG2E
        top = tl.maximum(m, sink)
        factor = tl.exp2(m - top)
        l = l * factor + tl.exp2(sink - top)
        m = top
    return m, l, factor


@triton.jit
def is_finite(x):
    """Elementwise: neither infinite nor NaN."""
    return tl.abs(x) < INF


@triton.jit
def any_of(x):
    """Whether some element of a 2-D boolean tensor holds."""
    return tl.max(tl.max(x.to(tl.int32), 1), 0) > 0


@triton.jit
def infinities(seen, x, like, PRECISION: tl.constexpr):
    """What products of positive weights with the infinities and NaNs of x (keys, columns) add up to, for seen (queries, keys):
    0, +-inf or NaN. One product, in like's type, counts them all: at most 64 of each, weighted 1, 128 and 16384."""
    code = tl.where(x == INF, 1.0, tl.where(x == -INF, 128.0, tl.where(x != x, 16384.0, 0.0))).to(like.dtype)
    count = tl.dot(seen.to(like.dtype), code, input_precision=PRECISION).to(tl.int32)
    nan = (count >= 16384) | ((count % 128 > 0) & (count % 16384 >= 128))
    return tl.where(nan, float("nan"), tl.where(count % 128 > 0, INF, tl.where(count >= 128, -INF, 0.0)))


@triton.jit
def find_tile(row_ptr, cols, row, kt):
    """(the entry of key tile kt in a row of the list, whether it is there)."""
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    lo, hi = begin, end
    while lo < hi:
        mid = (lo + hi) // 2
        below = tl.load(cols + mid) < kt
        lo = tl.where(below, mid + 1, lo)
        hi = tl.where(below, hi, mid)
    found = lo < end
    return lo, found & (tl.load(cols + lo, mask=found, other=-1) == kt)
