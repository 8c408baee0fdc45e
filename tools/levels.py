"""Runs the kernel tests under every instruction-set level but this machine's best, which the whole suite covers.

Lower levels come by MLCORE_ISA. AVX-512, where the machine has none, comes by a build that emulates it (needs SIMDe's headers;
Debian: libsimde-dev). Arguments are passed on to pytest. Every level runs; the exit status says whether all passed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import variant

from mlcore import _C

LEVELS = ("scalar", "avx2", "avx512")
# What computes with the default level. tests/ops runs every level of the machine by itself and joins in for the emulated one.
BY_ENVIRONMENT = ["tests/native/test_binding.py", "tests/native/test_isa.py", "tests/native/test_parallel.py", "tests/nn"]
EMULATED = ["tests/ops", *BY_ENVIRONMENT[:2], "--ignore-glob=*_gpu_code.py"]


def emulation_refused() -> str | None:
    """Why the AVX-512 kernels are not emulated here, or None."""
    if _C.best_isa() == "avx512":
        return "the machine has AVX-512"
    if _C.best_isa() == "scalar":
        return "emulation needs AVX2"
    probe = subprocess.run(
        [os.environ.get("CXX", "c++"), "-fsyntax-only", "-x", "c++", "-"],
        input="#include <simde/x86/avx512.h>\n",
        capture_output=True,
        text=True,
    )
    return None if probe.returncode == 0 else "no SIMDe headers (Debian: libsimde-dev)"


def run(level: str, python: str, tests: list[str]) -> bool:
    print(f"== {level}", flush=True)
    command = [python, "-m", "pytest", "-n", "auto", *tests, *sys.argv[1:]]
    return subprocess.run(command, cwd=variant.ROOT, env=os.environ | {"MLCORE_ISA": level}).returncode == 0


def main() -> None:
    passed = [run(level, sys.executable, BY_ENVIRONMENT) for level in LEVELS[: LEVELS.index(_C.best_isa())]]
    if (reason := emulation_refused()) is None:
        python = variant.build("emulated", ["MLCORE_EMULATE_AVX512=ON"])
        passed.append(run("avx512", str(python), EMULATED))
    else:
        print(f"== avx512 emulated: skipped: {reason}")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
