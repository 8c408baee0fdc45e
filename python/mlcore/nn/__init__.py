"""Modules over mlcore.ops, with the signatures and state dicts of torch.nn where one exists there."""

from .alignment import AdditiveAttention, LocationAwareAttention, MonotonicAttention, guided_attention_loss
from .attention_free import AttentionFree
from .binary_conv2d import BinaryConv2d, PackedBinaryConv2d
from .binary_linear import BinaryLinear, PackedBinaryLinear
from .causal_conv1d import CausalConv1d
from .depthwise_conv import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from .fake_quant import FakeQuantEmbedding, FakeQuantLinear
from .fake_quant_conv2d import FakeQuantConv2d
from .gathered_attention import ReformerAttention, RoutingAttention, SinkhornAttention
from .inference_chain import ChainedBlocks, InferenceChain
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
from .pooling import MinPool2d, pool2d
from .positional_encoding import LearnedEncoding, RotaryEncoding, SinusoidalEncoding
from .quant_conv2d import QuantConv2d
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .rms_norm import RMSNorm
from .separable_conv import ConvNorm2d, DepthwiseSeparableConv2d, PointwiseConv2d
from .synthesizer_attention import SynthesizerAttention
from .ternary_linear import TernaryLinear
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AdditiveAttention",
    "AttentionFree",
    "BinaryConv2d",
    "BinaryLinear",
    "CausalConv1d",
    "ChainedBlocks",
    "ConvNorm2d",
    "CrossAttention",
    "DeltaNet",
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv3d",
    "DepthwiseSeparableConv2d",
    "FakeQuantConv2d",
    "FakeQuantEmbedding",
    "FakeQuantLinear",
    "FourierMixing",
    "GatedLinearAttention",
    "GatedMLP",
    "GlobalLocalAttention",
    "GraphAttention",
    "InferenceChain",
    "LayerNorm",
    "LearnedEncoding",
    "LinearAttention",
    "LinformerAttention",
    "LocalAttention",
    "LocationAwareAttention",
    "MinPool2d",
    "MixerBlock",
    "MonotonicAttention",
    "MultiheadAttention",
    "PackedBinaryConv2d",
    "PackedBinaryLinear",
    "PatternAttention",
    "PointwiseConv2d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "RMSNorm",
    "RandomFeatures",
    "ReformerAttention",
    "RetentionLayer",
    "RotaryEncoding",
    "RoutingAttention",
    "SinkhornAttention",
    "SinusoidalEncoding",
    "SpatialGatingUnit",
    "StridedAttention",
    "SynthesizerAttention",
    "TernaryLinear",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "guided_attention_loss",
    "pool2d",
]
