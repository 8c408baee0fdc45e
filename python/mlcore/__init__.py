"""Fast attention, convolution, norms and low-bit layers for PyTorch.

import mlcore
y = mlcore.ops.attention(q, k, v, causal=True)   # functions
mlcore.nn.MultiheadAttention(512, 8)             # layers: torch.nn's signatures and state_dicts
mlcore.accelerate(model)                         # the layers of an existing model, in place
mlcore.show_config()                             # what is usable on this machine, and why not
"""

import torch  # noqa: F401  first, so that its OpenMP runtime is the one in the process

from . import models, nn, ops, patterns, quant
from ._accelerate import accelerate
from ._backend import explain, show_config
from .qat import convert, prepare_qat
from .quantization import QuantConfig, quantize

__version__ = "0.1.0"
__all__ = [
    "QuantConfig",
    "__version__",
    "accelerate",
    "convert",
    "explain",
    "models",
    "nn",
    "ops",
    "patterns",
    "prepare_qat",
    "quant",
    "quantize",
    "show_config",
]
