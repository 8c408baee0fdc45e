"""What the packaging tests share: the source distribution, the wheel built from it alone, an environment that holds the wheel,
and a plain CMake build and installation. Each is made once.
"""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import variant  # noqa: E402


def run(command: list, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in a clean environment: no CUDA compiler, no Python path, nothing of mlcore's own variables."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLCORE", "CUDA", "LD_", "VIRTUAL_ENV", "TRITON"))
    }
    env |= {"CUDACXX": "/nonexistent/nvcc"} | environment
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tool(name: str) -> str:
    """A tool of this environment or of the system; skips the test where there is none."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"no {name} on this machine")
    return path


def native_flags() -> list[str]:
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]


def once(tmp_path_factory, name: str, make: Callable):
    """What make(folder) returned, called by the first process of this test run that gets here; others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    home, record = base / name, base / f"{name}.pickle"
    with FileLock(base / f"{name}.lock"):
        if not record.exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            record.write_bytes(pickle.dumps(make(home)))
    return pickle.loads(record.read_bytes())


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The source distribution, unpacked: all later builds see only what it holds."""
    return once(tmp_path_factory, "sdist", make_source)


def make_source(out: Path) -> Path:
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(out)!r})"
    ok(run([sys.executable, "-c", code], cwd=ROOT))
    (archive,) = out.glob("mlcore-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.10.12, 3.11.4, 3.12
    return out / archive.name.removesuffix(".tar.gz")


@dataclass
class Wheel:
    path: Path
    seconds: float  # on the clock
    cpu_seconds: float  # of all processes: what the build costs, whatever else runs


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Wheel:
    """The wheel that `pip install .` builds, in pip's isolated environment: no torch and no CUDA compiler there."""
    return Wheel(*once(tmp_path_factory, "wheel", lambda out: make_wheel(source, out)))


def make_wheel(source: Path, out: Path) -> tuple:
    python = variant.environment(out / "bare", site_packages=[])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run([sys.executable, "-m", "pip", "--python", python, "wheel", "--no-deps", "--wheel-dir", out, "."], cwd=source)
    if re.search("No matching distribution found|Could not find a version|Max retries", done.stdout + done.stderr):
        pytest.skip("no package index within reach for an isolated build")
    ok(done)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (path,) = out.glob("*.whl")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return path, time.perf_counter() - start, cpu


@pytest.fixture(scope="session")
def wheel_python(wheel, tmp_path_factory) -> Path:
    """A Python with the wheel installed, and torch from the environment that runs the tests."""
    return once(tmp_path_factory, "installed", lambda home: make_wheel_python(wheel, home))


def make_wheel_python(wheel: Wheel, home: Path) -> Path:
    python = variant.environment(home / "venv", site_packages=variant.here())
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    ok(run([*pip, wheel.path]))
    return python


@pytest.fixture(scope="session")
def installed(wheel_python) -> Path:
    """The installed package's folder."""
    code = "import mlcore, pathlib; print(pathlib.Path(mlcore.__file__).parent)"
    return Path(ok(run([wheel_python, "-c", code])).strip())


@dataclass
class Native:
    build: Path
    prefix: Path
    log: str


@pytest.fixture(scope="session")
def native(source, tmp_path_factory) -> Native:
    """cmake -S . -B build && cmake --build build && cmake --install build, as a C++ user does: no Python, no CUDA."""
    return Native(*once(tmp_path_factory, "native", lambda home: make_native(source, home)))


def make_native(source: Path, home: Path) -> tuple:
    build, prefix = home / "build", home / "prefix"
    cmake = tool("cmake")
    log = ok(run([cmake, "-S", source, "-B", build, *native_flags(), f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DMLCORE_TESTS=ON"]))
    ok(run([cmake, "--build", build]))
    ok(run([cmake, "--install", build]))
    return build, prefix, log
