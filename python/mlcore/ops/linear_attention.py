"""Linear attention: registration and the public functions. The equations are in kernels/linear_attention/linear_attention.h."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._backend import RULES, choose
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
    transformed,
)
from ..kernels.linear_attention import linear_attention_ref
from ._tokens import check_tokens, inner_contiguous

_OP = "linear_attention"
_MAPS = (None, "elu", "relu", "softmax")
_SPAN = 512  # tokens between the states that are kept for backward: 1 / 8 of them, and 8 chunks of 64 fit the L2 cache


def _triton_takes(q: torch.Tensor, grad: bool) -> str | None:
    D = q.shape[-1]
    return f"q's head dim is {D}, the triton kernels hold states of at most 256 rows" if D > 256 else None


def _cuda_takes(q: torch.Tensor, grad: bool) -> str | None:
    """The recurrence, token by token: a step's one, or a few. 64 is a chunk of the other kernels, not a measured limit."""
    if q.dim() == 3:
        return None
    if grad:
        return "the cuda kernels have no backward pass"
    if q.shape[2] > 64 or q.shape[3] > 512:
        return f"the cuda kernels take up to 64 tokens and head dims up to 512; got {q.shape[2]} and {q.shape[3]}"
    return None


RULES[_OP, "triton"] = _triton_takes
RULES[_OP, "cuda"] = _cuda_takes

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, int feature, "
    "bool normalize, bool causal"
)


def _readable(gate):
    """gate with contiguous features, where it has some."""
    return gate if gate is None or gate.dim() < 4 else inner_contiguous(gate)


def _sequences(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _new_output(q, v):
    """(B, H, Tq, Dv), laid out as (B, Tq, H, Dv): what the output projection reads without a copy."""
    B, H, Tq, _ = q.shape
    Dv = v.shape[3]
    return torch.empty_strided((B, H, Tq, Dv), (Tq * H * Dv, Dv, H * Dv, 1), dtype=q.dtype, device=q.device)


def _new_state(q, v, cu_seqlens, normalize):
    shape = (_sequences(q, cu_seqlens), q.shape[1], q.shape[3], v.shape[3] + normalize)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _new_forward(q, v, cu_seqlens, normalize, causal, keep):
    """(o, den, final_state, states); what isn't wanted is empty, as a schema has a fixed number of outputs."""
    B, H, Tq, D = q.shape
    den = torch.empty((B, H, Tq) if normalize else (0,), dtype=torch.float32, device=q.device)
    slots = Tq // _SPAN + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    shape = (B, H, slots, D, v.shape[3] + normalize) if keep and causal else (0,)
    states = torch.empty(shape, dtype=torch.float32, device=q.device)
    return _new_output(q, v), den, _new_state(q, v, cu_seqlens, normalize), states


def _fwd_launch(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, keep, impl):
    q, k, v = (inner_contiguous(t) for t in (q, k, v))
    gate = _readable(gate)
    o, den, final_state, states = _new_forward(q, v, cu_seqlens, normalize, causal, keep)
    initial_state = None if initial_state is None else initial_state.contiguous()
    numbers = (feature, int(normalize), int(causal), _SPAN)
    kernel(_OP, "fwd", impl)(
        q, k, v, gate, beta, initial_state, cu_seqlens, *numbers,
        o, den if normalize else None, final_state, states if keep and causal else None,
    )  # fmt: skip
    return o, den, final_state, states


def _fwd_fake(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, keep, impl):
    return _new_forward(q, v, cu_seqlens, normalize, causal, keep)


def _new_gradients(q, k, v, gate, beta, initial_state):
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    for t in (gate, beta, initial_state):
        grads.append(torch.empty((0,) if t is None else t.shape, dtype=torch.float32, device=q.device))
    return grads


def _bwd_launch(
    q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, o, den, states, d_o, d_final_state, impl
):  # fmt: skip
    dq, dk, dv, *others = _new_gradients(q, k, v, gate, beta, initial_state)
    wanted = [g if t is not None else None for g, t in zip(others, (gate, beta, initial_state))]
    q, k, v, o, d_o = (inner_contiguous(t) for t in (q, k, v, o, d_o))
    gate = _readable(gate)
    d_final_state = None if d_final_state is None else d_final_state.contiguous()
    kernel(_OP, "bwd", impl)(
        q, k, v, gate, beta, cu_seqlens, feature, int(normalize), int(causal), _SPAN,
        o, den if normalize else None, states, d_o, d_final_state, dq, dk, dv, *wanted,
    )  # fmt: skip
    return dq, dk, dv, *others


def _bwd_fake(
    q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, o, den, states, d_o, d_final_state, impl
):  # fmt: skip
    return tuple(_new_gradients(q, k, v, gate, beta, initial_state))


def _step_launch(q, k, v, gate, beta, state, feature, normalize, impl):
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    new_state = torch.empty(state.shape, dtype=torch.float32, device=q.device)
    q, k, v = (inner_contiguous(t) for t in (q, k, v))
    if gate is not None and gate.dim() == 3 and gate.stride(-1) != 1:
        gate = gate.contiguous()
    kernel(_OP, "step", impl)(q, k, v, gate, beta, state.contiguous(), feature, int(normalize), o, new_state)
    return o, new_state


def _step_fake(q, k, v, gate, beta, state, feature, normalize, impl):
    return torch.empty(v.shape, dtype=q.dtype, device=q.device), torch.empty(state.shape, dtype=torch.float32, device=q.device)


# feature: a position in _MAPS. keep: whether backward will come and needs states.
_fwd = register(
    f"linear_attention_fwd({_ARGS}, bool keep, str impl) -> (Tensor o, Tensor den, Tensor final_state, Tensor states)",
    launch=_fwd_launch,
    fake=_fwd_fake,
)
_bwd = register(
    f"linear_attention_bwd({_ARGS}, Tensor o, Tensor den, Tensor states, Tensor d_o, Tensor? d_final_state, str impl)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate, Tensor dbeta, Tensor d_initial_state)",
    launch=_bwd_launch,
    fake=_bwd_fake,
)
_step = register(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? beta, Tensor state, int feature, "
    "bool normalize, str impl) -> (Tensor o, Tensor new_state)",
    launch=_step_launch,
    fake=_step_fake,
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, impl):
        fwd = _fwd_launch if direct(q, k, v, gate, beta, initial_state) else _fwd
        tensors = (q, k, v, gate, beta, initial_state, cu_seqlens)
        o, den, final_state, states = fwd(*tensors, feature, normalize, causal, True, impl)
        ctx.numbers = (feature, normalize, causal)
        ctx.impl = impl
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, o, den, states if causal else final_state)
        return o, final_state

    @staticmethod
    def backward(ctx, d_o, d_final_state):
        *tensors, o, den, states = ctx.saved_tensors
        need = ctx.needs_input_grad[:6]
        if create_graph():
            grads = _differentiable_gradients(ctx, tensors, d_o, d_final_state)
        else:
            if d_o is None:
                d_o = torch.zeros_like(o)
            bwd = _bwd_launch if direct(*tensors, d_o, d_final_state) else _bwd
            grads = bwd(*tensors, *ctx.numbers, o, den, states, d_o, d_final_state, ctx.impl)
            grads = [g.to(t.dtype) if n else None for g, t, n in zip(grads, tensors, need)]
        return *grads, *(None for _ in range(5))


