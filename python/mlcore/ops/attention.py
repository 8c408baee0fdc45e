"""Softmax attention: registration and the public functions. The equations are in kernels/attention/attention.h."""

from __future__ import annotations

import math

import torch

from .._backend import choose
from .._pattern_tree import dense
from .._registry import (
    autocast,
    autocasting,
    create_graph,
    direct,
    direct_apply,
    graph_gradients,
    lean_rows,
    needs_grad,
    reference_if_transformed,
    register,
)
from ..patterns import Pattern
from ._attention_launch import bwd_fake, bwd_launch, fwd_fake, fwd_launch, lean_bwd, lean_fwd, new_lse
from ._tokens import check_tokens

_OP = "attention"
_MAX_HEAD_DIM = 256  # of the kernels; the reference takes any

# spec and tensors are a pattern (mlcore.patterns): the launcher lowers them for the lengths that it meets, so a compiled graph
# serves all of them. bias is 4-D, its dimensions those of the scores or 1. seed: one int64, read only with dropout.
_ARGS = (
    "Tensor? bias, Tensor? relative, Tensor? sinks, Tensor? seed, Tensor[] tensors, str spec, "
    "float scale, float softcap, float dropout_p, str impl"
)
_EVERYTHING, _CAUSAL, _TOP_LEFT = "('and',)", "('band', -1, 0, 1)", "('band', -1, 0, 0)"
_fwd = register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGS}) -> (Tensor o, Tensor lse)",
    launch=fwd_launch,
    fake=fwd_fake,
    lower_precision=True,
)
_bwd = register(
    f"attention_bwd(Tensor q, Tensor k, Tensor v, {_ARGS}, Tensor o, Tensor lse, Tensor d_o, Tensor? d_lse, bool need_dbias, "
    "bool need_drelative) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor drelative)",
    launch=bwd_launch,
    fake=bwd_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, relative, sinks, seed, spec, scale, softcap, dropout_p, impl, *tensors):
        fwd = fwd_launch if direct(q, k, v, bias, relative, sinks, *tensors) else _fwd
        ctx.numbers = (scale, softcap, dropout_p, impl)
        ctx.spec = spec
        o, lse = fwd(q, k, v, bias, relative, sinks, seed, tensors, spec, *ctx.numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, relative, sinks, seed, o, lse, *tensors)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, d_lse):
        d_lse = None if d_lse is None else d_lse[0]
        q, k, v, bias, relative, sinks, seed, o, lse, *tensors = ctx.saved_tensors
        need_dbias, need_drelative, need_dsinks = ctx.needs_input_grad[3:6]
        others = (None,) * (len(ctx.needs_input_grad) - 6)
        if create_graph():
            inputs = (q, k, v, bias, relative, sinks)
            return *_differentiable_gradients(ctx, inputs, seed, tensors, (d_o, d_lse)), *others
        if d_o is None:
            d_o = torch.zeros_like(o)
        bwd = bwd_launch if direct(q, k, v, bias, relative, sinks, d_o, d_lse, *tensors) else _bwd
        dq, dk, dv, dbias, drelative = bwd(
            q, k, v, bias, relative, sinks, seed, tensors, ctx.spec, *ctx.numbers,
            o, lse, d_o, d_lse, need_dbias, need_drelative,
        )  # fmt: skip
        wanted = [g if need else None for g, need in zip((dq, dk, dv, dbias, drelative), ctx.needs_input_grad)]
        return *wanted, _sinks_gradient(sinks, o, lse, d_o, d_lse) if need_dsinks else None, *others


class _LeanAttention(torch.autograd.Function):
    """_Attention for what _lean() lets through: a band and nothing else, on the CPU."""

    @staticmethod
    def forward(ctx, q, k, v, right, offset, scale, spec):
        lse = new_lse(q)
        o = lean_fwd(q, k, v, right, offset, scale, lse)
        ctx.band, ctx.spec, ctx.numbers = (right, offset, scale), spec, (scale, 0.0, 0.0, "cpu")
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, d_o):
        q, k, v, o, lse = ctx.saved_tensors
        if create_graph():
            inputs = (q, k, v, None, None, None)
            return *_differentiable_gradients(ctx, inputs, None, (), (d_o, None))[:3], None, None, None, None
        if lean_rows(q, k, v, d_o):
            grads = lean_bwd(q, k, v, *ctx.band, o, lse, d_o)
        else:
            grads = _bwd(q, k, v, None, None, None, None, (), ctx.spec, *ctx.numbers, o, lse, d_o, None, False, False)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3])), None, None, None, None


