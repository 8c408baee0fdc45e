"""The Triton kernels of linear_attention and their launchers; the equations are in linear_attention.h, the chunks in README.md.

One program owns a head of a sequence and BV columns of the values, and walks over chunks of BT tokens with its part of the
state in registers. A mask that holds for the first block of values alone is written `index + block * size < limit`: Triton's
interpreter can't widen a scalar mask. Only logarithms that are not above 0 are exponentiated: scalar gates are summed in
float64, vector gates pair by pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .linear_attention_triton_chunk import (
    bounds,
    divide_gradient,
    load_gate,
    load_state,
    load_values,
    map_gradient,
    mapped,
    row,
    score,
    solve,
    solve_transposed,
    store_state,
)
from .linear_attention_triton_full import full_bwd_kernel, full_kernel

NO_GATE = 0  # else 1, scalar, or 2, vector


@triton.jit
def fwd_kernel(
    q, k, v, gate, beta, initial, cu, o, den, final, states, H, T, D, Dv, width, span, slots,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, bb, bh, bt, ob, oh, ot,
    MAP: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Causal. width: Dv + NORMALIZE, of a state's row. The first block of values also has the denominators' state."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, h = item // H, item % H
    b, begin, end = bounds(cu, n, T)
    d, c = tl.arange(0, BD), block * BV + tl.arange(0, BV)[None, :]  # (BD), (1, BV)
    q, k, v, o = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, o + b * ob + h * oh
    first_slot = (b * H + h) * slots
    if cu is not None:
        first_slot += begin // span + n
    if GATE != 0:
        gate += b * gb + h * gh
    if DELTA:
        beta += b * bb + h * bh
    S, z = tl.zeros([BD, BV], tl.float32), tl.zeros([BD], tl.float32)
    if initial is not None:
        S = load_state(initial + item * D * width, d, c, D, Dv, width)
        if NORMALIZE:
            z = tl.load(initial + item * D * width + d * width + Dv, mask=d < D, other=0.0)
    for first in range(begin, end, BT):
        if states is not None:  # noqa: SIM102 - decided when the kernel is compiled
            if (first - begin) % span == 0:
                to = states + (first_slot + (first - begin) // span) * D * width
                store_state(to, d, c, S, z, block, D, Dv, width, NORMALIZE, BD)
        t = first + tl.arange(0, BT)[:, None]  # (BT, 1)
        inside = (t < end) & (d[None, :] < D)
        q_t = mapped(load_values(q, t, qt, d[None, :], D, end), d[None, :], inside, D, MAP)
        k_t = mapped(load_values(k, t, kt, d[None, :], D, end), d[None, :], inside, D, MAP)
        u = load_values(v, t, vt, c, Dv, end)
        g = load_gate(gate, t, gt, d[None, :], D, end, GATE)
        A, W, _F, to_token, from_token, whole = score(q_t, k_t, g, BT, BD, GATE, DELTA, PRECISION)
        if DELTA:
            strength = tl.load(beta + t * bt, mask=t < end, other=0.0).to(tl.float32)
            u = solve(W, u - tl.dot(k_t * to_token, S, input_precision=PRECISION), strength, BT)
        # NaN and infinities in u: 0 in the product, whose zeros they would spread upwards, and NaN from their token on.
        wrong = u - u
        out = tl.dot(A, tl.where(wrong == 0.0, u, 0.0), input_precision=PRECISION) + tl.cumsum(wrong, 0)
        out += tl.dot(q_t * to_token, S, input_precision=PRECISION)
        if NORMALIZE:
            weight = tl.sum(A, 1) + tl.sum(q_t * to_token * z[None, :], 1)  # (BT)
            z = whole * z + tl.sum(k_t * from_token, 0)
            out = tl.where(weight[:, None] == 0.0, 0.0, out / tl.where(weight == 0.0, 1.0, weight)[:, None])
            place = den + (b * H + h) * T + first + tl.arange(0, BT)
            tl.store(place, weight, mask=first + tl.arange(0, BT) + block * T < end)
        S = whole[:, None] * S + tl.dot(tl.trans(k_t * from_token), u, input_precision=PRECISION)
        tl.store(o + t * ot + c, out, mask=(t < end) & (c < Dv))
    store_state(final + item * D * width, d, c, S, z, block, D, Dv, width, NORMALIZE, BD)


@triton.jit
def bwd_kernel(
    q, k, v, gate, beta, cu, o, den, states, do, dfinal, dq, dk, dv, dgate, dbeta, dinitial, kept, kept_z,
    H, T, D, Dv, width, span, slots, part, row_part,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, bb, bh, bt, ob, oh, ot, db, dh, dt,
    MAP: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Causal. dq, dk, dgate, dbeta: this block's share of the sums over the values, `part` or `row_part` floats, contiguous.
    kept (programs, CHUNKS, BD, BV), kept_z (programs, CHUNKS, BD): the states before the chunks of a span."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, h = item // H, item % H
    b, begin, end = bounds(cu, n, T)
    head = b * H + h
    rows, cols = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    d, c = tl.arange(0, BD), block * BV + tl.arange(0, BV)[None, :]  # (BD), (1, BV)
    q, k, v, o = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, o + b * ob + h * oh
    do += b * db + h * dh
    dq, dk, dv = dq + block * part + head * T * D, dk + block * part + head * T * D, dv + head * T * Dv
    first_slot = head * slots
    if cu is not None:
        first_slot += begin // span + n
    if GATE != 0:
        gate += b * gb + h * gh
        dgate += block * part + head * T * D if GATE == 2 else block * row_part + head * T
    if DELTA:
        beta += b * bb + h * bh
        dbeta += block * row_part + head * T
    program = item * tl.num_programs(1) + block
    kept, kept_z = kept + program * CHUNKS * BD * BV, kept_z + program * CHUNKS * BD
    tile = d[:, None] * BV + tl.arange(0, BV)[None, :]
    dS, dz = tl.zeros([BD, BV], tl.float32), tl.zeros([BD], tl.float32)
    if dfinal is not None:
        dS = load_state(dfinal + item * D * width, d, c, D, Dv, width)
        if NORMALIZE:
            dz = tl.load(dfinal + item * D * width + d * width + Dv, mask=d + block * BD < D, other=0.0)
    spans = tl.cdiv(end - begin, span)
    for back in range(spans):
        s = spans - 1 - back
        start = begin + s * span
        stop = tl.minimum(start + span, end)
        chunks = tl.cdiv(stop - start, BT)
        S = load_state(states + (first_slot + s) * D * width, d, c, D, Dv, width)
        z = tl.zeros([BD], tl.float32)
        if NORMALIZE:
            z = tl.load(states + (first_slot + s) * D * width + d * width + Dv, mask=d < D, other=0.0)
        tl.debug_barrier()  # the states of the span behind have been read
        for i in range(chunks):
            tl.store(kept + i * BD * BV + tile, S)
            tl.store(kept_z + i * BD + d, z)
            t = start + i * BT + rows
            inside = (t < end) & (d[None, :] < D)
            k_t = mapped(load_values(k, t, kt, d[None, :], D, end), d[None, :], inside, D, MAP)
            u = load_values(v, t, vt, c, Dv, end)
            g = load_gate(gate, t, gt, d[None, :], D, end, GATE)
            _A, W, _F, to_token, from_token, whole = score(k_t, k_t, g, BT, BD, GATE, DELTA, PRECISION)
            if DELTA:
                strength = tl.load(beta + t * bt, mask=t < end, other=0.0).to(tl.float32)
                u = solve(W, u - tl.dot(k_t * to_token, S, input_precision=PRECISION), strength, BT)
            S = whole[:, None] * S + tl.dot(tl.trans(k_t * from_token), u, input_precision=PRECISION)
            z = whole * z + tl.sum(k_t * from_token, 0)
        tl.debug_barrier()
        S_end, z_end = S, z
        for reverse in range(chunks):
            i = chunks - 1 - reverse
            S = tl.load(kept + i * BD * BV + tile)
            z = tl.load(kept_z + i * BD + d)
            t = start + i * BT + rows
            inside = (t < end) & (d[None, :] < D)
            q_t = mapped(load_values(q, t, qt, d[None, :], D, end), d[None, :], inside, D, MAP)
            k_t = mapped(load_values(k, t, kt, d[None, :], D, end), d[None, :], inside, D, MAP)
            u = load_values(v, t, vt, c, Dv, end)
            g = load_gate(gate, t, gt, d[None, :], D, end, GATE)
            A, W, F, to_token, from_token, whole = score(q_t, k_t, g, BT, BD, GATE, DELTA, PRECISION)
            grad = load_values(do, t, dt, c, Dv, end)  # of what the states give, (BT, BV)
            dA = tl.zeros([BT, BT], tl.float32)
            dq_t = tl.zeros([BT, BD], tl.float32)
            dk_t = tl.zeros([BT, BD], tl.float32)
            dz_before = dz
            if NORMALIZE:
                ts = start + i * BT + tl.arange(0, BT)
                weight = tl.load(den + head * T + ts, mask=ts < end, other=0.0)
                grad, dweight = divide_gradient(do, o, weight, t, dt, ot, c, Dv, end, BV)
                dweight = tl.where(ts + block * T < end, dweight, 0.0)
                dA += dweight[:, None]
                dq_t += to_token * dweight[:, None] * z[None, :]
                dk_t += tl.where(inside, from_token * dz[None, :], 0.0)
                dz_before = whole * dz + tl.sum(q_t * to_token * dweight[:, None], 0)
            dS_before = whole[:, None] * dS + tl.dot(tl.trans(q_t * to_token), grad, input_precision=PRECISION)
            dW = tl.zeros([BT, BT], tl.float32)
            dk_query = tl.zeros([BT, BD], tl.float32)  # of k that reads the state
            x = u
            if DELTA:
                strength = tl.load(beta + t * bt, mask=t < end, other=0.0).to(tl.float32)
                x = u - tl.dot(k_t * to_token, S, input_precision=PRECISION)
                u = solve(W, x, strength, BT)
            du = tl.dot(tl.trans(A), grad, input_precision=PRECISION)
            du += tl.dot(k_t * from_token, dS, input_precision=PRECISION)
            if DELTA:
                y = solve_transposed(W, du, strength, BT)
                x -= tl.dot(W, u, input_precision=PRECISION)
                tl.store(
                    dbeta + start + i * BT + tl.arange(0, BT), tl.sum(x * y, 1), mask=start + i * BT + tl.arange(0, BT) < end
                )
                du = strength * y
                dW = tl.where(rows > cols, -tl.dot(du, tl.trans(u), input_precision=PRECISION), 0.0)
                dk_query = -tl.dot(du, tl.trans(S), input_precision=PRECISION) * to_token
                dS_before -= tl.dot(tl.trans(k_t * to_token), du, input_precision=PRECISION)
            tl.store(dv + t * Dv + c, du, mask=(t < end) & (c < Dv))
            dA = tl.where(rows >= cols, dA + tl.dot(grad, tl.trans(u), input_precision=PRECISION), 0.0)
            dq_t += tl.dot(grad, tl.trans(S), input_precision=PRECISION) * to_token
            dk_t += tl.dot(u, tl.trans(dS), input_precision=PRECISION) * from_token
            if GATE == 2:
                path = tl.zeros([BT, BD], tl.float32)
                for step in range(BT):
                    j = BT - 1 - step
                    path = tl.where(rows > j, path + row(g, j + 1, rows)[None, :], 0.0)
                    factor = tl.exp(path)
                    k_row = row(k_t, j, rows)[None, :]
                    column = tl.sum(tl.where(cols == j, dA, 0.0), 1)[:, None]
                    dq_t += column * factor * k_row
                    dk_row = tl.sum(column * factor * q_t, 0)
                    if DELTA:
                        column = tl.sum(tl.where(cols == j, dW, 0.0), 1)[:, None]
                        dk_query += column * factor * k_row
                        dk_row += tl.sum(column * factor * k_t, 0)
                    dk_t += tl.where(rows == j, dk_row[None, :], 0.0)
            else:
                dA *= F
                dq_t += tl.dot(dA, k_t, input_precision=PRECISION)
                dk_t += tl.dot(tl.trans(dA), q_t, input_precision=PRECISION)
                if DELTA:
                    dW *= F
                    dk_query += tl.dot(dW, k_t, input_precision=PRECISION)
                    dk_t += tl.dot(tl.trans(dW), k_t, input_precision=PRECISION)
            if GATE != 0:
                terms = q_t * dq_t + k_t * (dk_query - dk_t)  # (BT, BD)
                behind = tl.sum(S_end * dS, 1)  # (BD)
                if NORMALIZE:
                    behind += z_end * dz
                if GATE == 2:
                    dg = tl.cumsum(terms, 0, reverse=True) + behind[None, :]
                    dg = tl.where(g > -138.0, dg, 0.0)
                    tl.store(dgate + t * D + d[None, :], dg, mask=inside)
                else:
                    dg = tl.cumsum(tl.sum(terms, 1), 0, reverse=True) + tl.sum(behind, 0)
                    dg = tl.where(tl.sum(g, 1) > -138.0, dg, 0.0)
                    ts = start + i * BT + tl.arange(0, BT)
                    tl.store(dgate + ts, dg, mask=ts < end)
            tl.store(dq + t * D + d[None, :], dq_t, mask=inside)
            tl.store(dk + t * D + d[None, :], dk_t + dk_query, mask=inside)
            S_end, z_end, dS, dz = S, z, dS_before, dz_before
    if dinitial is not None:
        store_state(dinitial + item * D * width, d, c, dS, dz, block, D, Dv, width, NORMALIZE, BD)


@triton.jit
def finish_kernel(
    part, x, out, H, T, D, count, size, xb, xh, xt, MAP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out (B, H, T, D) = the gradient of x, from the `count` shares of phi(x)'s gradient, `size` floats each."""
    tiles = tl.cdiv(T, BT)
    head = tl.program_id(0).to(tl.int64) // tiles
    t, d = tl.program_id(0) % tiles * BT + tl.arange(0, BT)[:, None], tl.arange(0, BD)[None, :]
    inside = (t < T) & (d < D)
    total = tl.zeros([BT, BD], tl.float32)
    for i in range(count):
        total += tl.load(part + i * size + (head * T + t) * D + d, mask=inside, other=0.0)
    if MAP != 0:
        at = x + head // H * xb + head % H * xh + t * xt + d
        total = map_gradient(tl.load(at, mask=inside, other=0.0).to(tl.float32), total, d, D, MAP)
    tl.store(out + (head * T + t) * D + d, total, mask=inside)


