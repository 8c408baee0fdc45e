"""Linear attention in plain torch: the recurrence, token by token, which is the oracle and the fallback; and the usual chunked
form, which is what a user would write with einsum and what the benchmarks compare with. Both differentiate, also in float64.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def feature_map(x, name):
    """phi(x) of linear_attention.h; x itself for None."""
    if name is None:
        return x
    if name == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return F.relu(x) if name == "relu" else x.softmax(-1)


def linear_attention(
    q, k, v, gate=None, beta=None, initial_state=None, cu_seqlens=None, feature=None, normalize=True, causal=True
):  # fmt: skip
    """(o, final_state) as the equations of linear_attention.h, in float32 or, for float64 tensors, in float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = q.dtype
    q, k, v = (t.to(wide) for t in (q, k, v))
    q, k = feature_map(q, feature), feature_map(k, feature)
    gate, beta, initial_state = (None if t is None else t.to(wide) for t in (gate, beta, initial_state))
    if cu_seqlens is None:
        o, state = _one(q, k, v, gate, beta, initial_state, normalize, causal)
        return o.to(dtype), state
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[2] or bounds != sorted(bounds):
        raise ValueError(f"linear_attention: cu_seqlens must go from 0 to {q.shape[2]} and not fall; got {bounds}")
    outputs, states = [q.new_zeros(*q.shape[:3], v.shape[3])[:, :, :0]], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = [None if t is None else t[:, :, begin:end] for t in (q, k, v, gate, beta)]
        start = None if initial_state is None else initial_state[n : n + 1]
        o, state = _one(*part, start, normalize, causal)
        outputs.append(o)
        states.append(state)
    state = torch.cat(states) if states else q.new_zeros(0, q.shape[1], q.shape[3], v.shape[3] + normalize)
    return torch.cat(outputs, 2).to(dtype), state


def _one(q, k, v, gate, beta, state, normalize, causal):
    """Sequences of one length; the values and the state have a last column for the denominators with normalize."""
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    if state is None:
        state = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    if not causal:
        state = state + k.transpose(2, 3) @ v
        o = q @ state
    else:
        rows = []
        tokens = [[None] * q.shape[2] if t is None else t.unbind(2) for t in (q, k, v, gate, beta)]
        for q_t, k_t, u, g, strength in zip(*tokens):
            if g is not None:
                factor = g.exp()
                state = (factor[..., None] if factor.dim() == 3 else factor[..., None, None]) * state
            if strength is not None:
                u = strength[..., None] * (u - (k_t[:, :, None] @ state).squeeze(2))
            state = state + k_t[..., None] * u[:, :, None]
            rows.append((q_t[:, :, None] @ state).squeeze(2))
        o = torch.stack(rows, 2) if rows else q.new_zeros(*q.shape[:3], v.shape[3])
    return (divided(o) if normalize else o), state


def divided(o):
    """The last column of o is the denominator of the others; where it is 0, so is the result."""
    den = o[..., -1:]
    empty = den == 0
    return torch.where(empty, 0.0, o[..., :-1] / torch.where(empty, 1.0, den))


def chunked(q, k, v, gate=None, beta=None, initial_state=None, feature=None, normalize=True, chunk=64):
    """(o, final_state) in the tensors' own dtype, chunk by chunk as the field's plain torch implementations do; causal."""
    q, k = feature_map(q, feature), feature_map(k, feature)
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    B, H, T, D = q.shape
    Dv = v.shape[3]
    pad = -T % chunk
    n = (T + pad) // chunk

    def cut(t):
        return F.pad(t, (0, 0) * (t.dim() - 3) + (0, pad)).unflatten(2, (n, chunk))  # (B, H, n, chunk, ...)

    q, k, v = cut(q), cut(k), cut(v)
    seen = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    b = None
    if gate is not None:
        b = cut(gate if gate.dim() == 4 else gate[..., None]).cumsum(3)  # (B, H, n, chunk, D|1)
    if b is None:
        scores = q @ k.mT
        decay = None
    elif b.shape[-1] == 1:
        decay = (b - b.mT).masked_fill(~seen, 0).exp()
        scores = (q @ k.mT) * decay
    else:
        decay = (b[..., :, None, :] - b[..., None, :, :]).masked_fill(~seen[..., None], 0).exp()
        scores = torch.einsum("bhnid,bhnjd,bhnijd->bhnij", q, k, decay)
    scores = scores.masked_fill(~seen, 0)
    q_in = q if b is None else q * b.exp()
    k_in = k if b is None else k * b.exp()
    k_out = k if b is None else k * (b[..., -1:, :] - b).exp()
    if beta is not None:
        strict = seen.tril(-1)
        if decay is not None and decay.dim() == 6:
            w = torch.einsum("bhnid,bhnjd,bhnijd->bhnij", k, k, decay)
        else:
            w = k @ k.mT if decay is None else (k @ k.mT) * decay
        bt = cut(beta)[..., None]
        a = bt * w.masked_fill(~strict, 0) + torch.eye(chunk, dtype=q.dtype)
    state = q.new_zeros(B, H, D, Dv) if initial_state is None else initial_state.to(q.dtype)
    out = []
    for c in range(n):
        u = v[:, :, c]
        if beta is not None:
            wide = torch.promote_types(q.dtype, torch.float32)
            rhs = bt[:, :, c] * (u - k_in[:, :, c] @ state)
            u = torch.linalg.solve_triangular(a[:, :, c].to(wide), rhs.to(wide), upper=False, unitriangular=True).to(q.dtype)
        out.append(q_in[:, :, c] @ state + scores[:, :, c] @ u)
        if b is not None:
            state = state * b[:, :, c, -1, :, None].exp()
        state = state + k_out[:, :, c].mT @ u
    o = torch.stack(out, 2).flatten(2, 3)[:, :, :T] if out else q.new_zeros(B, H, 0, Dv)
    return (divided(o) if normalize else o), state
