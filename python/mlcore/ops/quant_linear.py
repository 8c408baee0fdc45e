"""quant_linear: registration and the public function. The equations are in kernels/quant_linear/quant_linear.h."""

from __future__ import annotations

import dataclasses

import torch

from .._backend import REST_RULES, choose
from .._registry import autocast, create_graph, direct, needs_grad, reference_if_transformed, register
from ..kernels.quant_linear import quant_linear_ref
from ..quant import PackedWeight
from ._quant_linear_launch import dequantize_launch, run_fwd, run_sums

_OP = "quant_linear"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = quant_linear_ref.ACTIVATIONS  # name -> function
_ACTIVATIONS = tuple(ACTIVATIONS)  # their numbers in quant_linear.h


def _no_codebook(packed, *_):
    return None if getattr(packed, "codebook", None) is None else "the cuda kernels take no codebooks; the triton kernels do"


REST_RULES[_OP, "cuda"] = _no_codebook


def _fwd_fake(x, codes, scales, zeros, codebook, bias, residual, N, bits, offset, group_size, activation, int8, impl):
    return x.new_empty(*x.shape[:-1], N)


def _sums_fake(x, codes, scales, zeros, codebook, bias, N, bits, offset, group_size, int8, impl):
    return x.new_empty(*x.shape[:-1], N, dtype=torch.float32)


def _dequantize_fake(like, codes, scales, zeros, codebook, N, K, bits, offset, group_size, impl):
    return like.new_empty(N, K)


_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook"
_fwd = register(
    f"quant_linear_fwd(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? residual, SymInt N, int bits, int offset, SymInt group_size,"
    " int activation, int int8, str impl) -> Tensor",
    launch=run_fwd,
    fake=_fwd_fake,
)
_sums = register(
    f"quant_linear_sums(Tensor x, {_WEIGHT}, Tensor? bias, SymInt N, int bits, int offset, SymInt group_size, int int8,"
    " str impl) -> Tensor",
    launch=run_sums,
    fake=_sums_fake,
)
_dequantize = register(
    f"quant_linear_dequantize(Tensor like, {_WEIGHT}, SymInt N, SymInt K, int bits, int offset, SymInt group_size, str impl)"
    " -> Tensor",
    launch=dequantize_launch,
    fake=_dequantize_fake,
)


def _activation_backward(dy, z, activation):
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(dy, z, 0, 6)
    if activation == "silu":
        s = z.sigmoid()  # aten's silu_backward has no derivative
        return dy * s * (1 + z * (1 - s))
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, codes, scales, zeros, codebook, N, bits, offset, group_size, activation, int8, impl):
        ctx.numbers = N, bits, offset, group_size
        ctx.mode = activation, int8, impl
        ctx.save_for_backward(x, bias, codes, scales, zeros, codebook)
        run = run_fwd if direct(x, bias, residual, codes, scales) else _fwd
        return run(x, codes, scales, zeros, codebook, bias, residual, *ctx.numbers, *ctx.mode)

    @staticmethod
    def backward(ctx, dy):
        x, bias, *weight = ctx.saved_tensors
        activation, int8, impl = ctx.mode
        need_x, need_bias, need_residual = ctx.needs_input_grad[:3]
        dx = dbias = None
        if need_x or need_bias:
            dz = dy.float()
            if activation:
                z = _differentiable_sums(ctx) if create_graph() else _sums(x, *weight, bias, *ctx.numbers, int8, impl)
                dz = _activation_backward(dz, z, _ACTIVATIONS[activation])
            N, bits, offset, group_size = ctx.numbers
            if need_bias:
                dbias = dz.sum_to_size(N)
            if need_x:
                # The CPU has no matrix units: float32 is as fast there, and rounded once.
                like = (x.float() if impl == "cpu" else x).detach()
                w = _dequantize(like, *weight, N, x.shape[-1], bits, offset, group_size, impl)
                dx = (dz.to(w.dtype) @ w).to(x.dtype)
        return dx, dbias, dy if need_residual else None, *(None,) * 11


def _differentiable_sums(ctx):
    """What the activation was applied to, with a graph."""
    x, bias, *weight = ctx.saved_tensors
    _, int8, impl = ctx.mode
    wide = x.float()
    if impl != "cuda":
        return _QuantLinear.apply(wide, bias, None, *weight, *ctx.numbers, 0, int8, impl)
    N, *numbers = ctx.numbers  # the CUDA product takes 16 bits, and float32 is needed
    return torch.nn.functional.linear(wide, _dequantize(wide.detach(), *weight, N, x.shape[-1], *numbers, impl), bias)


