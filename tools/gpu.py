"""`make gpu`: on a machine with an NVIDIA GPU and nvcc, builds mlcore for that GPU with this Python, then runs tests/gpu, a few
of them under compute-sanitizer, and bench/gpu_*.py. Needs no network and leaves the Python environment as it is: the build goes
to build/gpu. Every step has a time limit and a failed one doesn't stop the next; the exit status says whether all passed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"

BUDGET = 530  # seconds for everything
LIMITS = {"build": 270, "tests": 180, "sanitizer": 75, "bench": 90}  # of a step; each benchmark is a step
FAULTY = "the sanitizer can't run on this machine"
# What must hold of the build; without this, one that has no CUDA library would pass, for its tests would all be skipped.
LOADS = """
import sys, mlcore
from mlcore._backend import unusable
mlcore.show_config()
if not mlcore.__file__.startswith(sys.argv[1]):
    sys.exit(f"{mlcore.__file__} comes before {sys.argv[1]}: use a Python without an editable install of mlcore")
sys.exit(unusable("cuda"))
"""


@dataclass
class Report:
    """The steps so far: (name, outcome, seconds)."""

    budget: float
    start: float = field(default_factory=time.monotonic)
    steps: list[tuple[str, str, float]] = field(default_factory=list)

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def add(self, name: str, outcome: str, seconds: float = 0.0) -> None:
        self.steps.append((name, outcome, seconds))
        print(f"== {name}: {outcome} ({seconds:.0f} s)", flush=True)

    def failed(self) -> bool:
        return any(outcome.startswith("FAILED") for _, outcome, _ in self.steps)


def run(report: Report, name: str, command: list[str], limit: float, env: dict[str, str]) -> tuple[int | None, str]:
    """(exit status, output), echoed as it comes; status None where the time limit ended it. Nothing of it survives."""
    limit = min(limit, report.left())
    if limit < 5:
        return None, ""
    print(f"== {name}: {' '.join(command)}", flush=True)
    log = BUILD / f"{re.sub(r'[^a-z0-9_]+', '-', name)}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    print(text[-6000:], flush=True)
    return status, text


def step(report: Report, name: str, command: list[str], limit: float, env: dict[str, str]) -> bool:
    """A step that must exit with 0."""
    begin = time.monotonic()
    status, _ = run(report, name, command, limit, env)
    took = time.monotonic() - begin
    if status is None:
        report.add(name, f"FAILED: not finished within its time limit, {min(limit, took):.0f} s", took)
    else:
        report.add(name, "passed" if status == 0 else f"FAILED: exit status {status}", took)
    return status == 0


def architecture(capability: tuple[int, int]) -> str:
    """CMake's name of the GPU's own architecture, with the instructions that only it has where the kernels use them."""
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def build(report: Report, arch: str, env: dict[str, str]) -> bool:
    """Installs mlcore into build/gpu/site; scikit-build-core, pybind11, CMake and Ninja are those of this Python."""
    shutil.rmtree(SITE, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
    ]
    command += ["--no-compile", "--target", str(SITE), f"-Cbuild-dir={BUILD / 'cmake'}", "-Ccmake.define.MLCORE_CUDA=ON"]
    command += [f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={arch}", "."]
    return step(report, "build", command, LIMITS["build"], env)


def sanitize(report: Report, env: dict[str, str]) -> None:
    """The tests marked `sanitized` under memcheck, with every tensor an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return report.add("sanitizer", "left out: no compute-sanitizer on the path")
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "97",
        "--report-api-errors",
        "no",
        sys.executable,
        "-m",
        "pytest",
    ]
    command += ["tests/gpu", "-q", "-x", "-m", "sanitized"]
    begin = time.monotonic()
    status, text = run(report, "sanitizer", command, LIMITS["sanitizer"], env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    took = time.monotonic() - begin
    if "Device not supported" in text:
        report.add("sanitizer", f"left out: {FAULTY}", took)
    elif status is None:
        errors = "Invalid __" in text
        report.add("sanitizer", "FAILED: errors, see above" if errors else "no error within its time limit", took)
    else:
        report.add("sanitizer", "passed" if status == 0 else f"FAILED: exit status {status}", took)


def benchmarks(report: Report, target: Path, env: dict[str, str]) -> None:
    """Each bench/gpu_*.py adds its rows to `target`; the time that is left is shared evenly."""
    scripts = sorted((ROOT / "bench").glob("gpu_*.py"))
    for i, script in enumerate(scripts):
        limit = min(LIMITS["bench"], (report.left() - 5) / (len(scripts) - i))
        if limit < 10:
            report.add(script.stem, "FAILED: no time left")
            continue
        command = [sys.executable, str(script.relative_to(ROOT)), "--json", str(target), "--seconds", str(int(limit * 0.7))]
        step(report, script.stem, command, limit, env)


def missing() -> str | None:
    """Why this machine can't do it, in one line, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if shutil.which("nvcc", path=_path()) is None:
        return "no nvcc on the path or under CUDA_HOME"
    absent = [m for m in ("pip", "pytest", "pybind11", "scikit_build_core") if importlib.util.find_spec(m) is None]
    return f"{sys.executable} lacks {', '.join(absent)}" if absent else None


def _path() -> str:
    """PATH with the CUDA toolkit's programs and this Python's (cmake, ninja)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    extra = [str(Path(sys.executable).parent), *(f"{home}/bin" for home in homes if home)]
    return os.pathsep.join([os.environ.get("PATH", ""), *extra])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds for, tests on and measures the GPU of this machine.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="where the JSON goes")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything (default {BUDGET})")
    parser.add_argument("--only", choices=["tests", "bench"], help="leave the others out; the build is always made")
    args = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        print(f"gpu: {reason}: nothing to run")
        return 1
    import torch

    report = Report(args.budget)
    BUILD.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    python_path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PATH": _path(), "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    env.pop("TRITON_INTERPRET", None)
    device = torch.cuda.get_device_name()
    print(f"== {device}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}", flush=True)
    if build(report, architecture(torch.cuda.get_device_capability()), env) and step(
        report, "library", [sys.executable, "-c", LOADS, str(SITE)], 60, env
    ):
        if args.only != "bench":
            step(report, "tests", [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--durations=5"], LIMITS["tests"], env)
        if args.only != "tests":
            slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").removeprefix("nvidia-")
            target = args.results / f"gpu-{slug}-{datetime.date.today().isoformat()}.json"
            benchmarks(report, target.resolve(), env)
            if target.exists():
                print(f"== results: {len(json.loads(target.read_text())['rows'])} rows in {target}")
        if args.only is None:
            sanitize(report, env)
    print("\n".join(f"{name:12} {seconds:5.0f} s  {outcome}" for name, outcome, seconds in report.steps))
    return 1 if report.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
