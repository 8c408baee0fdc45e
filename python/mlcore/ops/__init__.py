"""The operators as functions. Each file registers one op: schema, fake, launcher, autograd.Function, public function."""

from ._attention_decode import attention_with_kvcache, rotate
from ._attention_positions import alibi_slopes, merge_attention, t5_relative
from .attention import attention, scaled_dot_product_attention
from .layer_norm import layer_norm
from .rms_norm import rms_norm

__all__ = [
    "alibi_slopes",
    "attention",
    "attention_with_kvcache",
    "layer_norm",
    "merge_attention",
    "rms_norm",
    "rotate",
    "scaled_dot_product_attention",
    "t5_relative",
]
