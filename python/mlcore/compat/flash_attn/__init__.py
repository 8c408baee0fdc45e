"""flash-attn 2's functions over mlcore.ops.attention: ``from mlcore.compat.flash_attn import flash_attn_func``.

The same names, layouts (B, T, H, D) and conventions: causal masks and windows are aligned to the last query and key, -1 is no
limit, grouped heads, softcap, ALiBi, dropout. Beyond flash-attn: it runs on the CPU, float32 too, any head dim, gradients of
learned ALiBi slopes. What can't be honoured raises; dropout draws other numbers than flash-attn's for the same seed.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
