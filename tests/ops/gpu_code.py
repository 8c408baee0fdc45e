"""GPU kernels of an op against its reference: on the CPU its .cu through the emulator and its Triton kernels interpreted, and
by tests/gpu both on a GPU.

A norm's kernels are (fwd, bwd) callables with the arguments of its C functions; check_norm() compares both passes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "tests" / "native")) if p not in sys.path]

import emulator  # noqa: E402

#: Triton decides at import whether its kernels are interpreted, so such tests run in a process of their own.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

Kernels = tuple[Callable, Callable]


def emulated(op: str) -> Kernels:
    """The CUDA kernels, through their C functions."""
    lib = emulator.load(f"kernels/{op}/{op}.cu")
    return tuple(lambda *args, name=f"mlc_cuda_{op}_{p}": lib.call(name, *args, None) for p in ("fwd", "bwd"))


def interpreted(op: str) -> Kernels:
    """The Triton kernels; only where INTERPRETING."""
    module = importlib.import_module(f"kernels.{op}.{op}_triton")
    return module.fwd, module.bwd


def on_gpu(op: str, backend: str) -> Kernels:
    """The kernels that mlcore built for CUDA, or its Triton kernels compiled."""
    if backend == "cuda":
        from mlcore._backend import cuda_library

        return tuple(getattr(cuda_library(), f"{op}_{p}") for p in ("fwd", "bwd"))
    module = importlib.import_module(f"mlcore.kernels.{op}.{op}_triton")
    return module.fwd, module.bwd


@contextlib.contextmanager
def serving(op: str, backend: str) -> Iterator[str]:
    """Within the block mlcore.ops' function `op` computes CPU tensors by its own launcher with the emulated CUDA kernels
    ("cuda") or the interpreted Triton kernels ("triton"), forward and backward. Gives what to pass as impl=."""
    from mlcore import _C, _registry

    ops = importlib.import_module(f"mlcore.ops.{op}")
    passes = [p for o, p, b, _ in _C.table() if o == op and b == backend]
    assert passes, f"kernels.inc has no {backend} row of {op}; rebuild mlcore"
    if backend == "cuda":
        if emulator.compiler() is None:
            pytest.skip("the emulator needs Linux and a C++ compiler")
        lib = emulator.load(f"kernels/{op}/{op}.cu")
        kernels = {p: lambda *args, name=f"mlc_cuda_{op}_{p}": lib.call(name, *args, None) for p in passes}
    else:
        module = importlib.import_module(f"kernels.{op}.{op}_triton")
        kernels = {p: getattr(module, p) for p in passes}
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in kernels.items():
            patch.setitem(_registry._kernels, (op, name, backend), kernel)
        patch.setattr(ops, "choose", lambda op, impl, *_, **__: impl or backend)
        yield backend


def interpreted_by_triton(test_file: str) -> Callable[[], None]:
    """A test that runs those of a file whose names have `interpreted_` in them under TRITON_INTERPRET=1."""

    @pytest.mark.skipif(INTERPRETING, reason="this is the process that it starts")
    def test() -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test_file, "-k", "interpreted_"]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr

    return test


def reference(op: str) -> Callable:
    """The op in plain torch, from kernels/<op>/<op>_ref.py."""
    return getattr(importlib.import_module(f"kernels.{op}.{op}_ref"), op)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Norm:
    """One call of a norm: shapes, dtypes and which arguments are given."""

    rows: int
    cols: int
    dtype: torch.dtype = torch.float32
    vector_dtype: torch.dtype | None = None  # of weight and bias; None is dtype
    weight: bool = True
    bias: bool = True  # layer_norm alone has one
    residual: bool = False
    row_blocks: int = 64
    row_gap: int = 0  # elements between rows
    offset: int = 0  # elements before the first row: breaks the alignment
    mean: float = 0.0

    def __str__(self) -> str:
        given = "".join(n[0] if getattr(self, n) else "-" for n in ("weight", "bias", "residual"))
        parts = [f"{self.rows}x{self.cols}", str(self.dtype)[6:], given, str(self.vector_dtype or "")[6:]]
        return " ".join(p for p in parts if p) + f" gap{self.row_gap} offset{self.offset} P{self.row_blocks}"


NORM_CASES = [
    Norm(1, 1),
    Norm(5, 37),
    Norm(5, 37, BF16, residual=True),
    Norm(3, 64, F16, F32, residual=True),
    Norm(130, 64, BF16, F32),
    Norm(70, 96, residual=True, row_blocks=7),
    Norm(9, 256, BF16, weight=False, residual=True),
    Norm(9, 256, weight=False, bias=False),
    Norm(6, 1000, F16, bias=False, mean=30.0),
    Norm(6, 1032, BF16, residual=True, row_gap=8),
    Norm(4, 512, row_gap=3),
    Norm(5, 37, row_gap=3),
    Norm(4, 512, BF16, offset=1),
    Norm(3, 2309, residual=True, row_blocks=2),  # longer than what a block keeps in registers
    Norm(2, 16648, BF16, F32, residual=True),  # the same with 16-byte accesses
]
# The interpreter computes bfloat16 wrongly. The last row is longer than what a Triton program holds at once.
INTERPRETED_NORM_CASES = [c for c in NORM_CASES if c.dtype != BF16] + [Norm(3, 8300, F16, residual=True)]


def _rows(case: Norm, device: str, fill: float | None = None) -> torch.Tensor:
    """(R, C) with the case's strides; random, or full of `fill`."""
    numel = case.offset + case.rows * (case.cols + case.row_gap)
    storage = torch.full((numel,), float("nan"), dtype=case.dtype, device=device)
    rows = storage[case.offset :].view(case.rows, case.cols + case.row_gap)[:, : case.cols]
    return rows.copy_(torch.randn(case.rows, case.cols) + case.mean) if fill is None else rows.fill_(fill)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().nan_to_num(nan=float("inf")).max()) if want.numel() else 0.0


