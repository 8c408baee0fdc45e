"""The Triton kernels of linear_attention that is not causal: one state over all keys, read by every query."""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_attention_triton_chunk import bounds, divide_gradient, load_state, load_values, mapped, store_state


@triton.jit
def full_kernel(
    q, k, v, initial, cu, o, den, final, H, Tq, Tk, D, Dv, width,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Not causal: the state over all keys, then what every query reads."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, h = item // H, item % H
    b, begin, end = bounds(cu, n, Tk)
    d, c = tl.arange(0, BD), block * BV + tl.arange(0, BV)[None, :]
    q, k, v, o = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, o + b * ob + h * oh
    S, z = tl.zeros([BD, BV], tl.float32), tl.zeros([BD], tl.float32)
    if initial is not None:
        S = load_state(initial + item * D * width, d, c, D, Dv, width)
        if NORMALIZE:
            z = tl.load(initial + item * D * width + d * width + Dv, mask=d < D, other=0.0)
    for first in range(begin, end, BT):
        t = first + tl.arange(0, BT)[:, None]
        inside = (t < end) & (d[None, :] < D)
        k_t = mapped(load_values(k, t, kt, d[None, :], D, end), d[None, :], inside, D, MAP)
        S += tl.dot(tl.trans(k_t), load_values(v, t, vt, c, Dv, end), input_precision=PRECISION)
        z += tl.sum(k_t, 0)
    store_state(final + item * D * width, d, c, S, z, block, D, Dv, width, NORMALIZE, BD)
    b, begin, end = bounds(cu, n, Tq)
    for first in range(begin, end, BT):
        t = first + tl.arange(0, BT)[:, None]
        inside = (t < end) & (d[None, :] < D)
        q_t = mapped(load_values(q, t, qt, d[None, :], D, end), d[None, :], inside, D, MAP)
        out = tl.dot(q_t, S, input_precision=PRECISION)
        if NORMALIZE:
            weight = tl.sum(q_t * z[None, :], 1)
            out = tl.where(weight[:, None] == 0.0, 0.0, out / tl.where(weight == 0.0, 1.0, weight)[:, None])
            ts = first + tl.arange(0, BT)
            tl.store(den + (b * H + h) * Tq + ts, weight, mask=ts + block * Tq < end)
        tl.store(o + t * ot + c, out, mask=(t < end) & (c < Dv))


@triton.jit
def full_bwd_kernel(
    q, k, v, cu, o, den, final, do, dfinal, dq, dk, dv, dinitial, H, Tq, Tk, D, Dv, width, q_part, k_part,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, db, dh, dt,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Not causal: the state's gradient over all queries, then that of every key. dq, dk: as bwd_kernel's."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, h = item // H, item % H
    b, begin, end = bounds(cu, n, Tq)
    head = b * H + h
    d, c = tl.arange(0, BD), block * BV + tl.arange(0, BV)[None, :]
    q, k, v, o = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, o + b * ob + h * oh
    do += b * db + h * dh
    dq, dk, dv = dq + block * q_part + head * Tq * D, dk + block * k_part + head * Tk * D, dv + head * Tk * Dv
    S, z = load_state(final + item * D * width, d, c, D, Dv, width), tl.zeros([BD], tl.float32)
    dS, dz = tl.zeros([BD, BV], tl.float32), tl.zeros([BD], tl.float32)
    if dfinal is not None:
        dS = load_state(dfinal + item * D * width, d, c, D, Dv, width)
    if NORMALIZE:
        z = tl.load(final + item * D * width + d * width + Dv, mask=d < D, other=0.0)
        if dfinal is not None:
            dz = tl.load(dfinal + item * D * width + d * width + Dv, mask=d + block * BD < D, other=0.0)
    for first in range(begin, end, BT):
        t = first + tl.arange(0, BT)[:, None]
        inside = (t < end) & (d[None, :] < D)
        q_t = mapped(load_values(q, t, qt, d[None, :], D, end), d[None, :], inside, D, MAP)
        grad = load_values(do, t, dt, c, Dv, end)
        dq_t = tl.zeros([BT, BD], tl.float32)
        if NORMALIZE:
            ts = first + tl.arange(0, BT)
            weight = tl.load(den + head * Tq + ts, mask=ts < end, other=0.0)
            grad, dweight = divide_gradient(do, o, weight, t, dt, ot, c, Dv, end, BV)
            dweight = tl.where(ts + block * Tq < end, dweight, 0.0)
            dq_t += dweight[:, None] * z[None, :]
            dz += tl.sum(q_t * dweight[:, None], 0)
        dq_t += tl.dot(grad, tl.trans(S), input_precision=PRECISION)
        dS += tl.dot(tl.trans(q_t), grad, input_precision=PRECISION)
        tl.store(dq + t * D + d[None, :], dq_t, mask=inside)
    b, begin, end = bounds(cu, n, Tk)
    for first in range(begin, end, BT):
        t = first + tl.arange(0, BT)[:, None]
        inside = (t < end) & (d[None, :] < D)
        k_t = mapped(load_values(k, t, kt, d[None, :], D, end), d[None, :], inside, D, MAP)
        u = load_values(v, t, vt, c, Dv, end)
        tl.store(dv + t * Dv + c, tl.dot(k_t, dS, input_precision=PRECISION), mask=(t < end) & (c < Dv))
        tl.store(dk + t * D + d[None, :], tl.dot(u, tl.trans(dS), input_precision=PRECISION) + dz[None, :], mask=inside)
    if dinitial is not None:
        store_state(dinitial + item * D * width, d, c, dS, dz, block, D, Dv, width, NORMALIZE, BD)
