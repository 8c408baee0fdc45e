"""LayerNorm as a layer: torch.nn.LayerNorm's signature and state_dict."""

from __future__ import annotations

import torch

from .. import ops
from ._norms import apply_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm computed by mlcore.ops.layer_norm.

    forward(x, residual=None): x (..., *normalized_shape) float32, bfloat16 or float16; with a residual of x's shape it
    returns (y, x + residual), the pre-norm Transformer's pair. y has x's dtype, also under torch.autocast; statistics are
    float32.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        return apply_norm(ops.layer_norm, x, residual, self.normalized_shape, self.weight, self.bias, eps=self.eps)
