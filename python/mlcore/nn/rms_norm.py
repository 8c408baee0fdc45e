"""RMSNorm as a layer: torch.nn.RMSNorm's signature and state_dict."""

from __future__ import annotations

import torch

from .. import ops


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm computed by mlcore.ops.rms_norm.

    forward(x, residual=None): x (..., *normalized_shape) float32, bfloat16 or float16; with a residual of x's shape it
    returns (y, x + residual), the pre-norm Transformer's pair. eps=None is torch's: the machine epsilon of x's dtype.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        shape = x.shape
        if len(self.normalized_shape) > 1 and shape[-len(self.normalized_shape) :] == self.normalized_shape:
            x = x.flatten(-len(self.normalized_shape))
            residual = None if residual is None else residual.flatten(-len(self.normalized_shape))
        weight = None if self.weight is None else self.weight.flatten()
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        out = ops.rms_norm(x, weight, residual=residual, eps=eps)
        return out.view(shape) if residual is None else (out[0].view(shape), out[1].view(shape))