_lean_apply = direct_apply(_LeanAttention)


def _sinks_gradient(sinks, o, lse, d_o, d_lse):
    """A sink is a score whose value is 0: its gradient is p * (0 - delta)."""
    delta = (o.float() * d_o.float()).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    p = torch.exp(sinks[:, None] - lse[0]) * lse[1]
    return -(p * delta).sum((0, 2))


def _differentiable_gradients(ctx, inputs, seed, tensors, gradients):
    """(dq, dk, dv, dbias, drelative, dsinks) with a graph, for create_graph=True: the reference's, which differentiates on.
    inputs: q, k, v, bias, relative, sinks; gradients: those of o and lse, or None."""
    with torch.enable_grad():
        outputs = _reference(*inputs, seed, tensors, ctx.spec, *ctx.numbers[:-1])
        return graph_gradients(ctx.needs_input_grad, inputs, outputs, gradients)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: Pattern | torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    relative: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention (Vaswani et al. 2017, "Attention Is All You Need"), computed tile by tile without a T x T matrix.

    o = softmax(scale * q k^T + bias) v, over the keys that a query may see. A query that sees none gives o = 0, lse = -inf
    and no gradient; what its unseen keys and values hold, NaN included, never reaches it.

    Args:
        q: (B, H, Tq, D), float32, bfloat16 or float16 (others, and head dims above 256: the reference). Any strides.
        k: (B, Hkv, Tk, D); Hkv divides H: each key head serves H / Hkv query heads.
        v: (B, Hkv, Tk, Dv).
        pattern: who sees whom: a pattern of mlcore.patterns, e.g. ``Causal() & Window(255, 0)``, of which only the 64 x 64
            tiles that it touches cost anything, or a boolean tensor broadcastable to (B, H, Tq, Tk), True where the query
            sees the key.
        causal: the same as ``& Causal()``: query i sees keys up to i + Tk - Tq, the last one all of them.
        scale: of q k^T; None is 1 / sqrt(D).
        bias: added to the scaled scores, floating, broadcastable to (B, H, Tq, Tk); differentiable.
        relative: added to the scores by distance alone, without a T x T matrix: (B|1, H|1, Tq + Tk - 1) or (H|1, Tq + Tk - 1),
            floating and finite; query i and key j take element j - i + Tq - 1. Differentiable, so a table of buckets is
            (see mlcore.ops.t5_relative). In float32 whatever q is.
        alibi_slopes: (H,) or (B, H): -slope * |i + Tk - Tq - j| is added, as flash-attn does (Press et al. 2022, "Train Short,
            Test Long"); differentiable.
        sinks: (H,): one more score a head, of no key and without a value, that a query may spend its weight on (Xiao et al.
            2024; gpt-oss); lse includes it. Differentiable.
        softcap: scores become softcap * tanh(score / softcap) before the bias (Gemma 2).
        return_lse: also return the log of the softmax's denominator.
        dropout_p: probability that a weight is dropped; the mask is a function of a seed from torch's generator.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        o (B, H, Tq, Dv) in q's dtype; with return_lse the pair (o, lse), lse (B, H, Tq) float32. Both are differentiable;
        second derivatives, forward-mode AD and torch.func transforms go through the reference and its T x T matrix.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    plain = pattern is bias is relative is alibi_slopes is sinks is softcap is impl is None
    if plain and not return_lse and dropout_p == 0.0 and (o := _lean(q, k, v, causal, True, scale)) is not None:
        return o
    if relative is not None or alibi_slopes is not None or sinks is not None:
        _check_qkv(q, k, v)
        relative, sinks = _distances(q, k, relative, alibi_slopes), _checked_sinks(q, sinks)
    spec = _CAUSAL if causal else None
    return _attention(q, k, v, pattern, bias, spec, scale, softcap, dropout_p, return_lse, impl, relative, sinks)


def _lean(q, k, v, causal, bottom_right, scale):
    """o of a call that nothing but autograd watches and that asks for nothing but a causal band, with as few questions as
    possible, or None: the general way takes it, or says what is wrong."""
    way = lean_rows(q, k, v)
    if way == 0 or q.dim() != 4 or torch.is_autocast_enabled("cpu"):
        return None
    D = q.shape[3]
    if scale is None:
        scale = 1.0 / math.sqrt(D) if D else 1.0
    elif type(scale) is not float:
        return None
    right = 0 if causal else -1
    try:
        offset = k.shape[2] - q.shape[2] if bottom_right else 0
        if way == 1:
            return lean_fwd(q, k, v, right, offset, scale)
        return _lean_apply(q, k, v, right, offset, scale, (_CAUSAL if bottom_right else _TOP_LEFT) if causal else _EVERYTHING)
    except (TypeError, ValueError, IndexError):
        return None


def _distances(q, k, relative, slopes):
    """relative and ALiBi as one (B|1, H|1, Tq + Tk - 1) tensor, float32 (float64 for the reference), or None."""
    B, H, Tq, Tk = *q.shape[:3], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if relative is not None:
        want = (B, H, Tq + Tk - 1)
        got = (1,) * (3 - relative.dim()) + tuple(relative.shape)
        if relative.dim() not in (2, 3) or got[2] != want[2] or any(n not in (1, w) for n, w in zip(got, want)):
            raise ValueError(
                f"attention: relative must be (B|1, H|1, Tq + Tk - 1) of {want}; got shape {tuple(relative.shape)}"
            )
        if not relative.is_floating_point() or relative.device != q.device:
            raise ValueError(f"attention: relative must be floating and on {q.device}; got {relative.dtype}, {relative.device}")
        relative = relative.reshape(got).to(wide)
    if slopes is None:
        return relative
    if tuple(slopes.shape) not in ((H,), (B, H)) or not slopes.is_floating_point() or slopes.device != q.device:
        raise ValueError(
            f"attention: alibi_slopes must be floating, (H,) or (B, H) = ({B}, {H}), on {q.device}; "
            f"got {slopes.dtype}, shape {tuple(slopes.shape)}, {slopes.device}"
        )
    distance = (torch.arange(Tq + Tk - 1, device=q.device) - (Tk - 1)).abs().to(wide)
    alibi = -slopes.to(wide).reshape(-1, H, 1) * distance
    return alibi if relative is None else relative + alibi


def _checked_sinks(q, sinks):
    if sinks is None:
        return None
    if tuple(sinks.shape) != (q.shape[1],) or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"attention: sinks must be floating, (H,) = ({q.shape[1]},), on {q.device}; "
            f"got {sinks.dtype}, shape {tuple(sinks.shape)}, {sinks.device}"
        )
    return sinks.to(torch.promote_types(q.dtype, torch.float32))


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention, argument for argument, computed by mlcore.ops.attention.

    Args:
        query: (..., H, L, E); key: (..., Hkv, S, E); value: (..., Hkv, S, Ev). Leading dimensions broadcast.
        attn_mask: broadcastable to (..., H, L, S): boolean, True where a query sees a key, or floating, added to the scores.
        dropout_p: applied always, as torch does; the dropped weights differ from torch's for the same seed.
        is_causal: query i sees keys up to i (top-left aligned), of those that attn_mask lets it see.
        scale: None is 1 / sqrt(E).
        enable_gqa: Hkv may divide H.

    Returns:
        (..., H, L, Ev) in query's dtype.

    Raises:
        ValueError, RuntimeError: as torch's rules are broken.
    """
    if attn_mask is None and dropout_p == 0.0 and (enable_gqa or query.shape[:-2] == key.shape[:-2]):
        o = _lean(query, key, value, is_causal, False, scale)
        if o is not None:
            return o
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise ValueError(
            "scaled_dot_product_attention: query, key and value must have at least 2 dimensions; got "
            f"{query.dim()}, {key.dim()}, {value.dim()}"
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(
            f"scaled_dot_product_attention: attn_mask must be torch.bool, torch.float32 or {query.dtype} as query; "
            f"got {attn_mask.dtype}"
        )
    lead, q, k, v = _four_dims(query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None:
        mask = attn_mask if len(lead) <= 2 else attn_mask.expand(*lead, *attn_mask.shape[-2:]).flatten(0, -4)
    is_bool = mask is not None and mask.dtype == torch.bool
    pattern, bias = (mask, None) if is_bool else (None, mask)
    o = _attention(q, k, v, pattern, bias, _TOP_LEFT if is_causal else None, scale, None, dropout_p, False, None)
    return o if len(lead) == 2 else o.reshape(*lead, *o.shape[-2:])


def _four_dims(query, key, value, enable_gqa):
    """(leading dims, q, k, v as 4-D): batch dimensions flattened, and broadcast where they differ."""
    lead_q, lead_k, lead_v = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if len(lead_q) == 2 and lead_q == lead_k == lead_v:
        return lead_q, query, key, value
    if enable_gqa:
        if min(len(lead_q), len(lead_k), len(lead_v)) < 1 or lead_k[-1] != lead_v[-1] or lead_q[-1] % max(lead_k[-1], 1):
            raise ValueError(
                "scaled_dot_product_attention: with enable_gqa key and value must have the same number of heads, dividing "
                f"query's; got shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        batch = torch.broadcast_shapes(lead_q[:-1], lead_k[:-1], lead_v[:-1])
        lead = (*batch, lead_q[-1])
        heads = (lead_q[-1], lead_k[-1], lead_v[-1])
    else:
        lead = tuple(torch.broadcast_shapes(lead_q, lead_k, lead_v))
        batch, heads = lead[:-1], lead[-1:] * 3

    def flat(t, n):
        t = t.expand(*batch, n, *t.shape[-2:]) if lead else t
        return t.reshape(math.prod(batch), n, *t.shape[-2:]) if lead else t[None, None]

    if not lead:
        heads = (1, 1, 1)
    return lead, flat(query, heads[0]), flat(key, heads[1]), flat(value, heads[2])


def _attention(q, k, v, pattern, bias, spec, scale, softcap, dropout_p, return_lse, impl, relative=None, sinks=None):
    """Checks and completes the arguments. spec: of what must hold besides the pattern, or None."""
    _check_qkv(q, k, v)
    Tk, D = k.shape[2], q.shape[3]
    if scale is None:
        scale = 1.0 / math.sqrt(D) if D else 1.0
    elif isinstance(scale, torch.Tensor) or not math.isfinite(scale):
        raise ValueError(f"attention: scale must be a finite number; got {scale}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"attention: softcap must be a positive number or None; got {softcap}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1]; got {dropout_p}")
    tensors = ()
    if isinstance(pattern, Pattern):
        tensors = pattern.tensors
        spec = pattern.spec if spec is None else f"('and', {pattern.spec}, {spec})"
    elif pattern is not None:
        _check_broadcastable("pattern", pattern, q, Tk)
        if pattern.dtype != torch.bool:
            raise ValueError(f"attention: pattern must be a boolean tensor, True where a query sees a key; got {pattern.dtype}")
        tensors = (pattern,)
        spec = "('dense',)" if spec is None else f"('and', ('dense',), {spec})"
    elif spec is None:
        spec = _EVERYTHING
    if bias is not None:
        _check_broadcastable("bias", bias, q, Tk)
        bias = bias if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]
        if not bias.is_floating_point():
            raise ValueError(f"attention: bias must be a floating-point tensor; got {bias.dtype}")
    return _run(q, k, v, bias, relative, sinks, tensors, spec, float(scale), softcap, float(dropout_p), return_lse, impl)


def _check_qkv(q, k, v) -> None:
    qs, ks, vs = q.shape, k.shape, v.shape
    if (
        len(qs) == len(ks) == len(vs) == 4
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and qs[0] == ks[0] == vs[0]
        and qs[3] == ks[3]
        and ks[1] == vs[1]
        and ks[2] == vs[2]
        and ks[1]
        and qs[1] % ks[1] == 0
        and q.is_floating_point()
    ):
        return
    _refuse_qkv(q, k, v)


def _refuse_qkv(q, k, v) -> None:
    """Raises for the first rule that is broken; none may be, where there are no heads at all."""
    check_tokens(_OP, q, k, v, ("(B, H, Tq, D)", "(B, Hkv, Tk, D)", "(B, Hkv, Tk, Dv)"))
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention: k must be (B, Hkv, Tk, D) with q's B, D = {q.shape[0]}, {q.shape[3]}; got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: v must be (B, Hkv, Tk, Dv) with k's B, Hkv, Tk = {tuple(k.shape[:3])}; got {tuple(v.shape)}"
        )
    if (q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]) != 0:
        raise ValueError(f"attention: k has {k.shape[1]} heads, which must divide q's {q.shape[1]}")


def _check_broadcastable(name, t, q, Tk):
    if not isinstance(t, torch.Tensor):
        kind = "a pattern of mlcore.patterns or a tensor" if name == "pattern" else "a tensor"
        raise TypeError(f"attention: {name} must be {kind}; got {type(t).__name__}")
    want = (q.shape[0], q.shape[1], q.shape[2], Tk)
    got = (1,) * (4 - t.dim()) + tuple(t.shape)
    if t.dim() > 4 or any(n != w and n != 1 for n, w in zip(got, want)):
        raise ValueError(f"attention: {name} must broadcast to (B, H, Tq, Tk) = {want}; got shape {tuple(t.shape)}")
    if t.device != q.device:
        raise ValueError(f"attention: {name} must be on {q.device} as q; got {t.device}")


def _run(q, k, v, bias, relative, sinks, *call):
    """_dispatch under torch.autocast's rule. relative and sinks stay float32, which the op's own rule would not let them."""
    device = q.device.type
    if autocasting(device):
        q, k, v = autocast(device, q, k, v)
        if relative is not None or sinks is not None:
            with torch.autocast(device, enabled=False):
                return _dispatch(q, k, v, bias, relative, sinks, *call)
    return _dispatch(q, k, v, bias, relative, sinks, *call)


def _dispatch(q, k, v, bias, relative, sinks, tensors, spec, scale, softcap, dropout_p, return_lse, impl):
    impl = reference_if_transformed(_OP, impl)
    backend = choose(_OP, impl, q)
    widest = max(q.shape[3], v.shape[3])
    if backend != "reference" and not (1 <= widest <= _MAX_HEAD_DIM and q.shape[3] and v.shape[3]):
        if impl is not None:
            raise ValueError(
                f"attention: impl={impl!r} can't serve this call: head dims must be 1 to {_MAX_HEAD_DIM}; got {widest}"
            )
        backend = "reference"
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device="cpu") if dropout_p > 0 else None  # reading it stops no device
    if bias is not None and bias.dtype == torch.float64 and backend != "reference":
        bias = bias.float()
    if backend == "reference":
        o, lse = _reference(q, k, v, bias, relative, sinks, seed, tensors, spec, scale, softcap, dropout_p)
        return (o, lse) if return_lse else o
    if bias is not None and bias.stride(3) not in (0, 1):
        bias = bias.contiguous()
    numbers = (scale, softcap or 0.0, dropout_p, backend)
    relative = None if relative is None else relative.float()
    sinks = None if sinks is None else sinks.float().contiguous()
    if relative is not None and relative.stride(-1) != 1:
        relative = relative.contiguous()
    if needs_grad(q, k, v, bias, relative, sinks):
        if torch.compiler.is_compiling():
            q, k, v, bias, relative, sinks, *tensors = _distinct(q, k, v, bias, relative, sinks, *tensors)
        o, lse = _Attention.apply(q, k, v, bias, relative, sinks, seed, spec, *numbers, *tensors)
    elif direct(q, k, v, bias, relative, sinks, *tensors):
        o, lse = fwd_launch(q, k, v, bias, relative, sinks, seed, tensors, spec, *numbers)
    else:
        o, lse = _fwd(q, k, v, bias, relative, sinks, seed, tensors, spec, *numbers)
    return (o, lse[0]) if return_lse else o


def _distinct(*tensors):
    """The tensors, views in place of those that were there before: torch.compile refuses one tensor as two inputs."""
    seen, out = [], []
    for t in tensors:
        again = t is not None and any(t is s for s in seen)
        out.append(t.view_as(t) if again else t)
        seen.append(t)
    return out


def _reference(q, k, v, bias, relative, sinks, seed, tensors, spec, scale, softcap, dropout_p):
    from ..kernels.attention import attention_ref

    mask = None if spec == _EVERYTHING else dense(spec, tensors, q.shape[2], k.shape[2], q.device)
    terms = {"mask": mask, "bias": bias, "relative": relative, "sinks": sinks, "seed": int(seed) if seed is not None else 0}
    o, lse = attention_ref.attention(q, k, v, scale=scale, softcap=softcap or None, dropout_p=dropout_p, **terms)
    return o.to(q.dtype), lse