def _reference(x, packed, bias, activation, residual, dynamic_int8):
    if not dynamic_int8:
        return quant_linear_ref.quant_linear(x, packed.dequantize(torch.float64), bias, activation, residual)
    codes, scales, zeros = packed.unpack()
    rows = torch.arange(packed.shape[0], device=x.device)
    if packed.codebook is not None:
        codebook, step = quant_linear_ref.round_codebook(packed.codebook)
        packed = dataclasses.replace(packed, codebook=codebook)
        scales = scales * step[rows // -(-max(packed.shape[0], 1) // len(codebook))]
    whole = packed.values(codes, rows, zeros)
    return quant_linear_ref.quant_linear_int8(x, whole, scales, packed.group_size, bias, activation, residual)


class _StraightThrough(torch.autograd.Function):
    """The reference of the integer mode, with the gradient that the kernels give: as if x had not been rounded."""

    @staticmethod
    def forward(ctx, exact, rounded):
        return rounded

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def _check(x, packed, bias, activation, residual):
    N, K = packed.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{_OP}: x must be (..., K) with the weight's K = {K}; got {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{_OP}: x must be a floating-point tensor; got {x.dtype}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{_OP}: activation must be None, {', '.join(_ACTIVATIONS[1:])}; got {activation!r}")
    if bias is not None and (bias.shape != (N,) or not bias.is_floating_point()):
        raise ValueError(f"{_OP}: bias must be floating, ({N},); got {bias.dtype} {tuple(bias.shape)}")
    if residual is not None and (residual.shape != (*x.shape[:-1], N) or residual.dtype != x.dtype):
        raise ValueError(
            f"{_OP}: residual must be {x.dtype} {(*x.shape[:-1], N)}, as y; got {residual.dtype} {tuple(residual.shape)}"
        )
    for name, t in (("packed", packed.codes), ("bias", bias), ("residual", residual)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{_OP}: {name} must be on {x.device} as x; got {t.device}")


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x as quant_linear with dynamic_int8 sees it, in float32; gradients go straight through."""
    whole, step = quant_linear_ref.quantize_rows(x.float())
    return _StraightThrough.apply(x.float(), (whole * step).detach())


def round_codebook(codebook: torch.Tensor) -> torch.Tensor:
    """A codebook as quant_linear with dynamic_int8 sees it."""
    whole, step = quant_linear_ref.round_codebook(codebook)
    return whole * step


def quant_linear(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    residual: torch.Tensor | None = None,
    dynamic_int8: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """A linear layer with a quantized weight: y = activation(x W^T + bias) + residual.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 and other devices: the reference). Any strides.
        packed: the weight (N, K), see mlcore.quant.pack.
        bias: (N), any floating dtype.
        activation: None, "relu", "gelu", "gelu_tanh", "silu" or "relu6".
        residual: (..., N) of x's dtype; added last.
        dynamic_int8: False: products of x as it is with the dequantized weight, sums in float32. True: each row of x is rounded
            to 127ths of its largest magnitude first, sums of a group are exact integers (Dettmers et al. 2022, LLM.int8(),
            without its outliers); several times faster with many rows. A codebook is then rounded to 127ths as well.
        impl: "cpu", "cuda" (16 bits of x, no codebooks), "triton" or "reference"; None chooses (see mlcore.explain, which takes
            x and packed). A weight's first call with "cuda" reorders its codes on the GPU, and the copy stays with them.

    Returns:
        y (..., N) in x's dtype. Differentiable in x, bias and residual; with dynamic_int8 as if x had not been rounded.
        A row with NaN or infinity gives, with dynamic_int8, a row of NaN.

    Raises:
        ValueError: shapes, dtypes or devices break the rules above, or impl can't serve the call.
    """
    x, residual = autocast(x.device.type, x, residual)
    _check(x, packed, bias, activation, residual)
    backend = choose(_OP, reference_if_transformed(_OP, impl), x, rest=(packed,))
    if backend == "reference":
        if not dynamic_int8 or not needs_grad(x, bias, residual):
            return _reference(x, packed, bias, activation, residual, dynamic_int8)
        exact = _reference(x, packed, bias, activation, residual, False)
        return _StraightThrough.apply(exact, _reference(x, packed, bias, activation, residual, True))
    wide = bias if bias is None or bias.dtype == torch.float32 else bias.float()
    weight = (packed.codes, packed.scales, packed.zeros, packed.codebook)
    numbers = packed.shape[0], packed.bits, packed.offset, packed.group_size, _ACTIVATIONS.index(activation), int(dynamic_int8)
    if needs_grad(x, wide, residual):
        return _QuantLinear.apply(x, wide, residual, *weight, *numbers, backend)
    run = run_fwd if direct(x, wide, residual, *weight) else _fwd
    return run(x, *weight, wide, residual, *numbers, backend)
