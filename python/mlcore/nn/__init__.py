"""Modules over mlcore.ops, with the signatures and state dicts of torch.nn where one exists there."""

from .alignment import AdditiveAttention, LocationAwareAttention, MonotonicAttention, guided_attention_loss
from .attention_free import AttentionFree
from .causal_conv1d import CausalConv1d
from .depthwise_conv import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d, DepthwiseSeparableConv2d
from .layer_norm import LayerNorm
from .linear_attention import DeltaNet, GatedLinearAttention, LinearAttention, RandomFeatures, RetentionLayer
from .linformer_attention import LinformerAttention
from .mixing import FourierMixing, GatedMLP, MixerBlock, SpatialGatingUnit
from .multihead_attention import MultiheadAttention
from .pattern_attention import (
    CrossAttention,
    GlobalLocalAttention,
    GraphAttention,
    LocalAttention,
    PatternAttention,
    StridedAttention,
)
from .rms_norm import RMSNorm
from .synthesizer_attention import SynthesizerAttention
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AdditiveAttention",
    "AttentionFree",
    "CausalConv1d",
    "CrossAttention",
    "DeltaNet",
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv3d",
    "DepthwiseSeparableConv2d",
    "FourierMixing",
    "GatedLinearAttention",
    "GatedMLP",
    "GlobalLocalAttention",
    "GraphAttention",
    "LayerNorm",
    "LinearAttention",
    "LinformerAttention",
    "LocalAttention",
    "LocationAwareAttention",
    "MixerBlock",
    "MonotonicAttention",
    "MultiheadAttention",
    "PatternAttention",
    "RMSNorm",
    "RandomFeatures",
    "RetentionLayer",
    "SpatialGatingUnit",
    "StridedAttention",
    "SynthesizerAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "guided_attention_loss",
]
