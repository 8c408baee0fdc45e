"""Modules over mlcore.ops, with the signatures and state dicts of torch.nn where one exists there."""

from .layer_norm import LayerNorm
from .linear_attention import DeltaNet, GatedLinearAttention, LinearAttention, RandomFeatures, RetentionLayer
from .multihead_attention import MultiheadAttention
from .rms_norm import RMSNorm
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "DeltaNet",
    "GatedLinearAttention",
    "LayerNorm",
    "LinearAttention",
    "MultiheadAttention",
    "RMSNorm",
    "RandomFeatures",
    "RetentionLayer",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
