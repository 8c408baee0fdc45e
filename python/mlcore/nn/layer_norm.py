"""LayerNorm as a layer: torch.nn.LayerNorm's signature and state_dict."""

from __future__ import annotations

import torch

from .. import ops


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm computed by mlcore.ops.layer_norm.

    forward(x, residual=None): x (..., *normalized_shape) float32, bfloat16 or float16; with a residual of x's shape it
    returns (y, x + residual), the pre-norm Transformer's pair.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        shape = x.shape
        if len(self.normalized_shape) > 1 and shape[-len(self.normalized_shape) :] == self.normalized_shape:
            x = x.flatten(-len(self.normalized_shape))
            residual = None if residual is None else residual.flatten(-len(self.normalized_shape))
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        out = ops.layer_norm(x, weight, bias, residual=residual, eps=self.eps)
        return out.view(shape) if residual is None else (out[0].view(shape), out[1].view(shape))
