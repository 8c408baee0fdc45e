"""The operators as functions. Each file registers one op: schema, fake, launcher, autograd.Function, public function."""

from .attention import attention, scaled_dot_product_attention
from .layer_norm import layer_norm
from .linear_attention import linear_attention, linear_attention_step
from .rms_norm import rms_norm

__all__ = ["attention", "layer_norm", "linear_attention", "linear_attention_step", "rms_norm", "scaled_dot_product_attention"]
