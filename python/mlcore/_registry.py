"""How an op becomes a citizen of torch: schema, kernels by device, fake, autocast; and when a call may skip all that.

An op file calls register() once per pass, keeps the handle it returns, and wraps the pair in an autograd.Function (ctx
style: setup_context costs 17 us a call). A call with nothing to record goes to the launcher directly (direct()).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from . import _C
from ._backend import cuda_library

_LIB = torch.library.Library("mlcore", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling
_watch, _watch_rows = _C.watch, _C.watch_rows


def register(
    schema: str, *, launch: Callable, fake: Callable, cpu_launch: Callable | None = None, lower_precision: bool = False
) -> torch._ops.OpOverload:
    """Defines mlcore::<schema>, with one launcher for CPU and CUDA tensors and the fake that mirrors its outputs.

    cpu_launch: another launcher for CPU tensors, where a shorter way is worth its lines.
    lower_precision: under torch.autocast the op's floating tensors are cast to the autocast dtype (as torch does for matmul
    and attention); otherwise they are taken as they are, after promotion by the public function.
    """
    name = schema.split("(", 1)[0]
    _LIB.define(schema)
    _LIB.impl(name, cpu_launch or launch, "CPU")
    _LIB.impl(name, launch, "CUDA")
    torch.library.register_fake(f"mlcore::{name}", fake, lib=_LIB)
    if lower_precision:
        for device in ("cpu", "cuda"):
            _register_autocast(name, device)
    return getattr(torch.ops.mlcore, name).default


def _register_autocast(name: str, device: str) -> None:
    handle = getattr(torch.ops.mlcore, name).default
    key = "AutocastCPU" if device == "cpu" else "AutocastCUDA"

    def cast_and_call(*args):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return handle(*(_autocast_arg(a, device, dtype) for a in args))

    _LIB.impl(name, cast_and_call, key)


def _autocast_arg(a, device: str, dtype: torch.dtype):
    eligible = isinstance(a, torch.Tensor) and a.is_floating_point() and a.dtype != torch.float64 and a.device.type == device
    return a.to(dtype) if eligible else a


def autocasting(device: str) -> bool:
    """Whether torch.autocast is on for this type of device; asking torch itself raises for "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(device: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, cast as torch.autocast casts a matmul's operands when it is on for this device."""
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(_autocast_arg(t, device, dtype) for t in tensors)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True when autograd must record the call."""
    if _grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def direct(*tensors: torch.Tensor | None) -> bool:
    """True when nothing watches the call: no tracing, no mode, no transform, only plain tensors. Grad is the caller's check."""
    if _compiling() or _dispatch_modes() or _functorch_level() is not None or _tracing() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return True


def lean(*tensors: torch.Tensor | None) -> int:
    """direct() and needs_grad() in one, for tensors that a CPU kernel takes as they stand: contiguous float32, bf16 or fp16.

    0: the general way; 1: straight to the kernel; 2: the same, and autograd must record the call.
    """
    return 0 if _compiling() else _watch(*tensors)


def lean_rows(*tensors: torch.Tensor | None) -> int:
    """lean() for kernels that ask for a contiguous last dimension only."""
    return 0 if _compiling() else _watch_rows(*tensors)


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """function.apply for direct() calls: below its Python wrapper, which looks for torch.func's transforms (1.5 us a call)."""
    return super(torch.autograd.Function, function).apply


_kernels: dict[tuple[str, str, str], Callable] = {}


def kernel(op: str, pass_name: str, backend: str) -> Callable:
    """The function of a kernels.inc row or helper, for a launcher: all backends of a pass take the same arguments."""
    key = (op, pass_name, backend)
    found = _kernels.get(key)
    if found is None:
        if backend == "triton":
            found = getattr(importlib.import_module(f"mlcore.kernels.{op}.{op}_triton"), pass_name)
        else:
            found = getattr((_C if backend == "cpu" else cuda_library()).launch, f"{op}_{pass_name}")
        _kernels[key] = found
    return found


def transformed() -> bool:
    """True where torch.func (vmap, grad, ...), forward-mode AD or torch.jit.trace follows the call: only plain torch ops."""
    if _compiling():
        return False
    return _functorch_level() is not None or forward_ad._current_level >= 0 or _tracing() is not None


def reference_if_transformed(op: str, impl: str | None) -> str | None:
    """impl, or "reference" where transformed(); an explicit kernel is refused there."""
    if not transformed():
        return impl
    if impl not in (None, "reference"):
        raise ValueError(f"{op}: impl={impl!r} can't serve torch.func, forward-mode AD or torch.jit.trace; the reference can")
    return "reference"


def create_graph() -> bool:
    """True in a backward pass that must itself be differentiable."""
    return torch.is_grad_enabled() and not _compiling()


def graph_gradients(needed: Sequence[bool], tensors: Sequence, outputs: Sequence, seeds: Sequence) -> tuple:
    """Where create_graph(): gradients of `tensors` with a graph, None where they aren't needed. `outputs` are the reference's,
    computed with gradients enabled, which differentiates without end; one without a seed counts for nothing.
    """
    wanted = [i for i, t in enumerate(tensors) if t is not None and needed[i]]
    outs, given = zip(*((out, seed) for out, seed in zip(outputs, seeds) if seed is not None and out.requires_grad))
    found = torch.autograd.grad(outs, [tensors[i] for i in wanted], given, create_graph=True, allow_unused=True)
    grads = dict(zip(wanted, found))
    return tuple(grads.get(i) for i in range(len(tensors)))
