"""causal_conv1d: registration and the public functions. The equations are in kernels/causal_conv1d/causal_conv1d.h."""

from __future__ import annotations

import torch

from .._backend import choose
from .._registry import autocast, create_graph, direct, graph_gradients, kernel, needs_grad, reference_if_transformed, register
from ..kernels.causal_conv1d import causal_conv1d_ref

_OP = "causal_conv1d"
_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2}
_NAMES = dict(zip(_ACTIVATIONS.values(), _ACTIVATIONS))
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _channels_last(x) -> bool:
    """True where x (B, C, T) lies in memory as (B, T, C): then so do the results."""
    return x.shape[2] > 1 and x.stride(2) != 1 and x.stride(1) == 1


def _laid_out(t, like):
    """t with unit stride where `like` has it; a copy only where the strides force one."""
    if _channels_last(like):
        return t if t.stride(1) == 1 else t.transpose(1, 2).contiguous().transpose(1, 2)
    return t if t.shape[2] <= 1 or t.stride(2) == 1 else t.contiguous()


def _input(x):
    return x if x.shape[2] <= 1 or x.stride(2) == 1 or x.stride(1) == 1 else x.contiguous()


def _new_like(x):
    B, C, T = x.shape
    return x.new_empty(B, T, C).transpose(1, 2) if _channels_last(x) else x.new_empty(B, C, T)


def _wide(t):
    return None if t is None else t.to(torch.float32).contiguous()