@triton.jit
def step_kernel(
    q, k, v, gate, beta, state, o, new_state, H, D, Dv, width, qb, qh, kb, kh, vb, vh, gb, gh, bb, bh,
    MAP: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head and BV columns of the values a program. o is contiguous."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = item // H, item % H
    d, c = tl.arange(0, BD), block * BV + tl.arange(0, BV)
    line = d[None, :]  # (1, BD)
    at_q, at_k = q + b * qb + h * qh + line, k + b * kb + h * kh + line
    q_t = mapped(tl.load(at_q, mask=line < D, other=0.0).to(tl.float32), line, line < D, D, MAP)
    k_t = mapped(tl.load(at_k, mask=line < D, other=0.0).to(tl.float32), line, line < D, D, MAP)
    q_t, k_t = tl.sum(q_t, 0), tl.sum(k_t, 0)  # (BD)
    u = tl.load(v + b * vb + h * vh + c, mask=c < Dv, other=0.0).to(tl.float32)
    keep = tl.zeros([BD], tl.float32) + 1.0
    if GATE == 1:
        keep = tl.exp(tl.zeros([BD], tl.float32) + tl.load(gate + b * gb + h * gh).to(tl.float32))
    if GATE == 2:
        keep = tl.exp(tl.load(gate + b * gb + h * gh + d, mask=d < D, other=0.0).to(tl.float32))
    S = load_state(state + item * D * width, d, c[None, :], D, Dv, width) * keep[:, None]
    if DELTA:
        u = tl.load(beta + b * bb + h * bh).to(tl.float32) * (u - tl.sum(k_t[:, None] * S, 0))
    S += k_t[:, None] * u[None, :]
    out = tl.sum(q_t[:, None] * S, 0)
    to = new_state + item * D * width
    if NORMALIZE:
        z = tl.load(state + item * D * width + d * width + Dv, mask=d < D, other=0.0) * keep + k_t
        weight = tl.sum(q_t * z, 0)
        out = tl.where(weight == 0.0, 0.0, out / tl.where(weight == 0.0, 1.0, weight))
        tl.debug_barrier()  # state and new_state may be the same memory
        tl.store(to + d * width + Dv, z, mask=d + (tl.num_programs(1) - 1 - block) * BD < D)
    tl.store(to + d[:, None] * width + c[None, :], S, mask=(d[:, None] < D) & (c[None, :] < Dv))
    tl.store(o + item * Dv + c, out, mask=c < Dv)


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()[:3]


def _block(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _shape(q, v, gate, beta, state_tiles: int) -> dict[str, object]:
    """Tiles of a kernel that has so many tiles of the state in registers; head dims are checked where a backend is chosen."""
    width = _block(q.shape[3])
    small = beta is not None or (gate is not None and gate.dim() == 4)
    return {
        "BT": 16 if small else max(16, 4096 // max(width, 64)),
        "BD": width,
        "BV": min(_block(v.shape[3]), max(16, 8192 // state_tiles // width)),
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4 if width <= 64 else 8,
        "num_stages": 1,  # operands of later chunks would not fit beside these into shared memory
    }


def _variant(gate, beta) -> dict[str, object]:
    return {"GATE": NO_GATE if gate is None else gate.dim() - 2, "DELTA": beta is not None}


def fwd(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, span, o, den, final_state, states) -> None:
    """As mlc_linear_attention_fwd."""
    (_, H, Tq, D), (Tk, Dv) = q.shape, v.shape[2:]
    shape = _shape(q, v, gate, beta, 1)
    grid = final_state.shape[0] * H, triton.cdiv(Dv, shape["BV"])
    strides = *_strides(q), *_strides(k), *_strides(v)
    if grid[0] == 0:
        return
    with torch.cuda.device_of(q):
        if causal:
            fwd_kernel[grid](
                q, k, v, gate, beta, initial_state, cu_seqlens, o, den, final_state, states, H, Tq, D, Dv, Dv + normalize, span,
                0 if states is None else states.shape[2], *strides, *_strides(gate), *_strides(beta), *_strides(o),
                MAP=feature, NORMALIZE=bool(normalize), **_variant(gate, beta), **shape,
            )  # fmt: skip
        else:
            full_kernel[grid](
                q, k, v, initial_state, cu_seqlens, o, den, final_state, H, Tq, Tk, D, Dv, Dv + normalize,
                *strides, *_strides(o), MAP=feature, NORMALIZE=bool(normalize), **shape,
            )  # fmt: skip


def bwd(
    q, k, v, gate, beta, cu_seqlens, feature, normalize, causal, span, o, den, states, d_o, d_final_state,
    dq, dk, dv, dgate, dbeta, d_initial_state,
) -> None:  # fmt: skip
    """As mlc_linear_attention_bwd."""
    (B, H, Tq, D), (Tk, Dv) = q.shape, v.shape[2:]
    shape = _shape(q, v, gate, beta, 2)
    BT, BD, BV = shape["BT"], shape["BD"], shape["BV"]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks, width = triton.cdiv(Dv, BV), Dv + normalize
    grid = sequences * H, blocks
    strides = *_strides(q), *_strides(k), *_strides(v)
    outward = *_strides(o), *_strides(d_o)

    def floats(*size):
        return torch.empty(size, dtype=torch.float32, device=q.device)

    dq_part, dk_part = floats(blocks, B, H, Tq, D), floats(blocks, B, H, Tk, D)
    with torch.cuda.device_of(q):
        if grid[0] and causal:
            chunks = span // BT
            shares = [None if t is None else floats(blocks, *t.shape) for t in (gate, beta)]
            bwd_kernel[grid](
                q, k, v, gate, beta, cu_seqlens, o, den, states, d_o, d_final_state, dq_part, dk_part, dv, *shares,
                d_initial_state, floats(grid[0] * blocks, chunks, BD, BV), floats(grid[0] * blocks, chunks, BD),
                H, Tq, D, Dv, width, span, states.shape[2], dq_part[0].numel(), B * H * Tq,
                *strides, *_strides(gate), *_strides(beta), *outward,
                MAP=feature, NORMALIZE=bool(normalize), CHUNKS=chunks, **_variant(gate, beta), **shape,
            )  # fmt: skip
            for share, out in zip(shares, (dgate, dbeta)):
                if out is not None:
                    torch.sum(share, 0, out=out)
        elif grid[0]:
            full_bwd_kernel[grid](
                q, k, v, cu_seqlens, o, den, states, d_o, d_final_state, dq_part, dk_part, dv, d_initial_state,
                H, Tq, Tk, D, Dv, width, dq_part[0].numel(), dk_part[0].numel(), *strides, *outward,
                MAP=feature, NORMALIZE=bool(normalize), **shape,
            )  # fmt: skip
        for part, x, out in ((dq_part, q, dq), (dk_part, k, dk)):
            if out.numel():
                tiles = (B * H * triton.cdiv(x.shape[2], 16),)
                finish_kernel[tiles](
                    part, x, out, H, x.shape[2], D, blocks, part[0].numel(), *_strides(x), MAP=feature, BT=16, BD=BD
                )


def step(q, k, v, gate, beta, state, feature, normalize, o, new_state) -> None:
    """As mlc_linear_attention_step."""
    (B, H, D), Dv = q.shape, v.shape[2]
    BD = _block(D)
    BV = min(_block(Dv), max(16, 4096 // BD))
    if normalize and new_state.data_ptr() == state.data_ptr():
        BV = _block(Dv)  # no program may read denominators that another has written
    if B * H:
        strides = [s for t in (q, k, v, gate, beta) for s in _strides(t)[:2]]
        with torch.cuda.device_of(q):
            step_kernel[(B * H, triton.cdiv(Dv, BV))](
                q, k, v, gate, beta, state, o, new_state, H, D, Dv, Dv + normalize, *strides,
                MAP=feature, NORMALIZE=bool(normalize), DELTA=beta is not None,
                GATE=NO_GATE if gate is None else gate.dim() - 1, BD=BD, BV=BV,
            )  # fmt: skip


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    wide = (
        "initial",
        "final",
        "den",
        "states",
        "dfinal",
        "dgate",
        "dbeta",
        "dinitial",
        "kept",
        "kept_z",
        "part",
        "state",
        "new_state",
    )

    def spec(kernel, dtype, warps=4, **constexprs):
        def type_of(name):
            if name in constexprs:
                return "constexpr"
            if name == "part" and kernel is bwd_kernel:
                return "i32"
            if name in wide or (name in ("dq", "dk") and kernel is not finish_kernel):
                return "*fp32"
            if name == "cu":
                return "*i64"
            return f"*{dtype}" if name in ("q", "k", "v", "gate", "beta", "o", "do", "dv", "x", "out") else "i32"

        return kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs, {"num_warps": warps, "num_stages": 1}

    tile = {"PRECISION": "tf32", "BT": 64, "BD": 64, "BV": 64}
    tile32 = tile | {"PRECISION": "tf32x3", "dbeta": None}
    small = {"PRECISION": "tf32x3", "BT": 16, "BD": 64, "BV": 64}
    wide_heads = {"PRECISION": "tf32x3", "BT": 16, "BD": 256, "warps": 8}
    return [
        spec(fwd_kernel, "fp32", MAP=0, GATE=1, DELTA=False, NORMALIZE=True, beta=None, BV=32, **wide_heads),
        spec(
            bwd_kernel,
            "fp32",
            MAP=0,
            GATE=1,
            DELTA=False,
            NORMALIZE=True,
            CHUNKS=16,
            beta=None,
            dbeta=None,
            BV=16,
            **wide_heads,
        ),
        spec(fwd_kernel, "bf16", MAP=1, GATE=0, DELTA=False, NORMALIZE=True, gate=None, beta=None, cu=None, **tile),
        spec(fwd_kernel, "fp32", MAP=0, GATE=2, DELTA=True, NORMALIZE=False, den=None, **small),
        spec(bwd_kernel, "fp32", MAP=1, GATE=1, DELTA=False, NORMALIZE=True, CHUNKS=8, beta=None, cu=None, **tile32),
        spec(bwd_kernel, "fp32", MAP=0, GATE=2, DELTA=True, NORMALIZE=False, CHUNKS=32, den=None, **small),
        spec(full_kernel, "bf16", MAP=3, NORMALIZE=True, **tile),
        spec(full_bwd_kernel, "bf16", MAP=3, NORMALIZE=True, **tile),
        spec(finish_kernel, "bf16", MAP=3, BT=16, BD=64),
        spec(step_kernel, "bf16", MAP=1, GATE=2, DELTA=False, NORMALIZE=True, beta=None, BD=64, BV=64),
    ]
