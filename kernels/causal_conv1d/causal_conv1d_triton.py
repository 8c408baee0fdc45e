"""The Triton kernels of causal_conv1d and their launchers; the equations are in causal_conv1d.h.

A program owns BC channels by BT tokens and reads x once a tap: the cache serves all but the first. dpre goes through memory in
float32 where an activation or padding changes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import sum_partials, sum_partials_spec

NONE, SILU, GELU = 0, 1, 2


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        v = v / (1.0 + tl.exp(-v))
    if ACTIVATION == 2:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.70710678))
    return v


@triton.jit
def slope(v, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == 1:
        s = 1.0 / (1.0 + tl.exp(-v))
        v = s * (1.0 + v * (1.0 - s))
    elif ACTIVATION == 2:
        v = 0.5 * (1.0 + tl.erf(v * 0.70710678)) + v * 0.39894228 * tl.exp(-0.5 * v * v)
    else:
        v = v * 0.0 + 1.0
    return v


@triton.jit
def sequence_of(cu, sequences, steps, b, t, T):
    """(number, begin, end) of the sequences that tokens t (BT) of row b lie in."""
    n, begin, end = t * 0 + b, t * 0, t * 0 + T
    if cu is not None:
        n, above = t * 0, t * 0 + sequences
        for _ in range(steps):
            middle = (n + above) // 2
            left = tl.load(cu + middle) <= t
            n, above = tl.where(left, middle, n), tl.where(left, above, middle)
        begin = tl.minimum(tl.maximum(tl.load(cu + n), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu + n + 1), begin), T)
    return n, begin, end


@triton.jit
def run_start(ids, t, begin, width):
    """The first of the last `width` tokens up to t that belong to t's run; ids is the row's, t may be a vector."""
    start = tl.maximum(begin, t - (width - 1))
    if ids is not None:
        start, alive = t, t >= begin
        here = tl.load(ids + t, mask=alive, other=0)
        for j in range(1, width):
            alive = alive & (t - j >= begin)
            alive = alive & (tl.load(ids + t - j, mask=alive, other=0) == here)
            start = tl.where(alive, t - j, start)
    return start


@triton.jit
def history(x, initial, c, s, start, begin, n, inside, width, xc, xt, ib, ic, it):
    """h at tokens s (BT) for outputs whose history starts at `start`; channels c (BC, 1), x of this row."""
    h = tl.load(x + c * xc + s * xt, mask=inside & (s >= start), other=0.0).to(tl.float32)
    if initial is not None:
        left = inside & (start == begin) & (s < begin)
        h += tl.load(initial + n * ib + c * ic + (s - begin + width - 1) * it, mask=left, other=0.0).to(tl.float32)
    return h


@triton.jit
def tile(B, C, T, BC: tl.constexpr, BT: tl.constexpr):
    """(b, channels (BC, 1), tokens (1, BT)) of this program."""
    program = tl.program_id(0).to(tl.int64)
    groups, tiles = tl.cdiv(C, BC), tl.cdiv(T, BT)
    c = program % groups * BC + tl.arange(0, BC)[:, None]
    t = program // groups % tiles * BT + tl.arange(0, BT)[None, :]
    return program // groups // tiles, c, t


@triton.jit
def fwd_kernel(
    x, weight, bias, initial, ids, cu, out, dy, B, C, T, width, sequences, steps,
    xb, xc, xt, ib, ic, it, ob, oc, ot, db, dc, dt,
    ACTIVATION: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out = y, or where dy is given dpre = dy * act'(pre)."""
    b, c, t = tile(B, C, T, BC, BT)
    inside, token = (c < C) & (t < T), tl.minimum(t, T - 1)
    row_ids = ids
    if ids is not None:
        row_ids = ids + b * T
    n, begin, _end = sequence_of(cu, sequences, steps, b, token, T)
    start = run_start(row_ids, token, begin, width)
    pre = tl.zeros([BC, BT], tl.float32)
    if bias is not None:
        pre += tl.load(bias + c, mask=c < C, other=0.0)
    if dy is None or ACTIVATION != 0:
        for k in range(width):
            s = t - (width - 1) + k
            h = history(x + b * xb, initial, c, s, start, begin, n, inside, width, xc, xt, ib, ic, it)
            pre += tl.load(weight + c * width + k, mask=c < C, other=0.0) * h
    if dy is None:
        v = activate(pre, ACTIVATION)
    else:
        v = tl.load(dy + b * db + c * dc + t * dt, mask=inside, other=0.0).to(tl.float32) * slope(pre, ACTIVATION)
    if ids is not None:
        v = tl.where(tl.load(row_ids + token) < 0, 0.0, v)
    tl.store(out + b * ob + c * oc + t * ot, v, mask=inside)