def _sequences(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _new_states(x, weight, cu_seqlens):
    return x.new_empty(_sequences(x, cu_seqlens), x.shape[1], weight.shape[1] - 1)


def _run_fwd(x, weight, bias, initial, seq_idx, cu_seqlens, activation, want_final, impl):
    x = _input(x)
    y = _new_like(x)
    final = _new_states(x, weight, cu_seqlens) if want_final else None
    fwd = kernel(_OP, "fwd", impl)
    fwd(x, _wide(weight), _wide(bias), initial, seq_idx, cu_seqlens, activation, y, final)
    return y, final


def _run_bwd(dy, dfinal, x, weight, bias, initial, seq_idx, cu_seqlens, activation, need_params, impl):
    x = _input(x)
    dx = _new_like(x)
    dinitial = None if initial is None else initial.new_empty(initial.shape)
    dweight = dbias = partial = None
    if need_params:
        blocks = min(max(-(-x.shape[0] * x.shape[2] // 512), 1), 16)
        dweight, dbias = (x.new_empty(*s, dtype=torch.float32) for s in (weight.shape, weight.shape[:1]))
        partial = x.new_empty(blocks, weight.shape[1] + 1, weight.shape[0], dtype=torch.float32)
    bwd = kernel(_OP, "bwd", impl)
    dy = _laid_out(dy, x)
    inputs = (x, _wide(weight), _wide(bias), initial, seq_idx, cu_seqlens)
    bwd(dy, dfinal, *inputs, activation, dx, dweight, dbias, dinitial, partial)
    return dx, dweight, dbias, dinitial


def _run_update(x, state, weight, bias, position, slots, activation, impl):
    y = torch.empty_like(x)
    update = kernel(_OP, "update", impl)
    update(x, state, _wide(weight), _wide(bias), position, slots, activation, y)
    return y


# A schema has a fixed number of outputs: what was not asked for is an empty tensor there.
def _fwd_launch(x, *args):
    y, final = _run_fwd(x, *args)
    return y, x.new_empty(0) if final is None else final


def _fwd_fake(x, weight, bias, initial, seq_idx, cu_seqlens, activation, want_final, impl):
    return _new_like(_input(x)), _new_states(x, weight, cu_seqlens) if want_final else x.new_empty(0)


def _bwd_launch(dy, dfinal, x, *args):
    return tuple(x.new_empty(0) if t is None else t for t in _run_bwd(dy, dfinal, x, *args))


def _bwd_fake(dy, dfinal, x, weight, bias, initial, seq_idx, cu_seqlens, activation, need_params, impl):
    dx = _new_like(_input(x))
    shapes = (weight.shape, weight.shape[:1]) if need_params else ((0,), (0,))
    dweight, dbias = (x.new_empty(s, dtype=torch.float32 if need_params else x.dtype) for s in shapes)
    return dx, dweight, dbias, x.new_empty(0) if initial is None else initial.new_empty(initial.shape)


def _update_fake(x, state, weight, bias, position, slots, activation, impl):
    return torch.empty_like(x)


_fwd = register(
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial, Tensor? seq_idx, Tensor? cu_seqlens,"
    " int activation, bool want_final, str impl) -> (Tensor y, Tensor final)",
    launch=_fwd_launch,
    fake=_fwd_fake,
)
_bwd = register(
    "causal_conv1d_bwd(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, Tensor? initial, Tensor? seq_idx,"
    " Tensor? cu_seqlens, int activation, bool need_params, str impl)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial)",
    launch=_bwd_launch,
    fake=_bwd_fake,
)
_update = register(
    "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? position, Tensor? slots,"
    " int activation, str impl) -> Tensor",
    launch=_run_update,
    fake=_update_fake,
)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, seq_idx, cu_seqlens, activation, want_final, impl):
        tensors = (x, weight, bias, initial, seq_idx, cu_seqlens)
        run = _run_fwd if direct(*tensors) else _fwd
        y, final = run(*tensors, activation, want_final, impl)
        ctx.activation, ctx.impl = activation, impl
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return (y, final) if want_final else y

    @staticmethod
    def backward(ctx, dy, dfinal=None):
        x, weight, bias, *_ = tensors = ctx.saved_tensors
        nothing = (None,) * 5
        if create_graph():
            return *_differentiable_gradients(ctx, dy, dfinal), *nothing
        if dy is None:
            dy = torch.zeros_like(x)
        need_x, need_weight, need_bias, need_initial = ctx.needs_input_grad[:4]
        run = _run_bwd if direct(dy, dfinal, *tensors) else _bwd
        dx, dweight, dbias, dinitial = run(dy, dfinal, *tensors, ctx.activation, need_weight or need_bias, ctx.impl)
        return (
            dx if need_x else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            dinitial if need_initial else None,
            *nothing,
        )


def _differentiable_gradients(ctx, dy, dfinal):
    """Gradients with a graph, for create_graph=True: the reference's, which differentiates without end."""
    x, weight, bias, initial, seq_idx, cu_seqlens = ctx.saved_tensors
    with torch.enable_grad():
        out = causal_conv1d_ref.causal_conv1d(x, weight, bias, _NAMES[ctx.activation], initial, seq_idx, cu_seqlens)
        return graph_gradients(ctx.needs_input_grad, (x, weight, bias, initial), out, (dy, dfinal))


def _check(x, weight, bias, activation) -> None:
    if x.dim() != 3:
        raise ValueError(f"{_OP}: x must be (B, C, T); got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{_OP}: x must be a floating-point tensor; got {x.dtype}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        raise ValueError(f"{_OP}: weight must be (C, width) with C = {x.shape[1]}, width >= 1; got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (x.shape[1],):
        raise ValueError(f"{_OP}: bias must have shape ({x.shape[1]},); got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype not in (x.dtype, torch.float32) or t.device != x.device):
            raise ValueError(
                f"{_OP}: {name} must be {x.dtype} as x, or torch.float32, on {x.device}; got {t.dtype} on {t.device}"
            )
    if activation not in _ACTIVATIONS:
        raise ValueError(f'{_OP}: activation must be None, "silu" or "gelu"; got {activation!r}')


def _integers(name, t, shape, device):
    """t as the kernels take it: int32, contiguous."""
    if t is None:
        return None
    if t.dtype not in (torch.int32, torch.int64) or t.device != device or (shape is not None and t.shape != shape):
        what = f" of shape {tuple(shape)}" if shape is not None else ""
        raise ValueError(
            f"{_OP}: {name} must be int32 or int64{what} on {device}; got {t.dtype} of {tuple(t.shape)} on {t.device}"
        )
    return t.to(torch.int32).contiguous()


def _states(name, t, shape, x):
    if t is not None and (t.shape != shape or t.dtype != x.dtype or t.device != x.device):
        raise ValueError(
            f"{_OP}: {name} must be {tuple(shape)}, {x.dtype} on {x.device}; got {tuple(t.shape)}, {t.dtype} on {t.device}"
        )


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution over time with an activation after it, the short convolution of Mamba (Gu & Dao 2023),
    Hyena and their relatives: y[b,c,t] = act(bias[c] + sum_k weight[c,k] * x[b,c,t-(width-1)+k]), 0 before the first token.

    Sums are float32. y lies in memory as x does; (B, C, T) and (B, T, C) order are both native.

    Args:
        x: (B, C, T), float32, bfloat16 or float16 (float64 and other devices: the reference). Any strides; a copy is made
            where neither T nor C is contiguous.
        weight: (C, width), any width >= 1, x's dtype or float32.
        bias: (C), x's dtype or float32.
        activation: None, "silu" or "gelu" (exact).
        initial_states: (N, C, width-1), x's dtype: the inputs before the first token of each of the N = B sequences.
        return_final_states: also return (N, C, width-1): the last inputs, the initial states of what follows.
        seq_idx: (B, T) integers: where it changes, a sequence of its own begins, with zeros before it. The initial state
            belongs to the first one of a row, the final state to the last. Where it is negative, y is 0.
        cu_seqlens: (N+1) integers, rising from 0 to T: x holds N sequences one after another, B is 1.
        impl: "cpu", "cuda", "triton" or "reference"; None chooses (see mlcore.explain).

    Returns:
        y (B, C, T) in x's dtype; with return_final_states the pair (y, final_states). Both are differentiable, second
        derivatives go through the reference.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, or impl can't serve the call.
    """
    x, weight, bias, initial_states = autocast(x.device.type, x, weight, bias, initial_states)
    _check(x, weight, bias, activation)
    seq_idx = _integers("seq_idx", seq_idx, (x.shape[0], x.shape[2]), x.device)
    cu_seqlens = _integers("cu_seqlens", cu_seqlens, None, x.device)
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or x.shape[0] != 1):
        raise ValueError(
            f"{_OP}: cu_seqlens must be (N+1) for x with B = 1; got {tuple(cu_seqlens.shape)} for B = {x.shape[0]}"
        )
    shape = (_sequences(x, cu_seqlens), x.shape[1], weight.shape[1] - 1)
    _states("initial_states", initial_states, shape, x)
    backend = choose(_OP, reference_if_transformed(_OP, impl), x)
    tensors = (x, weight, bias, initial_states, seq_idx, cu_seqlens)
    if backend == "reference":
        y, final = causal_conv1d_ref.causal_conv1d(
            x, weight, bias, activation, initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens
        )
    elif needs_grad(*tensors):
        out = _CausalConv1d.apply(*tensors, _ACTIVATIONS[activation], return_final_states, backend)
        y, final = out if return_final_states else (out, None)
    else:
        run = _run_fwd if direct(*tensors) else _fwd
        y, final = run(*tensors, _ACTIVATIONS[activation], return_final_states, backend)
    return (y, final) if return_final_states else y


def causal_conv1d_update(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    position: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """causal_conv1d of the next tokens, for decoding: x follows what state holds, and state is updated in place.

    Args:
        x: (B, C) or (B, C, T): the next token, or T of them. Any strides.
        state: (slots, C, S), x's dtype, S >= width - 1 and >= 1, any strides: the last S inputs, updated in place. Zeros
            where nothing came before.
        weight, bias, activation, impl: as causal_conv1d's.
        position: (B) integers, None: state is shifted by T. Else state is a ring, and token t of row b goes to
            (position[b] + t) mod S.
        slots: (B) integers, which row of state each row of x uses, all different; negative is padding: y = 0 there. None is
            0 .. B-1, and state has B rows.

    Returns:
        y of x's shape and dtype. There are no gradients: state is overwritten.

    Raises:
        ValueError: shapes, dtypes or values break the rules above, a tensor requires a gradient, or impl can't serve the call.
    """
    if x.dim() == 2:
        args = {"activation": activation, "position": position, "slots": slots, "impl": impl}
        return causal_conv1d_update(x.unsqueeze(-1), state, weight, bias, **args).squeeze(-1)
    _check(x, weight, bias, activation)
    B, C, _ = x.shape
    if state.dim() != 3 or state.shape[1] != C or state.dtype != x.dtype or state.device != x.device:
        raise ValueError(
            f"{_OP}: state must be (slots, {C}, S), {x.dtype} on {x.device}; "
            f"got {tuple(state.shape)}, {state.dtype} on {state.device}"
        )
    if state.shape[2] < max(weight.shape[1] - 1, 1) or (slots is None and state.shape[0] != B):
        raise ValueError(
            f"{_OP}: state must be (slots, C, S) with S >= {max(weight.shape[1] - 1, 1)}"
            f"{f' and {B} slots' if slots is None else ''}; got {tuple(state.shape)}"
        )
    if needs_grad(x, state, weight, bias):
        raise ValueError(f"{_OP}: causal_conv1d_update has no gradients; use torch.no_grad() or causal_conv1d")
    position, slots = (_integers(n, t, (B,), x.device) for n, t in (("position", position), ("slots", slots)))
    backend = choose(_OP, impl, x)
    if backend == "reference":
        return causal_conv1d_ref.causal_conv1d_update(x, state, weight, bias, activation, position, slots)
    tensors = (x, state, weight, bias, position, slots)
    run = _run_update if direct(*tensors) else _update
    return run(*tensors, _ACTIVATIONS[activation], backend)
