"""Attention's launchers: they allocate, ask for the pattern's schedule, and call the backend's kernel."""

from __future__ import annotations

import torch

from .. import _C
from .._registry import kernel
from ._attention_device import on_device
from ._attention_schedule import schedule
from ._tokens import inner_contiguous

_OP = "attention"
_cpu_fwd, _cpu_bwd = _C.launch.attention_fwd, _C.launch.attention_bwd


def _schedule(q, k, tensors, spec, impl):
    made = schedule(spec, tensors, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return made if impl == "cpu" else on_device(made, q.shape[2], k.shape[2], q.device)


def _new_output(q, v):
    """(B, H, Tq, Dv), laid out as (B, Tq, H, Dv): what the output projection reads without a copy."""
    B, H, Tq, _ = q.shape
    Dv = v.shape[3]
    return torch.empty_strided((B, H, Tq, Dv), (Tq * H * Dv, Dv, H * Dv, 1), dtype=q.dtype, device=q.device)


def new_lse(q):
    """(2, B, H, Tq): the log-sum-exp, and the factor that its rounding lost (attention.h)."""
    B, H, Tq, _ = q.shape
    return torch.empty((2, B, H, Tq), dtype=torch.float32, device=q.device)


def fwd_launch(q, k, v, bias, relative, sinks, seed, tensors, spec, scale, softcap, dropout_p, impl):
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    o = _new_output(q, v)
    lse = new_lse(q)
    fwd = kernel(_OP, "fwd", impl)
    number = int(seed) if seed is not None else 0
    fwd(q, k, v, bias, relative, sinks, *_schedule(q, k, tensors, spec, impl), scale, softcap, dropout_p, number, o, lse)
    return o, lse


# The arguments of a call with nothing but a band, from no bias to no seed.
def _band(right, offset, scale):
    return None, None, None, -1, right, offset, None, None, None, None, 1, 1, scale, 0.0, 0.0, 0


def lean_fwd(q, k, v, right, offset, scale, lse=None):
    """o of a call with nothing but a band, on the CPU."""
    o = _new_output(q, v)
    _cpu_fwd(q, k, v, *_band(right, offset, scale), o, lse)
    return o


def lean_bwd(q, k, v, right, offset, scale, o, lse, d_o):
    """dq, dk, dv of lean_fwd's call."""
    dq, dk, dv = _new_gradients(q, k, v)
    _cpu_bwd(q, k, v, *_band(right, offset, scale), o, lse, d_o, None, dq, dk, dv, None, None, None)
    return dq, dk, dv


def fwd_fake(q, k, v, bias, relative, sinks, seed, tensors, spec, scale, softcap, dropout_p, impl):
    return _new_output(q, v), new_lse(q)


def _new_gradients(*inputs):
    """Laid out as their tensors, but for a last dimension that a kernel could not take."""
    return [torch.empty_like(t) if t.stride(-1) == 1 else _new_contiguous(t) for t in inputs]


def _new_contiguous(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def bwd_launch(q, k, v, bias, relative, sinks, seed, tensors, spec, scale, softcap, dropout_p, impl, *rest):
    o, lse, d_o, d_lse, need_dbias, need_drelative = rest
    per_key = need_dbias and bias.shape[3] == k.shape[2]
    dq, dk, dv = _new_gradients(q, k, v)
    # As its kernel sums it: fp32, contiguous, every key of its own.
    dbias = torch.zeros(*bias.shape[:3], k.shape[2], dtype=torch.float32, device=q.device) if per_key else None
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    d_lse = None if d_lse is None else d_lse.contiguous()
    bwd = kernel(_OP, "bwd", impl)
    drelative = _new_drelative(q, k, need_drelative)
    number = int(seed) if seed is not None else 0
    bwd(
        q, k, v, bias, relative, sinks, *_schedule(q, k, tensors, spec, impl), scale, softcap, dropout_p, number,
        o, lse, inner_contiguous(d_o), d_lse, dq, dk, dv, dbias,
        drelative if need_drelative else None, torch.empty_like(lse[0]),
    )  # fmt: skip
    dbias = _reduced_dbias(dbias, bias, lse, d_lse) if need_dbias else q.new_empty(0)
    if need_drelative:
        drelative = drelative.sum_to_size(relative.shape).contiguous()
    return dq, dk, dv, dbias, drelative


def _new_drelative(q, k, wanted):
    """A head of a sequence sums for itself."""
    length = max(q.shape[2] + k.shape[2] - 1, 0)
    return q.new_zeros(q.shape[0], q.shape[1], length, dtype=torch.float32) if wanted else q.new_empty(0, dtype=torch.float32)


def _reduced_dbias(dbias, bias, lse, d_lse):
    if dbias is not None:
        return dbias.to(bias.dtype)
    # The same for all keys: it cancels in the softmax and moves lse alone.
    if d_lse is None:
        return torch.zeros_like(bias, memory_format=torch.contiguous_format)
    d_lse = torch.where(lse[0] == float("-inf"), 0.0, d_lse).unsqueeze(-1)
    return d_lse.sum_to_size(bias.shape).to(bias.dtype).contiguous()


def bwd_fake(q, k, v, bias, relative, sinks, seed, tensors, spec, scale, softcap, dropout_p, impl, *rest):
    need_dbias, need_drelative = rest[-2:]
    dbias = _new_contiguous(bias) if need_dbias else q.new_empty(0)
    drelative = _new_contiguous(relative) if need_drelative else _new_drelative(q, k, False)
    return *_new_gradients(q, k, v), dbias, drelative