def _assert_close(name: str, got: torch.Tensor, want: torch.Tensor, math: torch.Tensor, factor: float, scale: float) -> None:
    """The error against float64 is at most `factor` times that of plain torch in the same dtype, where one rounding of the
    result and one float32 rounding of terms of size `scale` are always allowed."""
    rounding = torch.finfo(got.dtype).eps * float(want.abs().max()) + torch.finfo(torch.float32).eps * scale
    error, allowed = _error(got, want), factor * _error(math, want) + rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _differentiate(norm: Callable, inputs: dict, dy: torch.Tensor, ds: torch.Tensor | None, wide: bool) -> dict:
    """y, s and the gradients of the reference; in float64 when wide."""
    leaves = {n: (t.double() if wide else t.clone()).requires_grad_() for n, t in inputs.items() if t is not None}
    y, s = norm(**leaves)
    outputs, cotangents = [y], [dy.to(y.dtype)]
    if ds is not None:
        outputs, cotangents = [y, s], [dy.to(y.dtype), ds.to(s.dtype)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {"y": y.detach(), "s": s.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}


def check_norm(op: str, kernels: Kernels, case: Norm, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Runs both passes, compares them with the reference and returns what the kernels wrote."""
    fwd, bwd = kernels
    torch.manual_seed(case.rows * 1000003 + case.cols)
    has_bias = op == "layer_norm"
    eps, cols, nan = 1e-5, case.cols, float("nan")
    x, dy = _rows(case, device), _rows(case, device)
    residual, ds = (_rows(case, device), _rows(case, device)) if case.residual else (None, None)
    vector_dtype = case.vector_dtype or case.dtype
    weight = (torch.rand(cols) + 0.5).to(device, vector_dtype) if case.weight else None
    bias = torch.randn(cols).to(device, vector_dtype) if has_bias and case.bias else None

    y, s = _rows(case, device, nan), _rows(case, device, nan) if case.residual else None
    rstd = torch.full((case.rows,), nan, device=device)
    mean = [torch.full_like(rstd, nan)] if has_bias else []
    affine = [weight, bias] if has_bias else [weight]
    fwd(x, residual, *affine, eps, y, s, *mean, rstd)

    dx = _rows(case, device, nan)
    gradients = [None if v is None else torch.full_like(v, nan) for v in affine]
    shape = (*((2,) if has_bias else ()), min(case.rows, case.row_blocks), cols)
    partial = torch.full(shape, nan, device=device) if any(g is not None for g in gradients) else None
    main = s if case.residual else x
    bwd(dy, ds, main, weight, *mean, rstd, dx, *gradients, partial)

    inputs = {"x": x, "residual": residual, "weight": weight} | ({"bias": bias} if has_bias else {})
    norm = reference(op)
    want = _differentiate(lambda **a: norm(**a, eps=eps), inputs, dy, ds, wide=True)
    math = _differentiate(lambda **a: norm(**a, eps=eps), inputs, dy, ds, wide=False)
    got = {"y": y, "dx": dx, "dweight": gradients[0]} | ({"dbias": gradients[1]} if has_bias else {})
    if case.residual:
        assert torch.equal(s, math["s"])
        got["dresidual"] = dx
    got = {name: tensor for name, tensor in got.items() if tensor is not None}
    for name, tensor in got.items():
        _assert_close(name, tensor, want[name], math[name], 1.5 if name == "y" else 2.0, float(dy.abs().max()))
    wide = main.double()
    variance = (wide - wide.mean(-1, keepdim=True)).square().mean(-1) if has_bias else wide.square().mean(-1)
    torch.testing.assert_close(rstd.double(), (variance + eps).rsqrt(), rtol=2e-6, atol=0)
    return got | {"rstd": rstd}
