"""Runs .cu files on the CPU: compiles them with the host compiler over csrc/cuda/emu.h and calls their C functions.

    emulator.load("kernels/rms_norm/rms_norm.cu").call("mlc_cuda_rms_norm_fwd", x, None, weight, 1e-6, y, None, rstd, None)

Libraries stay under build/emu by the hash of their sources. Library also calls what nvcc built, on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = [f"-I{ROOT / d}" for d in ("csrc", "csrc/include", "kernels")]
# bounds and alignment: their reports arrive in emu.cc, so nothing of the sanitizers' runtime is linked.
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fsanitize=bounds,alignment"]
BASE_SOURCES = ("csrc/cuda/emu.cc", "csrc/core/status.cc")
RED_ZONE = 4096  # bytes before and after a tensor's own


class DLTensor(ctypes.Structure):
    """As csrc/include/mlcore/dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _dtype_code(dtype: torch.dtype) -> int:
    if dtype == torch.bool:
        return 6
    if dtype.is_floating_point:
        return 4 if dtype == torch.bfloat16 else 2
    return 1 if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64) else 0


def dl_tensor(t: torch.Tensor, data: int) -> DLTensor:
    """t's description with its data at `data`. It says CUDA also in the emulator: launchers check for their own device."""
    dims = ctypes.c_int64 * t.dim()
    kind, index = 2, t.device.index or 0
    return DLTensor(
        data, kind, index, t.dim(), _dtype_code(t.dtype), t.element_size() * 8, 1, dims(*t.shape), dims(*t.stride()), 0
    )


class _RedZoned:
    """A CPU tensor's elements in memory of their own, with 0xff (NaN in every float type) before, after and between them."""

    _BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def __init__(self, t: torch.Tensor):
        bits, size = self._BITS[t.element_size()], t.element_size()
        distinct = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())  # of an expanded tensor
        self.tensor = t.data.view(bits)[distinct]  # .data: giving an input back is no change that autograd should see
        span = (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * size if t.numel() else 0
        self.buffer = torch.full((span + 2 * RED_ZONE + 256,), 0xFF, dtype=torch.uint8)
        begin = RED_ZONE + (t.data_ptr() - self.buffer.data_ptr() - RED_ZONE) % 256  # keeps the alignment, good or bad
        inside = self.buffer[begin : begin + span].view(bits)
        self.copy = inside.as_strided(self.tensor.shape, self.tensor.stride(), inside.storage_offset()) if span else None
        self.data = self.buffer.data_ptr() + begin
        if span:
            self.copy.copy_(self.tensor)

    def give_back(self, what: str) -> None:
        if self.copy is not None:
            self.tensor.copy_(self.copy)
            self.copy.fill_(255 if self.copy.dtype == torch.uint8 else -1)
        if not bool(self.buffer.eq(0xFF).all()):
            raise RuntimeError(f"{what} was written outside its elements")


class Library:
    """C functions of a shared library: tensors become DLTensors, None NULL, a status other than 0 an exception."""

    def __init__(self, path: Path, device: str = "cpu"):
        self.device = device
        self._lib = ctypes.CDLL(str(path))
        self._lib.mlc_last_error.restype = ctypes.c_char_p

    def set_seed(self, seed: int) -> None:
        """Seeds the emulator's order of threads and blocks."""
        self._lib.mlc_emu_set_seed(ctypes.c_uint64(seed))

    def call(self, name: str, *args: torch.Tensor | int | float | str | None) -> None:
        zones, keep, c_args = {}, [], []  # zones by place: an output may be an input too
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                data = arg.data_ptr()
                if self.device == "cpu":
                    place = data, arg.shape, arg.stride()
                    if place not in zones:
                        zones[place] = i, _RedZoned(arg)
                    data = zones[place][1].data
                keep.append(dl_tensor(arg, data))
                c_args.append(ctypes.byref(keep[-1]))
            elif isinstance(arg, float):
                c_args.append(ctypes.c_double(arg))
            elif isinstance(arg, str):
                c_args.append(ctypes.c_char_p(arg.encode()))
            else:
                c_args.append(ctypes.c_void_p() if arg is None else ctypes.c_int64(arg))
        status = getattr(self._lib, name)(*c_args)
        if status:
            error = {1: ValueError, 2: NotImplementedError}.get(status, RuntimeError)
            raise error(self._lib.mlc_last_error().decode())
        for i, zone in zones.values():
            zone.give_back(f"{name}: argument {i}")


@functools.cache
def compiler() -> str | None:
    """The host C++ compiler, or None where there is none or the system isn't Linux, whose dl_iterate_phdr emu.cc needs."""
    if sys.platform != "linux":
        return None
    return next((path for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and (path := shutil.which(c))), None)


@functools.cache
def _infrastructure_hash() -> str:
    files = sorted(p for d in ("csrc/cuda", "csrc/core", "csrc/include") for p in (ROOT / d).rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


@contextlib.contextmanager
def _only_one(lock: Path):
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    print(done.stderr, end="")


def _library(name: str, key: str, sources: list[Path], flags: list[str], links: list[str]) -> Path:
    digest = hashlib.sha256("\n".join([key, _infrastructure_hash(), str(compiler()), *FLAGS, *flags]).encode()).hexdigest()[:16]
    target = ROOT / "build" / "emu" / f"lib{name}-{digest}.so"
    with _only_one(target.with_suffix(".lock")):
        if not target.exists():
            objects = [target.with_name(f"{name}-{digest}-{s.stem}.o") for s in sources]
            for source, obj in zip(sources, objects):
                _run([compiler(), *FLAGS, *flags, *INCLUDES, "-c", str(source), "-o", str(obj)])
            partial = target.with_suffix(".partial")
            _run([compiler(), "-shared", *map(str, objects), "-o", str(partial), *links])
            partial.rename(target)
            for obj in objects:
                obj.unlink()
    return target


@functools.cache
def load(source: str, base_flags: tuple[str, ...] = ()) -> Library:
    """Compiles one .cu (a path from the repository's root) and loads it. base_flags: for the emulator's own sources."""
    path = ROOT / source
    base = _library("mlcore_emu", "base", [ROOT / s for s in BASE_SOURCES], ["-fno-sanitize=all", *base_flags], [])
    near = sorted(p for p in path.parent.iterdir() if p.suffix in (".cu", ".cuh", ".h"))
    key = "\n".join([source, base.name, *(p.read_text() for p in near)])
    library = _library(path.stem, key, [path], [], [str(base), "-Wl,-rpath,$ORIGIN"])
    return Library(library)
