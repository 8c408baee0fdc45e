"""Low-bit weights as data: packing, unpacking, files. mlcore.ops.quant_linear computes with them."""

from ._calibrate import pack_awq, pack_gptq, pack_hqq, pack_mse, pack_percentile
from ._files import load, save
from ._pack import NF4, pack, unpack
from ._packed import PackedWeight, concatenate, pack_codes

__all__ = [
    "NF4",
    "PackedWeight",
    "concatenate",
    "load",
    "pack",
    "pack_awq",
    "pack_codes",
    "pack_gptq",
    "pack_hqq",
    "pack_mse",
    "pack_percentile",
    "save",
    "unpack",
]
