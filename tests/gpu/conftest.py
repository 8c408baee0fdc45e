"""Everything in this folder needs a GPU and mlcore's CUDA library, and is skipped with the reason where one is missing.

`make gpu` builds what it needs and runs it. Tests marked `sanitized` also run under compute-sanitizer: keep them small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [p for p in (str(ROOT / "tests" / "native"), str(ROOT / "tests" / "ops")) if p not in sys.path]


def unusable() -> str | None:
    """Why GPU tests can't run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from mlcore._backend import cuda_library

    library = cuda_library()
    return library if isinstance(library, str) else None


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitized: small enough to run under compute-sanitizer too")


def pytest_collection_modifyitems(items):
    mine = [item for item in items if HERE in item.path.parents]
    reason = unusable() if mine else None
    if reason is not None:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def nvcc_library(tmp_path_factory):
    """nvcc_library("primitives"): tests/native/emu/primitives.cu compiled for this GPU, as an emulator.Library."""
    import emulator

    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    major, minor = torch.cuda.get_device_capability()
    loaded = {}

    def build(name: str) -> emulator.Library:
        if name not in loaded:
            sources = [ROOT / "tests" / "native" / "emu" / f"{name}.cu", ROOT / "csrc" / "core" / "status.cc"]
            target = folder / f"lib{name}.so"
            flags = [
                "-std=c++17",
                "-O3",
                "--expt-relaxed-constexpr",
                f"-arch=sm_{major}{minor}",
                "-shared",
                "-Xcompiler",
                "-fPIC",
            ]
            done = subprocess.run(
                ["nvcc", *flags, *emulator.INCLUDES, *map(str, sources), "-o", str(target)], capture_output=True
            )
            assert done.returncode == 0, done.stderr.decode()
            loaded[name] = emulator.Library(target, device="cuda")
        return loaded[name]

    return build
