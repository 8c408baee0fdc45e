"""The operators as functions. Each file registers one op: schema, fake, launcher, autograd.Function, public function."""

from ._attention_decode import attention_with_kvcache, rotate
from ._attention_gathered import gathered_attention
from ._attention_positions import alibi_slopes, merge_attention, t5_relative
from .aft import aft
from .attention import attention, scaled_dot_product_attention
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .depthwise_conv import depthwise_conv1d, depthwise_conv2d, depthwise_conv3d
from .layer_norm import layer_norm
from .linear_attention import linear_attention, linear_attention_step
from .quant_linear import quant_linear
from .rms_norm import rms_norm
from .separable_conv import BatchNorm, PackedConv, PackedSeparable, batch_norm2d, separable_conv2d

__all__ = [
    "BatchNorm",
    "PackedConv",
    "PackedSeparable",
    "aft",
    "alibi_slopes",
    "attention",
    "attention_with_kvcache",
    "batch_norm2d",
    "causal_conv1d",
    "causal_conv1d_update",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "gathered_attention",
    "layer_norm",
    "linear_attention",
    "linear_attention_step",
    "merge_attention",
    "quant_linear",
    "rms_norm",
    "rotate",
    "scaled_dot_product_attention",
    "separable_conv2d",
    "t5_relative",
]
