"""causal_conv1d in plain torch: the oracle of the tests and the fallback for dtypes and devices without a kernel."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def causal_conv1d(x, weight, bias=None, activation=None, initial_states=None, seq_idx=None, cu_seqlens=None):
    """(y, final states) as the equations of causal_conv1d.h, computed in float32 or, for float64 tensors, in float64."""
    B, C, T = x.shape
    width = weight.shape[1]
    back = width - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, T)
    weight, bias = weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype)
    bounds = [(b, 0, T) for b in range(B)]  # of each sequence: row, begin, end
    if cu_seqlens is not None:
        cu = cu_seqlens.tolist()
        bounds = [(0, begin, end) for begin, end in itertools.pairwise(cu)]
    state = wide.new_zeros(len(bounds), C, back) if initial_states is None else initial_states.to(wide.dtype)
    rows, finals = [[] for _ in range(B)], []
    for n, (b, begin, end) in enumerate(bounds):
        history = state[n]  # (C, w-1)
        for first, last, padding in _runs(None if seq_idx is None else seq_idx[b].tolist(), begin, end):
            if first > begin:
                history = torch.zeros_like(history)
            h = torch.cat([history, wide[b, :, first:last]], -1)  # (C, w-1 + run)
            if last > first:
                pre = F.conv1d(h[None], weight[:, None], bias, groups=C)[0]
                rows[b].append(torch.zeros_like(pre) if padding else _activate(pre, activation))
            history = h[:, h.shape[-1] - back :]
        finals.append(history)
    y = torch.stack([torch.cat(r, -1) for r in rows]) if B and T else torch.zeros_like(wide)
    return y.to(x.dtype), (torch.stack(finals) if finals else state).to(x.dtype)


def _runs(ids, begin, end):
    """(begin, end, is padding) of the runs of equal ids; one where there are no ids, or no tokens."""
    runs, first = [], begin
    for t in range(begin + 1, end + 1):
        if t == end or (ids is not None and ids[t] != ids[first]):
            runs.append((first, t, ids is not None and ids[first] < 0))
            first = t
    return runs or [(begin, end, False)]


def _activate(pre, activation):
    return {None: lambda v: v, "silu": F.silu, "gelu": F.gelu}[activation](pre)


def causal_conv1d_update(x, state, weight, bias=None, activation=None, position=None, slots=None):
    """y; state is updated in place. x (B, C, T)."""
    B, _, T = x.shape
    S, back = state.shape[2], weight.shape[1] - 1
    y = torch.zeros_like(x)
    for b in range(B):
        slot = b if slots is None else int(slots[b])
        if slot < 0:
            continue
        start = 0 if position is None else int(position[b])
        past = torch.arange(start - back, start, device=x.device) % S if position is not None else torch.arange(S - back, S)
        h = torch.cat([state[slot][:, past], x[b]], -1)  # (C, w-1 + T)
        y[b] = causal_conv1d(h[None], weight, bias, activation)[0][0, :, back:]
        if position is not None:
            kept = torch.arange(max(0, T - S), T, device=x.device)
            state[slot, :, (start + kept) % S] = x[b][:, kept]
        else:
            state[slot] = torch.cat([state[slot], x[b]], -1)[:, T:]
    return y
