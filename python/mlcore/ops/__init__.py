"""The operators as functions. Each file registers one op: schema, fake, launcher, autograd.Function, public function."""

from ._attention_decode import attention_with_kvcache, rotate
from ._attention_gathered import gathered_attention
from ._attention_positions import alibi_slopes, merge_attention, t5_relative
from ._chain import PackedChain
from ._signs import PackedSigns
from ._straight_through import binarize, dorefa_activations, dorefa_weights, ternarize
from .aft import aft
from .attention import attention, scaled_dot_product_attention
from .binary_conv2d import binary_conv2d, pack_binary_conv, pack_pixels
from .binary_linear import binary_linear, pack_signs, unpack_signs
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .depthwise_conv import depthwise_conv1d, depthwise_conv2d, depthwise_conv3d
from .layer_norm import layer_norm
from .linear_attention import linear_attention, linear_attention_step
from .quant_linear import quant_linear
from .rms_norm import rms_norm
from .separable_conv import BatchNorm, PackedConv, PackedSeparable, batch_norm2d, separable_conv2d

__all__ = [
    "BatchNorm",
    "PackedChain",
    "PackedConv",
    "PackedSeparable",
    "PackedSigns",
    "aft",
    "alibi_slopes",
    "attention",
    "attention_with_kvcache",
    "batch_norm2d",
    "binarize",
    "binary_conv2d",
    "binary_linear",
    "causal_conv1d",
    "causal_conv1d_update",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "dorefa_activations",
    "dorefa_weights",
    "gathered_attention",
    "layer_norm",
    "linear_attention",
    "linear_attention_step",
    "merge_attention",
    "pack_binary_conv",
    "pack_pixels",
    "pack_signs",
    "quant_linear",
    "rms_norm",
    "rotate",
    "scaled_dot_product_attention",
    "separable_conv2d",
    "t5_relative",
    "ternarize",
    "unpack_signs",
]
