"""Attention free transformer: registration and the public function. The equations are in kernels/aft/aft.h."""

from __future__ import annotations

import torch

from .._backend import choose
from .._registry import (
    autocast,
    autocasting,
    create_graph,
    direct,
    graph_gradients,
    kernel,
    needs_grad,
    reference_if_transformed,
    register,
)
from ..kernels.aft import aft_ref
from ._tokens import check_tokens, inner_contiguous

_OP = "aft"
_GROUP = 32  # kTile and kMaxParts of aft.cu
_ARGS = "Tensor q, Tensor k, Tensor v, Tensor? bias, int window, bool causal"


def _new_forward(q, keep):
    """(o, y, den, peak): o laid out as (B, T, H, D), which an output projection reads without a copy; others may be empty."""
    _, H, T, D = q.shape
    o = torch.empty_strided(q.shape, (T * H * D, D, H * D, 1), dtype=q.dtype, device=q.device)
    kept = (torch.empty(q.shape if keep else (0,), dtype=torch.float32, device=q.device) for _ in range(3))
    return o, *kept


def _work(q, k, bias, window, causal, with_bias, backward, impl):
    """Memory for the GPU kernels' sums, as aft.h has it."""
    if impl == "cpu":
        return None
    (B, H, T, D), S = q.shape, k.shape[2]
    far = B * H * (-(-(T if backward else S) // _GROUP) + 1) * 3 * D
    floats = 0 if bias is not None and window == 0 else far * (2 if window and not causal else 1)
    if with_bias and bias.dim() == 2:
        floats = max(floats, min(max(-(-T // _GROUP), 1), _GROUP) * bias.numel())
    return torch.empty(floats, dtype=torch.float32, device=q.device)


def _fwd_launch(q, k, v, bias, window, causal, keep, impl):
    q, k, v = (inner_contiguous(t) for t in (q, k, v))
    o, *kept = _new_forward(q, keep)
    bias = None if bias is None else bias.contiguous()
    work = _work(q, k, bias, window, causal, False, False, impl)
    kernel(_OP, "fwd", impl)(q, k, v, bias, window, int(causal), o, *(kept if keep else (None,) * 3), work)
    return o, *kept


def _fwd_fake(q, k, v, bias, window, causal, keep, impl):
    return _new_forward(q, keep)


def _new_gradients(q, k, v, bias, with_bias):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    shape = bias.shape if with_bias else (0,)
    return *grads, torch.empty(shape, dtype=torch.float32, device=q.device)


def _bwd_launch(q, k, v, bias, window, causal, y, den, peak, d_o, with_bias, impl):
    dq, dk, dv, dbias = _new_gradients(q, k, v, bias, with_bias)
    q, k, v, d_o = (inner_contiguous(t) for t in (q, k, v, d_o))
    bias = None if bias is None else bias.contiguous()
    work = _work(q, k, bias, window, causal, with_bias, True, impl)
    kernel(_OP, "bwd", impl)(
        q, k, v, bias, window, int(causal), y, den, peak, d_o, dq, dk, dv, dbias if with_bias else None, work
    )  # fmt: skip
    return dq, dk, dv, dbias


def _bwd_fake(q, k, v, bias, window, causal, y, den, peak, d_o, with_bias, impl):
    return _new_gradients(q, k, v, bias, with_bias)


# window: 0 is none. keep: whether backward will come and needs y, den and peak.
_fwd = register(
    f"aft_fwd({_ARGS}, bool keep, str impl) -> (Tensor o, Tensor y, Tensor den, Tensor peak)",
    launch=_fwd_launch,
    fake=_fwd_fake,
)
_bwd = register(
    f"aft_bwd({_ARGS}, Tensor y, Tensor den, Tensor peak, Tensor d_o, bool with_bias, str impl)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    launch=_bwd_launch,
    fake=_bwd_fake,
)


class _Aft(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, window, causal, impl):
        fwd = _fwd_launch if direct(q, k, v, bias) else _fwd
        o, *kept = fwd(q, k, v, bias, window, causal, True, impl)
        ctx.window, ctx.causal, ctx.impl = window, causal, impl
        ctx.save_for_backward(q, k, v, bias, *kept)
        return o

    @staticmethod
    def backward(ctx, d_o):
        q, k, v, bias, *kept = ctx.saved_tensors
        tensors = (q, k, v, bias)
        need = ctx.needs_input_grad[:4]
        if create_graph():
            with torch.enable_grad():
                o = aft_ref.aft(*tensors, ctx.window or None, ctx.causal)
                return *graph_gradients(need, tensors, (o,), (d_o,)), None, None, None
        bwd = _bwd_launch if direct(*tensors, d_o) else _bwd
        grads = bwd(*tensors, ctx.window, ctx.causal, *kept, d_o, need[3], ctx.impl)
        return *(g if n else None for g, n in zip(grads, need)), None, None, None


def aft(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention without queries that meet keys: every feature is a mean of its values, weighted by key and position.

        o[t,d] = sigmoid(q[t,d]) * sum_j exp(k[j,d] + w[t,j]) v[j,d] / sum_j exp(k[j,d] + w[t,j])

    Source: Zhai et al. 2021, "An Attention Free Transformer" (arXiv 2105.14103). ``bias`` and ``window`` make the kinds of the
    paper; cost is that of two (T, S) x (S, D) products for AFT-full, and linear in the length for the others:

    - AFT-simple: neither; w is 0.
    - AFT-full: bias (1 or H, T, S) is w.
    - AFT-local: window s and bias (1 or H, T, 2 s - 1): w[t,j] = bias[t, j - t + s - 1] where \\|t - j\\| < s, else 0.
    - AFT-conv: window s and bias (1 or H, 2 s - 1): w[t,j] = bias[j - t + s - 1] likewise.

    Args:
        q: (B, H, T, D), float32, bfloat16 or float16 (others: the reference). Any strides.
        k: (B, H, S, D), or (B, H, S, 1) for all features; -inf hides a key. v: (B, H, S, D).
        bias: floating, as above; -inf hides a key from a query.
        window: at least 1. With causal the band's second half doesn't exist: bias has s columns, for j = t - s + 1 to t.
        causal: query t sees keys up to t; S = T.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        o (B, H, T, D) in q's dtype; 0 where a query sees no key. Differentiable in every tensor; second derivatives,
        forward-mode AD and torch.func go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    if autocasting(q.device.type):
        q, k, v = autocast(q.device.type, q, k, v)
    k = _check(q, k, v, bias, window, causal)
    impl = reference_if_transformed(_OP, impl)
    backend = choose(_OP, impl, q)
    if backend != "reference" and q.shape[3] == 0:
        if impl is not None:
            raise ValueError(f"{_OP}: impl={impl!r} can't serve this call: D must be at least 1")
        backend = "reference"
    if backend == "reference":
        return aft_ref.aft(q, k, v, bias, window, causal)
    bias = None if bias is None else bias.float()
    tensors = (q, k, v, bias)
    if needs_grad(*tensors):
        return _Aft.apply(*tensors, window or 0, causal, backend)
    run = _fwd_launch if direct(*tensors) else _fwd
    return run(*tensors, window or 0, causal, False, backend)[0]


def _check(q, k, v, bias, window, causal) -> torch.Tensor:
    """k as wide as v; raises where the arguments break a rule."""
    check_tokens(_OP, q, k, v, ("(B, H, T, D)", "(B, H, S, D)", "(B, H, S, D)"))
    B, H, T, D = q.shape
    if v.shape[:2] != q.shape[:2] or v.shape[3] != D:
        raise ValueError(f"{_OP}: v must be (B, H, S, D) with q's B, H, D of {(B, H, T, D)}; got {tuple(v.shape)}")
    S = v.shape[2]
    if k.shape != v.shape and k.shape != (B, H, S, 1):
        raise ValueError(f"{_OP}: k must be (B, H, S, D) or (B, H, S, 1) with v's {tuple(v.shape)}; got {tuple(k.shape)}")
    if causal and S != T:
        raise ValueError(f"{_OP}: causal needs as many keys as queries; got {S} and {T}")
    if window is not None and (window < 1 or bias is None):
        raise ValueError(f"{_OP}: window must be at least 1 and come with a bias; got {window}")
    if bias is not None:
        columns = S if window is None else window if causal else 2 * window - 1
        shapes = [(T, columns)] if window is None else [(T, columns), (columns,)]
        if bias.dim() < 2 or bias.shape[0] not in (1, H) or tuple(bias.shape[1:]) not in shapes:
            wanted = " or ".join(str((f"1 or {H}", *s)).replace("'", "") for s in shapes)
            raise ValueError(f"{_OP}: bias must be {wanted}; got {tuple(bias.shape)}")
        if not bias.is_floating_point() or bias.device != q.device:
            raise ValueError(f"{_OP}: bias must be floating and on {q.device}; got {bias.dtype} on {bias.device}")
    return k.expand(v.shape)
