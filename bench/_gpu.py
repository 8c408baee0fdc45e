"""What the GPU benchmarks share. bench/gpu_<op>.py is a script: `python bench/gpu_<op>.py --json PATH` checks and times its
groups and adds them to the results file at PATH, in the format of harness.py. `make gpu` runs them all.
"""

from __future__ import annotations

import argparse
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import harness
import torch
from harness import Group


def driver() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def versions() -> dict:
    import mlcore

    found = {"mlcore": mlcore.__version__, "torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found | {"python": platform.python_version()}


@functools.cache
def machine() -> dict:
    """The device and its measured ceilings: a copy of 2 GiB and a bfloat16 matrix product of 8192."""
    sync = torch.cuda.synchronize
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    best = {name: t.min for name, t in harness.interleaved(calls, 10, 2e-2, sync=sync).items()}
    return {
        "device": torch.cuda.get_device_name(),
        "kind": "cuda",
        "copy_gbps": 2 * source.numel() / best["copy"] * 1e-9,
        "bf16_gflops": 2 * 8192**3 / best["product"] * 1e-9,
    }


def measure(name: str, group: Group, max_time: float) -> list[dict]:
    """Checks every row of a group, then times them in turns. A row that raises ValueError or NotImplementedError is not made
    for the problem: it is reported and left out.
    """
    right, errors = {}, {}
    for row, call in group.rows.items():
        try:
            output = call()
        except (ValueError, NotImplementedError) as reason:
            print(f"{name}: {row}: {reason}")
            continue
        errors[row] = group.check(row, output)
        right[row] = call
        del output
    timings = harness.interleaved(right, max_time=max_time, sync=torch.cuda.synchronize)
    rows = []
    for row, timing in timings.items():
        rates = harness.rates_of(group, timing.min, machine()["bf16_gflops"], machine()["copy_gbps"])
        extra = {"error": errors[row]} | rates
        print(f"{name}: {row}: {timing.min * 1e6:.1f} us, {100 * extra.get('peak_fraction', 0):.0f} % of peak")
        rows.append(harness.result_row(name, row, timing, **extra))
    return rows


def main(groups: Iterable[tuple[str, Callable[[], Group]]], argv: list[str] | None = None) -> int:
    """Measures the groups (name, make) in order, within --seconds; a group that fails doesn't stop the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", required=True, help="results file that the rows are added to")
    parser.add_argument("--seconds", type=float, default=60, help="no group starts after this (default 60)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device")
        return 1
    rows, failed, start = [], 0, time.monotonic()
    for name, make in groups:
        left = args.seconds - (time.monotonic() - start)
        if left <= 0:
            print(f"{name}: not measured, the time is up")
            continue
        try:
            rows += measure(name, make(), max_time=min(2.0, left / 4))
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()
    if rows:
        harness.write_results(args.json, rows, machine(), versions())
    return 1 if failed else 0