@triton.jit
def dx_kernel(
    dpre, weight, dfinal, ids, cu, dx, B, C, T, width, sequences, steps, pb, pc, pt, ib, ic, it, ob, oc, ot,
    BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    b, c, t = tile(B, C, T, BC, BT)
    inside, token = (c < C) & (t < T), tl.minimum(t, T - 1)
    row_ids = ids
    alive = t < T
    if ids is not None:
        row_ids = ids + b * T
        here = tl.load(row_ids + token)
    n, begin, end = sequence_of(cu, sequences, steps, b, token, T)
    total = tl.zeros([BC, BT], tl.float32)
    for j in range(width):
        alive = alive & (t + j < end)
        if ids is not None:
            alive = alive & (tl.load(row_ids + t + j, mask=alive, other=0) == here)
        d = tl.load(dpre + b * pb + c * pc + (t + j) * pt, mask=inside & alive, other=0.0).to(tl.float32)
        total += tl.load(weight + c * width + (width - 1 - j), mask=c < C, other=0.0) * d
    if dfinal is not None:
        kept = inside & (t >= end - (width - 1)) & (t >= run_start(row_ids, end - 1, begin, width))
        at = dfinal + n * ib + c * ic + (t - end + width - 1) * it
        total += tl.load(at, mask=kept, other=0.0).to(tl.float32)
    tl.store(dx + b * ob + c * oc + t * ot, total, mask=inside)


@triton.jit
def dweight_kernel(
    dpre, x, initial, ids, cu, partial, B, C, T, width, sequences, steps, pb, pc, pt, xb, xc, xt, ib, ic, it,
    BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial[part, k, c]: the part's sum of dpre * h for tap k = program_id(2), or of dpre for k = width."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)[:, None]
    part, parts, k = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(2)
    tiles = tl.cdiv(T, BT)
    total = tl.zeros([BC, BT], tl.float32)
    for i in range(B * tiles * part // parts, B * tiles * (part + 1) // parts):
        b = i // tiles
        t = i % tiles * BT + tl.arange(0, BT)[None, :]
        inside, token = (c < C) & (t < T), tl.minimum(t, T - 1)
        row_ids = ids
        if ids is not None:
            row_ids = ids + b * T
            inside = inside & (tl.load(row_ids + token) >= 0)
        d = tl.load(dpre + b * pb + c * pc + t * pt, mask=inside, other=0.0).to(tl.float32)
        if k < width:
            n, begin, _end = sequence_of(cu, sequences, steps, b, token, T)
            start = run_start(row_ids, token, begin, width)
            d *= history(x + b * xb, initial, c, t - (width - 1) + k, start, begin, n, inside, width, xc, xt, ib, ic, it)
        total += d
    at = partial + (part * (width + 1) + k) * C + c
    tl.store(at, tl.sum(total, 1)[:, None], mask=c < C)


@triton.jit
def states_kernel(
    x, initial, dfinal, weight, ids, cu, out, C, T, width, xb, xc, xt, ib, ic, it, fb, fc, ft, ob, oc, ot,
    BACKWARD: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out = the final states of x; BACKWARD: out = dinitial, and x is dpre. One sequence and BC channels a program."""
    back = width - 1
    program, groups, pieces = tl.program_id(0).to(tl.int64), tl.cdiv(C, BC), tl.cdiv(back, BI)
    i = program % pieces * BI + tl.arange(0, BI)[None, :]
    c = program // pieces % groups * BC + tl.arange(0, BC)[:, None]
    n = program // pieces // groups
    inside = (c < C) & (i < back)
    row, begin, end = n, n * 0, n * 0 + T
    row_ids = ids
    if cu is not None:
        row = n * 0
        begin = tl.minimum(tl.maximum(tl.load(cu + n), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu + n + 1), begin), T)
    if ids is not None:
        row_ids = ids + row * T
    start = run_start(row_ids, end - 1, begin, width)  # of the last run
    start = tl.where(end > begin, start, begin) + i * 0  # (1, BI), as masks must be: the interpreter can't widen a scalar one
    if BACKWARD:
        v = tl.zeros([BC, BI], tl.float32)
        alive = i < back
        for u in range(begin, tl.minimum(begin + back, end)):
            if ids is not None:
                alive = alive & (tl.load(row_ids + u) + i * 0 == tl.load(row_ids + begin))
            j = u - (begin - back + i)
            d = tl.load(x + row * xb + c * xc + u * xt, mask=inside & alive, other=0.0).to(tl.float32)
            v += d * tl.load(weight + c * width + (width - 1 - j), mask=inside & (j < width), other=0.0)
        if dfinal is not None:
            kept = inside & (begin + i - end >= 0) & (start == begin)
            v += tl.load(dfinal + n * fb + c * fc + (begin + i - end) * ft, mask=kept, other=0.0).to(tl.float32)
    else:
        t = end - back + i
        v = tl.load(x + row * xb + c * xc + t * xt, mask=inside & (t >= start), other=0.0)
        if initial is not None:
            left = inside & (t < begin) & (start == begin)
            v = tl.where(left, tl.load(initial + n * ib + c * ic + (t - begin + back) * it, mask=left, other=0.0), v)
    tl.store(out + n * ob + c * oc + i * ot, v, mask=inside)


@triton.jit
def update_kernel(
    x, state, weight, bias, position, slots, y, C, T, S, rows, width, xb, xc, xt, sb, sc, st, yb, yc, yt,
    ACTIVATION: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(C, BC)
    b = tl.program_id(0).to(tl.int64) // groups
    c = tl.program_id(0) % groups * BC + tl.arange(0, BC)
    slot = b + c * 0  # (BC), as masks must be: the interpreter can't widen a scalar one
    if slots is not None:
        slot = tl.load(slots + b).to(tl.int64) + c * 0
    known = (slot >= 0) & (slot < rows)
    inside = (c < C) & known
    first = S
    if position is not None:
        first = (tl.load(position + b) % S + S) % S
    x += b * xb + c * xc
    y += b * yb + c * yc
    state += tl.where(known, slot, 0) * sb + c * sc
    for t in range(T):
        pre = tl.zeros([BC], tl.float32)
        if bias is not None:
            pre += tl.load(bias + c, mask=inside, other=0.0)
        for k in range(width):
            s = t - (width - 1) + k
            place = first + s
            if position is not None:
                place = (place % S + S) % S
            h = tl.load(x + s * xt, mask=inside & (c * 0 + s >= 0), other=0.0).to(tl.float32)
            h += tl.load(state + place * st, mask=inside & (c * 0 + s < 0), other=0.0).to(tl.float32)
            pre += tl.load(weight + c * width + k, mask=inside, other=0.0) * h
        v = activate(pre, ACTIVATION)
        v = tl.where(slot < 0, 0.0, tl.where(slot < rows, v, float("nan")))  # a slot that state doesn't have
        tl.store(y + t * yt, v, mask=c < C)
    tl.debug_barrier()  # all of the old state has been read
    if position is not None:
        for t in range(tl.maximum(0, T - S), T):
            tl.store(state + (first + t) % S * st, tl.load(x + t * xt, mask=inside), mask=inside)
    else:
        for i in range(S):
            s = i + T - S
            new = c * 0 + s >= 0
            v = tl.load(x + s * xt, mask=inside & new, other=0.0)
            v = tl.where(new, v, tl.load(state + (i + T) * st, mask=inside & (c * 0 + s < 0), other=0.0))
            tl.debug_barrier()
            tl.store(state + i * st, v, mask=inside)


def _strides(t: torch.Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else t.stride()


def _blocks(x: torch.Tensor) -> dict[str, int]:
    """The tile: along T where that is contiguous, along C where that is."""
    in_time = x.stride(1) != 1 if x.shape[2] <= 1 else x.stride(2) == 1
    return {"BC": 4, "BT": 256} if in_time else {"BC": 64, "BT": 16}


def _sizes(x, weight, cu_seqlens) -> tuple[int, ...]:
    """B, C, T, width, sequences, steps of the search among them."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return *x.shape, weight.shape[1], sequences, max(sequences, 1).bit_length()


def _grid(x, BC, BT) -> tuple[int]:
    return (x.shape[0] * triton.cdiv(x.shape[1], BC) * triton.cdiv(x.shape[2], BT),)


def _states(x, initial, dfinal, weight, ids, cu, out, backward) -> None:
    N, C, back = out.shape
    if out.numel() == 0:
        return
    strides = *_strides(x), *_strides(initial), *_strides(dfinal), *_strides(out)
    grid = (N * triton.cdiv(C, 16) * triton.cdiv(back, 16),)
    args = (x, initial, dfinal, weight, ids, cu, out, C, x.shape[2], back + 1)
    states_kernel[grid](*args, *strides, BACKWARD=backward, BC=16, BI=16)


def fwd(x, weight, bias, initial, seq_idx, cu_seqlens, activation, y, final) -> None:
    """As mlc_causal_conv1d_fwd."""
    with torch.cuda.device_of(x):
        if x.numel():
            blocks = _blocks(x)
            fwd_kernel[_grid(x, **blocks)](
                x, weight, bias, initial, seq_idx, cu_seqlens, y, None, *_sizes(x, weight, cu_seqlens),
                *_strides(x), *_strides(initial), *_strides(y), 0, 0, 0, ACTIVATION=activation, **blocks,
            )  # fmt: skip
        if final is not None:
            _states(x, initial, None, weight, seq_idx, cu_seqlens, final, False)


def bwd(
    dy, dfinal, x, weight, bias, initial, seq_idx, cu_seqlens, activation, dx, dweight, dbias, dinitial, partial
) -> None:  # fmt: skip
    """As mlc_causal_conv1d_bwd."""
    blocks, sizes = _blocks(x), _sizes(x, weight, cu_seqlens)
    C, width = weight.shape
    with torch.cuda.device_of(x):
        dpre = dy
        if x.numel() and (activation != NONE or seq_idx is not None):
            dpre = torch.empty_like(dx, dtype=torch.float32)
            fwd_kernel[_grid(x, **blocks)](
                x, weight, bias, initial, seq_idx, cu_seqlens, dpre, dy, *sizes, *_strides(x), *_strides(initial),
                *_strides(dpre), *_strides(dy), ACTIVATION=activation, **blocks,
            )  # fmt: skip
        if x.numel():
            dx_kernel[_grid(x, **blocks)](
                dpre, weight, dfinal, seq_idx, cu_seqlens, dx, *sizes, *_strides(dpre), *_strides(dfinal), *_strides(dx),
                **blocks,
            )  # fmt: skip
        if dweight is not None and C:
            grid = triton.cdiv(C, blocks["BC"]), partial.shape[0], width + 1
            dweight_kernel[grid](
                dpre, x, initial, seq_idx, cu_seqlens, partial, *sizes, *_strides(dpre), *_strides(x), *_strides(initial),
                **blocks,
            )  # fmt: skip
            total = partial.new_empty(width + 1, C)
            sum_partials(partial.flatten(1), total.view(-1))
            dweight.copy_(total[:width].t())
            dbias.copy_(total[width])
        if dinitial is not None:
            _states(dpre, None, dfinal, weight, seq_idx, cu_seqlens, dinitial, True)


def update(x, state, weight, bias, position, slots, activation, y) -> None:
    """As mlc_causal_conv1d_update; a slot that state doesn't have gives NaN."""
    B, C, T = x.shape
    block = 128
    if B * C:
        with torch.cuda.device_of(x):
            update_kernel[(B * triton.cdiv(C, block),)](
                x, state, weight, bias, position, slots, y, C, T, state.shape[2], state.shape[0], weight.shape[1],
                *_strides(x), *_strides(state), *_strides(y), ACTIVATION=activation, BC=block,
            )  # fmt: skip


def compile_specs() -> list[tuple]:
    """(kernel, signature, constexprs, options) of the variants that tests compile ahead."""
    float32, int32 = ("weight", "bias", "partial", "dpre"), ("ids", "cu", "position", "slots")

    def spec(kernel, dtype, **constexprs):
        def type_of(name):
            if name in constexprs:
                return "constexpr"
            if name in float32 or name in int32:
                return "*fp32" if name in float32 else "*i32"
            return f"*{dtype}" if name in ("x", "initial", "state", "y", "out", "dy", "dx", "dfinal") else "i32"

        return kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs, {"num_warps": 4}

    in_time, in_channels = {"BC": 4, "BT": 256}, {"BC": 64, "BT": 16}
    return [
        spec(fwd_kernel, "bf16", ACTIVATION=SILU, xt=1, ot=1, initial=None, ids=None, cu=None, dy=None, **in_time),
        spec(fwd_kernel, "fp32", ACTIVATION=GELU, xc=1, oc=1, dc=1, **in_channels),
        spec(dx_kernel, "bf16", pt=1, ot=1, ids=None, cu=None, dfinal=None, **in_time),
        spec(dx_kernel, "fp32", pc=1, oc=1, **in_channels),
        spec(dweight_kernel, "bf16", **in_time),
        spec(states_kernel, "bf16", BACKWARD=False, dfinal=None, weight=None, BC=16, BI=16),
        spec(states_kernel, "fp32", BACKWARD=True, initial=None, BC=16, BI=16),
        spec(update_kernel, "bf16", ACTIVATION=SILU, BC=128),
        sum_partials_spec("fp32"),
    ]
