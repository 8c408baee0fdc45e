"""The functions of the causal-conv1d package, argument for argument, computed by mlcore.ops: any width, any device of mlcore,
and combinations that the package refuses (seq_idx with states). Where it raises, this may compute.
"""

from __future__ import annotations

import torch

from .. import ops

_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def _activation(name: str | None) -> str | None:
    if name not in _ACTIVATIONS:
        raise NotImplementedError(f'causal_conv1d: activation must be None, "silu" or "swish"; got {name!r}')
    return _ACTIVATIONS[name]


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """mlcore.ops.causal_conv1d of x (batch, dim, seqlen), weight (dim, width).

    final_states_out, where given with return_final_states, receives the final states and is what is returned.
    """
    args = {"initial_states": initial_states, "seq_idx": seq_idx, "activation": _activation(activation)}
    if not return_final_states:
        return ops.causal_conv1d(x, weight, bias, **args)
    out, final_states = ops.causal_conv1d(x, weight, bias, **args, return_final_states=True)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """mlcore.ops.causal_conv1d_update of x (batch, dim) or (batch, dim, seqlen); conv_state is updated in place.

    With cache_seqlens (batch) conv_state is a ring. conv_state_indices (batch) says which row of conv_state is whose.
    """
    return ops.causal_conv1d_update(
        x, conv_state, weight, bias, activation=_activation(activation), position=cache_seqlens, slots=conv_state_indices
    )


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The last state_len tokens of each sequence, zeros before its first: x (total, dim) -> (batch, dim, state_len)."""
    identity = x.new_zeros(x.shape[1], state_len + 1)  # only the states are wanted: any weight will do
    _, states = ops.causal_conv1d(x.t()[None], identity, cu_seqlens=cu_seqlens, return_final_states=True)
    return states
