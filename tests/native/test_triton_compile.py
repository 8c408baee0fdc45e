"""Every Triton kernel compiles to a cubin for sm_80, sm_90 and sm_100, without a GPU.

kernels/<op>/<op>_triton.py lists its kernels in compile_specs(): (jit function, signature, constexprs, options) each, and
attributes of arguments where alignment decides what is compiled. A jit function whose name ends in _kernel is an entry point
and must be listed. Cubins are cached under build/triton.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(p.parent.name for p in ROOT.glob("kernels/*/*_triton.py"))
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of a block

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


def _module(op: str):
    """kernels.<op>.<op>_triton from the source tree: it needs no build of mlcore."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"kernels.{op}.{op}_triton")


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_is_listed(op):
    module = _module(op)
    listed = {spec[0] for spec in module.compile_specs()}
    own = {f for name, f in vars(module).items() if isinstance(f, JITFunction) and name.endswith("_kernel")}
    assert own <= listed, f"not in compile_specs(): {[f.__name__ for f in own - listed]}"


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op", OPS)
def test_compiles(op, capability, monkeypatch):
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    for kernel, signature, constexprs, options, *attrs in _module(op).compile_specs():
        source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attrs[0] if attrs else None)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        shared = compiled.metadata.shared
        print(f"{op}.{kernel.__name__} sm_{capability} {constexprs}: {len(compiled.asm['cubin'])} bytes, {shared} shared")
        assert compiled.asm["cubin"]
        assert shared <= SHARED_LIMIT[capability], f"{kernel.__name__} {constexprs} needs {shared} bytes of shared memory"
