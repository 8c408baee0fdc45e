"""RMSNorm as a layer: torch.nn.RMSNorm's signature and state_dict."""

from __future__ import annotations

import torch

from .. import ops
from ._norms import apply_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm computed by mlcore.ops.rms_norm.

    forward(x, residual=None): x (..., *normalized_shape) float32, bfloat16 or float16; with a residual of x's shape it
    returns (y, x + residual), the pre-norm Transformer's pair. eps=None is the machine epsilon of the statistics' dtype:
    float32's, and float64's for float64.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        return apply_norm(ops.rms_norm, x, residual, self.normalized_shape, self.weight, eps=eps)
