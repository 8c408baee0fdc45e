"""What the Triton kernels of linear_attention share: operands, feature maps, and the scores of one chunk. No kernel is here."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_GATE = tl.constexpr(-200.0)  # what is lower forgets as completely in float32


@triton.jit
def row(x, i, rows):
    """x[i, :] of x (N, M), rows = 0 .. N-1 as (N, 1); other rows may be NaN."""
    return tl.sum(tl.where(rows == i, x, 0.0), 0)


@triton.jit
def mapped(x, d, inside, D, MAP: tl.constexpr):
    """phi(x) for x (BT, BD) float32; 0 outside."""
    if MAP == 1:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))  # tl.minimum would lose NaN
    elif MAP == 2:
        x = tl.where(x < 0, 0.0, x)
    elif MAP == 3:
        x = tl.where(d < D, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        x = x / tl.sum(x, 1)[:, None]
    return tl.where(inside, x, 0.0)


@triton.jit
def map_gradient(x, dy, d, D, MAP: tl.constexpr):
    """The gradient of mapped() for x, whose output has gradient dy."""
    if MAP == 1:
        dy = tl.where(x > 0, dy, dy * tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == 2:
        dy = tl.where(x > 0, dy, 0.0)
    elif MAP == 3:
        y = mapped(x, d, d < D, D, 3)
        dy = y * (dy - tl.sum(dy * y, 1)[:, None])
    return dy


@triton.jit
def bounds(cu, n, T):
    """(batch entry, first token, end) of sequence n."""
    b, begin, end = n, n * 0, n * 0 + T
    if cu is not None:
        b = n * 0
        begin = tl.minimum(tl.maximum(tl.load(cu + n), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu + n + 1), begin), T)
    return b, begin, end


@triton.jit
def load_values(x, t, st, c, cols, end):
    """(BT, BC) float32 of a row-major operand; 0 outside."""
    return tl.load(x + t * st + c, mask=(t < end) & (c < cols), other=0.0).to(tl.float32)


@triton.jit
def load_gate(gate, t, st, d, D, end, GATE: tl.constexpr):
    """(BT, BD) or (BT, 1) log gates."""
    g = t * 0.0
    if GATE == 1:
        g = tl.load(gate + t * st, mask=t < end, other=0.0).to(tl.float32)
    if GATE == 2:
        g = load_values(gate, t, st, d, D, end)
    return tl.where(g < LEAST_GATE, LEAST_GATE, g)


@triton.jit
def score(
    q, k, g, BT: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(A, W, F, to_token, from_token, whole): scores of queries and, strictly below, of keys with keys; their common decay with
    a scalar gate; the decay from the chunk's start to a token, from a token to its end, and over it all (BD)."""
    rows, cols = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    W = tl.zeros([BT, BT], tl.float32)
    F = tl.zeros([BT, BT], tl.float32) + 1.0
    to_token = tl.zeros([BT, 1], tl.float32) + 1.0
    from_token = to_token
    whole = tl.zeros([BD], tl.float32) + 1.0
    if GATE == 2:
        A = tl.zeros([BT, BT], tl.float32)
        path = tl.zeros([BT, BD], tl.float32)  # the sum of gates after token j up to this one
        from_token = tl.zeros([BT, BD], tl.float32)
        for step in range(BT):
            j = BT - 1 - step
            path = tl.where(rows > j, path + row(g, j + 1, rows)[None, :], 0.0)
            factor = tl.exp(path) * row(k, j, rows)[None, :]
            A = tl.where((cols == j) & (rows >= j), tl.sum(q * factor, 1)[:, None], A)
            if DELTA:
                W = tl.where((cols == j) & (rows > j), tl.sum(k * factor, 1)[:, None], W)
            from_token = tl.where(rows == j, row(path, BT - 1, rows)[None, :], from_token)
        path += row(g, 0, rows)[None, :]
        to_token, from_token, whole = tl.exp(path), tl.exp(from_token), tl.exp(row(path, BT - 1, rows))
    else:
        if GATE == 1:
            wide = tl.sum(g.to(tl.float64), 1)  # (BT)
            b = tl.cumsum(wide, 0)
            last = tl.sum(wide, 0)
            F = tl.exp(tl.where(rows >= cols, b[:, None] - b[None, :], 0.0).to(tl.float32))
            to_token = tl.exp(b.to(tl.float32))[:, None]
            from_token = tl.exp((last - b).to(tl.float32))[:, None]
            whole = tl.exp(tl.zeros([BD], tl.float32) + last.to(tl.float32))
        A = tl.where(rows >= cols, tl.dot(q, tl.trans(k), input_precision=PRECISION) * F, 0.0)
        if DELTA:
            W = tl.where(rows > cols, tl.dot(k, tl.trans(k), input_precision=PRECISION) * F, 0.0)
    return A, W, F, to_token, from_token, whole


@triton.jit
def solve(W, x, strength, BT: tl.constexpr):
    """u with u[i] = strength[i] (x[i] - sum over j < i of W[i, j] u[j]); strength (BT, 1)."""
    rows = tl.arange(0, BT)[:, None]
    u = strength * x
    for i in range(1, BT):
        w = row(W, i, rows)[:, None]  # (BT, 1), over j
        u = tl.where(rows == i, u - strength * tl.sum(tl.where(rows < i, w * u, 0.0), 0)[None, :], u)
    return u


@triton.jit
def solve_transposed(W, x, strength, BT: tl.constexpr):
    """y with y[j] = x[j] - sum over i > j of W[i, j] strength[i] y[i]."""
    rows = tl.arange(0, BT)[:, None]
    cols = tl.arange(0, BT)[None, :]
    y = x
    for step in range(1, BT):
        j = BT - 1 - step
        w = tl.sum(tl.where(cols == j, W, 0.0), 1)[:, None]  # (BT, 1), over i
        y = tl.where(rows == j, y - tl.sum(tl.where(rows > j, w * strength * y, 0.0), 0)[None, :], y)
    return y


@triton.jit
def load_state(state, d, c, D, cols, width):
    return tl.load(state + d[:, None] * width + c, mask=(d[:, None] < D) & (c < cols), other=0.0)


@triton.jit
def store_state(to, d, c, S, z, block, D, Dv, width, NORMALIZE: tl.constexpr, BD: tl.constexpr):
    """A block of values' S (BD, BV), and the first block's z (BD) of the denominators behind them."""
    tl.store(to + d[:, None] * width + c, S, mask=(d[:, None] < D) & (c < Dv))
    if NORMALIZE:
        tl.store(to + d * width + Dv, z, mask=d + block * BD < D)


@triton.jit
def divide_gradient(do, o, den, t, dt, ot, c, Dv, end, BV: tl.constexpr):
    """(numerators' gradient (BT, BV), denominator's (BT)) from that of o; 0 where den is 0. den: of these tokens (BT)."""
    ok = den != 0.0
    scale = tl.where(ok, 1.0 / tl.where(ok, den, 1.0), 0.0)
    total = tl.zeros_like(den)
    for first in range(0, Dv, BV):
        e = first + tl.arange(0, BV)[None, :]
        total += tl.sum(load_values(do, t, dt, e, Dv, end) * load_values(o, t, ot, e, Dv, end), 1)
    return load_values(do, t, dt, c, Dv, end) * scale[:, None], -total * scale