def _differentiable_gradients(ctx, tensors, d_o, d_final_state):
    """Gradients with a graph, for create_graph=True: the reference's, which differentiates without end."""
    with torch.enable_grad():
        outputs = _reference(*tensors, *ctx.numbers)
        return graph_gradients(ctx.needs_input_grad, tensors[:6], outputs, (d_o, d_final_state))


def _reference(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal):
    o, state = linear_attention_ref.linear_attention(
        q, k, v, gate, beta, initial_state, cu_seqlens, _MAPS[feature], normalize, causal
    )
    return o, state


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str | Callable[[torch.Tensor], torch.Tensor] | None = "elu",
    normalize: bool = True,
    causal: bool = True,
    decay: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention whose cost is linear in the length: a state S (D, Dv) that every token updates and reads.

    With phi the feature map, token by token (one batch entry, one head):

        S = exp(gate_t + decay) * S;   u = v_t, or with beta: u = beta_t * (v_t - phi(k_t) S)
        S = S + phi(k_t)^T u;          o_t = phi(q_t) S, with normalize divided by what it would be with all values 1

    Katharopoulos et al. 2020, "Transformers are RNNs" (the default arguments); Sun et al. 2023, "Retentive Network" (decay);
    Yang et al. 2024, "Gated Linear Attention" (gate); Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight
    Programmers" and Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule" (beta); Yang et al. 2025, "Gated
    Delta Networks" (gate and beta).

    Args:
        q: (B, H, Tq, D), float32, bfloat16 or float16 (others: the reference). Any strides.
        k, v: (B, H, Tk, D), (B, H, Tk, Dv); Tk = Tq where causal.
        feature_map: "elu" (elu(x) + 1), "relu", "softmax" over D, a function of a tensor (..., D), applied to q and to k (it
            may change D), or None for q and k as they are.
        normalize: divide by the sum of weights; where it is 0 the output is 0.
        causal: token t reads what tokens up to t left. False: every query reads the state after the last key.
        decay: (H) natural logarithm of a head's decay a token, not above 0.
        gate: (B, H, T) or (B, H, T, D) natural logarithm of a token's decay, not above 0; -inf forgets everything.
        beta: (B, H, T) the delta rule's writing strength. decay, gate and beta need causal.
        initial_state: (N, H, D, Dv + normalize) float32: S, and with normalize one more column, which a value of 1 would have
            left (the sum of the keys); N = B, or the number of sequences of cu_seqlens. None is zeros.
        return_state: also return the state after the last token.
        cu_seqlens: (N + 1) int64 0, ..., T for B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] and may be empty.
        impl: "cpu", "cuda" (up to 64 tokens, no gradients), "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        o (B, H, Tq, Dv) in q's dtype; with return_state the pair (o, state), state as initial_state. Both are differentiable,
        for every tensor argument; second derivatives, forward-mode AD and torch.func go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    if autocasting(q.device.type):
        q, k, v = autocast(q.device.type, q, k, v)
    q, k, feature = _mapped(q, k, feature_map)
    _check_qkv(q, k, v, causal)
    gate = _check_gates(q, causal, decay, gate, beta)
    _check_sequences(q, v, normalize, initial_state, cu_seqlens)
    if beta is not None and normalize:  # the denominators are one more value
        ones = torch.ones((), dtype=v.dtype, device=v.device).expand(*v.shape[:3], 1)
        o, state = _run(q, k, torch.cat([v, ones], 3), gate, beta, initial_state, cu_seqlens, feature, False, causal, impl)
        o = linear_attention_ref.divided(o)
    else:
        o, state = _run(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, impl)
    return (o, state) if return_state else o


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    feature_map: str | Callable[[torch.Tensor], torch.Tensor] | None = "elu",
    normalize: bool = True,
    decay: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of linear_attention: decoding at a cost that doesn't depend on how many tokens came before.

    Args:
        q, k: (B, H, D); v: (B, H, Dv); dtypes as linear_attention's.
        state: (B, H, D, Dv + normalize) float32, as linear_attention takes and returns it.
        feature_map, normalize, decay, impl: as linear_attention's.
        gate: (B, H) or (B, H, D); beta: (B, H).

    Returns:
        (o, state): o (B, H, Dv) in q's dtype, and the state behind the token. Where gradients are recorded the call is
        linear_attention of one token.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{_OP}: a step's {name} must have 3 dimensions (B, H, D); got shape {tuple(t.shape)}")
    if gate is not None and gate.dim() not in (2, 3):
        raise ValueError(f"{_OP}: a step's gate must be (B, H) or (B, H, D); got shape {tuple(gate.shape)}")
    if beta is not None and beta.dim() != 2:
        raise ValueError(f"{_OP}: a step's beta must be (B, H); got shape {tuple(beta.shape)}")
    one = [None if t is None else t.unsqueeze(2) for t in (q, k, v, gate, beta)]
    tensors = (q, k, v, state, decay, gate, beta)
    backend = "reference" if transformed() else choose(_OP, impl, q)
    if backend == "reference" or needs_grad(*tensors) or (beta is not None and normalize):
        o, state = linear_attention(
            *one[:3], feature_map=feature_map, normalize=normalize, decay=decay, gate=one[3], beta=one[4],
            initial_state=state, return_state=True, impl=impl,
        )  # fmt: skip
        return o.squeeze(2), state
    if autocasting(q.device.type):
        q, k, v = autocast(q.device.type, q, k, v)
    q, k, feature = _mapped(q, k, feature_map)
    _check_qkv(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), True)
    gate = _check_gates(q.unsqueeze(2), True, decay, one[3], one[4])
    gate = None if gate is None else gate.squeeze(2)
    _check_sequences(q.unsqueeze(2), v, normalize, state, None)
    run = _step_launch if direct(q, k, v, gate, beta, state) else _step
    return run(q, k, v, _narrow(gate), _narrow(beta), state, feature, normalize, backend)


