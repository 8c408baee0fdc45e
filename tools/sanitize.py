"""Runs the kernel tests in a build with AddressSanitizer and UndefinedBehaviorSanitizer, every instruction-set level included.

The sanitizers' runtimes are preloaded into Python, so that torch's allocations, which kernels read and write, are watched too.
Arguments are passed on to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

import variant

# tests/ops runs every level by itself. Left out are tests that start interpreters, each of which takes 20 s to import torch,
# those of GPU code, which is built apart and without the sanitizers, and those of graphs around kernels.
TESTS = ["tests/native/test_binding.py", "tests/ops", "--ignore-glob=*_gpu_code.py", "-m", "not graph"]


def runtimes() -> list[str]:
    """libasan, libubsan and libstdc++ of the compiler; the last because libasan looks for __cxa_throw when it loads."""
    compiler, found = os.environ.get("CXX", "g++"), []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            print(f"== sanitize: skipped: {compiler} has no {name}")
            sys.exit(0)
        found.append(os.path.realpath(path))
    return found


def main() -> None:
    preload = runtimes()
    python = variant.build("sanitize", ["MLCORE_SANITIZE=ON"])
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",  # Python and torch free little at exit
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "MLCORE_SANITIZED": "1",
    }
    command = [str(python), "-m", "pytest", "-n", "auto", *TESTS, *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=variant.ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
