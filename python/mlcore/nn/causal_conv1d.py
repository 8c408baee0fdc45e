"""The short convolution of Mamba and its relatives as a layer, with the state_dict of the torch.nn.Conv1d that they use."""

from __future__ import annotations

import torch

from .. import ops


class CausalConv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d(channels, channels, kernel_size, padding=kernel_size - 1, groups=channels) cut to its first T outputs,
    with an activation, computed by mlcore.ops.causal_conv1d. Parameters are that Conv1d's: weight (C, 1, kernel_size) and
    bias (C).

    forward(x (B, C, T), initial_states=None, return_final_states=False, seq_idx=None, cu_seqlens=None): as the function's.
    step(x, state): the next tokens, for decoding; state (B, C, S >= kernel_size - 1), which new_state() makes, is updated in
    place.

    Args:
        channels: C.
        kernel_size: the width, at least 1.
        bias: False leaves it out.
        activation: None, "silu" or "gelu".
    """

    def __init__(self, channels, kernel_size, bias=True, activation=None, *, device=None, dtype=None) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, channels, kernel_size, padding=kernel_size - 1, groups=channels, bias=bias, **factory)
        self.activation = activation

    def forward(self, x, initial_states=None, return_final_states=False, *, seq_idx=None, cu_seqlens=None):
        return ops.causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            initial_states=initial_states,
            return_final_states=return_final_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )

    def new_state(self, batch: int) -> torch.Tensor:
        """The state of `batch` sequences that have not begun: zeros, (batch, C, max(kernel_size - 1, 1))."""
        return self.weight.new_zeros(batch, self.in_channels, max(self.kernel_size[0] - 1, 1))

    def step(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """y of the next tokens x, (B, C) or (B, C, T). Under torch.no_grad()."""
        return ops.causal_conv1d_update(x, state, self.weight.squeeze(1), self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