def _mapped(q, k, feature_map):
    """(q, k, the feature map's number): a function is applied here, the named ones by the kernels."""
    if callable(feature_map):
        return feature_map(q), feature_map(k), 0
    if feature_map not in _MAPS:
        raise ValueError(f'{_OP}: feature_map must be "elu", "relu", "softmax", a function or None; got {feature_map!r}')
    return q, k, _MAPS.index(feature_map)


def _check_qkv(q, k, v, causal) -> None:
    check_tokens(_OP, q, k, v, ("(B, H, Tq, D)", "(B, H, Tk, D)", "(B, H, Tk, Dv)"))
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{_OP}: k must be (B, H, Tk, D) with q's B, H, D of {tuple(q.shape)}; got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{_OP}: v must be (B, H, Tk, Dv) with k's B, H, Tk = {tuple(k.shape[:3])}; got {tuple(v.shape)}")
    if causal and k.shape[2] != q.shape[2]:
        raise ValueError(f"{_OP}: causal attention needs as many keys as queries; got {k.shape[2]} and {q.shape[2]}")


def _check_gates(q, causal, decay, gate, beta):
    """decay and gate as one gate (B, H, T) or (B, H, T, D), or None."""
    B, H, T, D = q.shape
    for name, t in (("decay", decay), ("gate", gate), ("beta", beta)):
        if t is None:
            continue
        if not causal:
            raise ValueError(f"{_OP}: {name} needs causal=True: what comes after a query would have to decay towards it")
        if not t.is_floating_point() or t.device != q.device:
            raise ValueError(f"{_OP}: {name} must be a floating tensor on {q.device}; got {t.dtype} on {t.device}")
    if decay is not None and decay.shape != (H,):
        raise ValueError(f"{_OP}: decay must have shape (H) = ({H},); got {tuple(decay.shape)}")
    if gate is not None and gate.shape != (B, H, T) and gate.shape != (B, H, T, D):
        raise ValueError(f"{_OP}: gate must be (B, H, T) or (B, H, T, D) with {(B, H, T, D)}; got {tuple(gate.shape)}")
    if beta is not None and beta.shape != (B, H, T):
        raise ValueError(f"{_OP}: beta must be (B, H, T) = {(B, H, T)}; got {tuple(beta.shape)}")
    if decay is None:
        return gate
    decay = _per_token(decay, T)
    if gate is None:
        return decay.expand(B, H, T)
    return gate + (decay if gate.dim() == 3 else decay.unsqueeze(3))


