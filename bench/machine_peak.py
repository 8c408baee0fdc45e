"""The machine's measured ceilings, the yardsticks of the benchmarks: fp32 FMA rate of the ISA level in use, and memory copy.

`python bench/machine_peak.py` prints both, for one thread and for all. Rates of bf16 rows are held against the fp32 peak too.
"""

from __future__ import annotations

import argparse
import time

import torch

_COPY_BYTES = 128 << 20  # beyond the caches that two cores have to themselves


_best: dict[tuple[int, str], dict[str, float]] = {}


def measure(threads: int, isa: str, seconds: float = 0.1) -> dict[str, float]:
    """fma_gflops, and copy_gbps counting bytes read plus bytes written: the best that this process has seen so far.

    Measures for `seconds` each; called again now and then, it finds a moment in which the machine was undisturbed.
    """
    from mlcore import _C

    best = _best.setdefault((threads, isa), {"fma_gflops": 0.0, "copy_gbps": 0.0})
    best["fma_gflops"] = max(best["fma_gflops"], _C.fma_peak_gflops(threads, seconds))
    best["copy_gbps"] = max(best["copy_gbps"], _copy_gbps(threads, seconds))
    return dict(best)


def _copy_gbps(threads: int, seconds: float) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        src = torch.ones(_COPY_BYTES // 4)
        dst = torch.empty_like(src)
        dst.copy_(src)  # maps the pages
        best, copies = 0.0, 0
        end = time.perf_counter() + seconds
        while copies < 3 or time.perf_counter() < end:
            copies += 1
            start = time.perf_counter()
            dst.copy_(src)
            best = max(best, 2 * _COPY_BYTES / (time.perf_counter() - start))
        return best * 1e-9
    finally:
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure")
    seconds = parser.parse_args().seconds
    from harness import cpu_machine

    machine = cpu_machine()
    print(f"{machine['device']}, {machine['isa']}")
    for threads in sorted({1, machine["threads"]}):
        peak = measure(threads, machine["isa"], seconds)
        rates = f"{peak['fma_gflops']:.0f} GFLOP/s fp32 FMA, {peak['copy_gbps']:.1f} GB/s copy"
        print(f"  {threads} thread{'s' * (threads > 1)}: {rates}")


if __name__ == "__main__":
    main()
