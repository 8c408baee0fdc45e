"""quant_linear's launchers: they allocate, lay tensors out and call the backend's kernel; for CUDA with the codes reordered."""

from __future__ import annotations

import torch

from .._registry import kernel
from ..kernels.quant_linear.quant_linear_prepare import kept
from ..quant._layout import LAYOUTS, Geometry
from ._rows import rows_of

_OP = "quant_linear"
_TILE, _CHUNK = 64, 32  # codes of quant_linear_cuda.cuh


def _fragments(codes, N, K, bits, group_size, shift):
    """Codes (P, panel bytes) as the CUDA product reads them: (P, bytes of its tiles), 4 bits a code where they fit, else 8;
    shift is added to each of them. The order is in quant_linear_cuda.cuh."""
    wide = 4 if bits <= 4 else 8
    g = Geometry(N, K, bits, min(group_size, max(K, 1)))
    q = LAYOUTS["panel16"].unpack(codes, g) + shift
    padded = -(-g.group_size // _CHUNK) * _CHUNK
    tiles = -(-g.groups * padded // _TILE)
    if 0 in (N, K):
        return codes.new_empty(g.panels, tiles * wide * 128)
    full = q.new_zeros(g.panels * 16, g.groups * g.group_size)
    full[:N, :K] = q
    full = torch.nn.functional.pad(full.view(-1, g.groups, g.group_size), (0, padded - g.group_size)).flatten(1)
    full = torch.nn.functional.pad(full, (0, tiles * _TILE - full.shape[1]))
    octets = full.view(g.panels, 2, 8, tiles, 2, 4, 8)  # panel, half h, row g, tile, chunk c, lane t, k
    if wide == 8:
        return octets.permute(0, 3, 4, 2, 5, 1, 6).reshape(g.panels, -1)  # panel, tile, c, g, t, h, k
    words = octets[..., :4] | octets[..., 4:] << 4
    return words.permute(0, 3, 2, 5, 4, 1, 6).reshape(g.panels, -1)  # panel, tile, g, t, c, h, k


def cuda_weight(codes, scales, zeros, N, K, bits, offset, group_size):
    """(codes, scales, zeros, bits, offset) for the CUDA product. Made when a weight is first used and kept with its codes."""
    shift = 128 - offset if zeros is None and 4 < bits < 8 else 0  # int8 products want codes around 128

    def make():
        return _fragments(codes, N, K, bits, group_size, shift)

    def aligned(t):
        return t if t is None or t.data_ptr() % 16 == 0 else t.clone()

    fragments = kept(codes, (N, K, bits, group_size, shift), make)
    return fragments, aligned(scales), aligned(zeros), 4 if bits <= 4 else 8, offset + shift


def run_fwd(x, codes, scales, zeros, codebook, bias, residual, N, bits, offset, group_size, activation, int8, impl, dtype=None):
    K = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N, dtype=dtype)
    flat = rows_of(x)
    if impl == "cuda":
        codes, scales, zeros, bits, offset = cuda_weight(codes, scales, zeros, N, K, bits, offset, group_size)
    fwd = kernel(_OP, "fwd", impl)
    out = y.view(flat.shape[0], N)
    fwd(flat, codes, scales, zeros, codebook, bias, rows_of(residual), bits, offset, group_size, activation, int8, out)
    return y


def run_sums(x, codes, scales, zeros, codebook, bias, N, bits, offset, group_size, int8, impl):
    """x W^T + bias in float32, whatever x is."""
    x = x.float() if impl == "cpu" else x
    return run_fwd(
        x, codes, scales, zeros, codebook, bias, None, N, bits, offset, group_size, 0, int8, impl, dtype=torch.float32
    )


def dequantize_launch(like, codes, scales, zeros, codebook, N, K, bits, offset, group_size, impl):
    w = like.new_empty(N, K)
    kernel(_OP, "dequantize", impl)(codes, scales, zeros, codebook, bits, offset, group_size, w)
    return w