def _per_token(decay, T):
    """decay (H) as (1, H, T). Its gradient is a sum over tokens, which torch cuts by threads where it is one long sum of one
    number: so it is a sum over blocks of 512 tokens and a sum of those, and no bit depends on the number of threads.
    """
    H = decay.shape[0]
    if not needs_grad(decay):
        return decay.view(1, H, 1).expand(1, H, T)
    blocks = (T + 511) // 512
    return decay.view(1, H, 1).expand(1, H, blocks).unsqueeze(3).expand(1, H, blocks, 512).flatten(2)[:, :, :T]


def _check_sequences(q, v, normalize, initial_state, cu_seqlens) -> None:
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{_OP}: cu_seqlens must be (N + 1) int64; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
        if q.shape[0] != 1:
            raise ValueError(f"{_OP}: cu_seqlens needs a batch of 1, its sequences one after another; got {q.shape[0]}")
    if initial_state is not None:
        want = (_sequences(q, cu_seqlens), q.shape[1], q.shape[3], v.shape[-1] + normalize)
        if initial_state.shape != want:
            raise ValueError(
                f"{_OP}: the state must be (N, H, D, Dv + normalize) = {tuple(want)}; got {tuple(initial_state.shape)}"
            )
        if initial_state.dtype not in (torch.float32, q.dtype) or initial_state.device != q.device:
            raise ValueError(
                f"{_OP}: the state must be torch.float32 on {q.device}; got {initial_state.dtype} on {initial_state.device}"
            )


def _narrow(t):
    """Gates as kernels take them: no wider than float32."""
    return t.float() if t is not None and t.dtype == torch.float64 else t


def _run(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal, impl):
    impl = reference_if_transformed(_OP, impl)
    grad = needs_grad(q, k, v, gate, beta, initial_state)
    backend = choose(_OP, impl, q, grad)
    if backend != "reference" and not (q.shape[3] and v.shape[3]):
        if impl is not None:
            raise ValueError(f"{_OP}: impl={impl!r} can't serve this call: head dims must be at least 1")
        backend = "reference"
    if backend == "reference":
        return _reference(q, k, v, gate, beta, initial_state, cu_seqlens, feature, normalize, causal)
    gate, beta = _narrow(gate), _narrow(beta)
    if initial_state is not None:
        initial_state = initial_state.float()
    tensors = (q, k, v, gate, beta, initial_state, cu_seqlens)
    if grad:
        return _LinearAttention.apply(*tensors, feature, normalize, causal, backend)
    run = _fwd_launch if direct(*tensors) else _fwd
    o, _, state, _ = run(*tensors, feature, normalize, causal, False, backend)
    return o, state
