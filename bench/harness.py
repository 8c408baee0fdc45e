"""Fair timing and the results format. interleaved() times several implementations of one problem against each other;
write_results() keeps what CPU and GPU benchmarks measure in one JSON format. No problem and no table is defined here.
"""

from __future__ import annotations

import datetime
import functools
import gc
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import machine_peak
import torch

# A results file (bench/results/<name>.json) is one machine with one set of versions:
#
#     {"schema": 1,
#      "machine": {"device": "AMD EPYC", "kind": "cpu", "isa": "avx2", "threads": 2,             # kind: "cpu" or "cuda"
#                  "fma_gflops": 150.2, "copy_gbps": 21.7},                                      # measured peaks, optional
#      "versions": {"mlcore": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},               # any names: driver, ...
#      "rows": [{"group": "attention float32 fwd (1,8,2048,64) full", "row": "mlcore",           # group: "<op> <problem>"
#                "seconds_min": 0.0121, "seconds_median": 0.0123, "date": "2026-08-20",          # per call
#                "extra": {"rounds": 15, "gflops": 709.8, "peak_fraction": 0.6}}]}               # any numbers and words
#
# One group is one problem and its rows were timed interleaved, so their ratios hold. Rows whose name starts with "mlcore" are
# ours. bench/report.py reads extra.gflops or extra.gbps; extra.limit (op "overhead": the most that the ratio to "x + y" should
# be); extra.impl and extra.threads (op "scaling").
SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one implementation, one entry a round."""

    seconds: list[float]

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    rows: dict[str, Callable[[], object]],
    repeats: int = 15,
    min_time: float = 2e-3,
    *,
    max_time: float = math.inf,
    before: dict[str, Callable[[], object]] | None = None,
    sync: Callable[[], object] = lambda: None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times every row once a round, in alternating order, so that a slow moment of the machine hits all rows alike.

    Args:
        rows: name -> the call to time.
        repeats: rounds.
        min_time: seconds that a sample lasts at least; a shorter call is repeated within its sample.
        max_time: seconds after which no further round starts; three rounds are always made (or `repeats`, if fewer).
        before: name -> what to do, untimed, before each of the row's samples (one untimed call follows it).
        sync: waits for the device, called before each clock reading.
        progress: called after each sample.
    """
    before = before or {}
    calls = {}
    for name, call in rows.items():
        before.get(name, lambda: None)()
        calls[name], estimate = 1, _sample(call, 1, sync)  # also warms up
        while estimate * calls[name] < min_time and calls[name] < 1 << 20:  # a first estimate is mostly cold caches: ask again
            grown = min(math.ceil(min_time / max(estimate, 1e-9)), 8 * calls[name])
            calls[name] = max(grown, calls[name] + 1)
            estimate = _sample(call, calls[name], sync)
    seconds = {name: [] for name in rows}
    end = time.perf_counter() + max_time
    collecting = gc.isenabled()
    try:
        gc.disable()
        for turn in range(repeats):
            if turn >= 3 and time.perf_counter() > end:
                break
            for name in list(rows)[:: 1 if turn % 2 else -1]:
                if name in before:
                    before[name]()
                    rows[name]()
                seconds[name].append(_sample(rows[name], calls[name], sync))
                progress()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(s) for name, s in seconds.items()}


@dataclass
class Group:
    """One problem: what each row calls, how its output is checked before it is timed, and how much work a call is.

    rows: name -> call.
    check: check(row, output) gives the output's largest relative error, or raises AssertionError where it is wrong.
    flops, bytes: the work of one call that any implementation must do; one of them is 0.
    before: name -> what to do before each sample of the row, untimed.
    extra: name -> what else to record of this row.
    """

    rows: dict[str, Callable[[], object]]
    check: Callable[[str, object], float]
    flops: float = 0
    bytes: float = 0
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    extra: dict[str, dict] = field(default_factory=dict)


def run_group(
    name: str, group: Group, machine: dict, *, rounds: int, max_time: float, timings: dict | None = None
) -> dict[str, dict | Exception]:
    """Checks every row, then times those that are right. Row name -> its result row, or what its check raised.

    rounds = 0 checks only and gives empty result rows. The samples go into timings[name, row]; the peaks into machine.
    """
    results: dict[str, dict | Exception] = {}
    extra: dict[str, dict] = {}
    for row, call in group.rows.items():
        try:
            group.before.get(row, lambda: None)()
            extra[row] = {"error": group.check(row, call())} | group.extra.get(row, {})
            results[row] = {}
        except Exception as error:  # a row that fails must not take the others with it
            results[row] = error
    if not rounds:
        return results
    _update_peaks(machine)
    right = {row: group.rows[row] for row in extra}
    before = {row: group.before[row] for row in right if row in group.before}
    for row, timing in interleaved(right, rounds, max_time=max_time, before=before).items():
        rates = rates_of(group, timing.min, machine["fma_gflops"], machine["copy_gbps"])
        results[row] = result_row(name, row, timing, **rates, **extra[row])
        if timings is not None:
            timings[name, row] = timing
    return results


def _update_peaks(machine: dict) -> None:
    machine.update(machine_peak.measure(machine["threads"], machine["isa"]))


def rates_of(group: Group, seconds: float, peak_gflops: float, peak_gbps: float) -> dict:
    """GFLOP/s or GB/s of one call, and which part of the machine's peak that is."""
    for key, work, peak in (("gflops", group.flops, peak_gflops), ("gbps", group.bytes, peak_gbps)):
        if work:
            rate = work / seconds * 1e-9
            return {key: rate, "peak_fraction": rate / peak}
    return {}


def settled(rows: Iterable[str]) -> dict[str, Callable[[], object]]:
    """A Group's `before` that waits until threads of the row before stop spinning: ONNX Runtime's look for work for a while,
    on the processors that the next row needs.
    """
    return dict.fromkeys(rows, functools.partial(time.sleep, 0.05))


def compiled(function: Callable, **options) -> Callable:
    """torch.compile for the shapes of one group. Past its limit of recompilations it would run the function uncompiled, without
    a word: every group starts from an empty cache, and reaching the limit is an error.
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, **options)


def _sample(call: Callable[[], object], calls: int, sync: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    sync()
    return (time.perf_counter() - start) / calls


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| over all elements, in float64."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def others_at_work(seconds: float = 0.5) -> str | None:
    """A warning where other programs use more than a tenth of the processors while this one waits; None where all is quiet."""

    def ticks() -> list[int]:
        return [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]  # proc(5): idle, iowait at 3, 4

    try:
        before = ticks()
        time.sleep(seconds)
        spent = [b - a for a, b in zip(before, ticks())]
    except OSError:
        return None
    busy = 1 - (spent[3] + spent[4]) / max(sum(spent), 1)
    if busy < 0.1:
        return None
    return f"Other programs use {busy:.0%} of the processors: speeds and their ratios measured now are not to be trusted."


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor() or platform.machine()
    )


def cpu_machine() -> dict:
    """The "machine" of a results file for what runs on the CPU now, without the measured peaks."""
    from mlcore import _C

    isa = _C.isa() + (" (emulated)" if _C.isa() == "avx512" and _C.avx512_is_emulated() else "")
    return {"device": cpu_name(), "kind": "cpu", "isa": isa, "threads": torch.get_num_threads()}


def cpu_versions() -> dict:
    import mlcore

    return {"mlcore": mlcore.__version__, "torch": torch.__version__, "python": platform.python_version()}


def result_row(group: str, row: str, timing: Timing, **extra) -> dict:
    """One entry of "rows" in a results file."""
    return {
        "group": group,
        "row": row,
        "seconds_min": timing.min,
        "seconds_median": timing.median,
        "date": datetime.date.today().isoformat(),
        "extra": {"rounds": len(timing.seconds), **extra},
    }


PEAKS = ("fma_gflops", "bf16_gflops", "copy_gbps")


def write_results(path: Path | str, rows: list[dict], machine: dict, versions: dict) -> None:
    """Writes rows to a results file. Groups measured again replace those of the file; its other groups stay.

    Groups that another machine or other versions measured can't share a file with the new ones: a warning, and they go.
    """
    path = Path(path)
    kept = []
    if path.exists():
        old = read_results(path)
        measured = {r["group"] for r in rows}
        kept = [r for r in old["rows"] if r["group"] not in measured]
        same = (
            all(old["machine"].get(k) == machine.get(k) for k in ("device", "isa", "threads")) and old["versions"] == versions
        )
        if same:  # the best that any session saw: a peak measured in a slow minute says nothing
            machine = machine | {k: max(old["machine"][k], machine[k]) for k in PEAKS if k in old["machine"] and k in machine}
        if kept and not same:
            warnings.warn(f"{path.name}: dropped {len(kept)} rows of another machine or other versions", stacklevel=2)
            kept = []
    kept_order = {g: i for i, g in enumerate(dict.fromkeys(r["group"] for r in [*kept, *rows]))}
    merged = sorted([*kept, *rows], key=lambda r: (_op(r), kept_order[r["group"]]))
    data = {"schema": SCHEMA, "machine": machine, "versions": versions, "rows": _rounded(merged)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(data, indent=1) + "\n")
    scratch.replace(path)


def read_results(path: Path | str) -> dict:
    """A results file, its form checked.

    Raises:
        ValueError: another schema, or a row that lacks one of the required keys.
    """
    data = json.loads(Path(path).read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA}; got {data.get('schema')!r}")
    for row in data["rows"]:
        missing = {"group", "row", "seconds_min", "seconds_median"} - row.keys()
        if missing:
            raise ValueError(
                f"{path}: every row must have group, row, seconds_min and seconds_median; {row} lacks {', '.join(missing)}"
            )
    return data


def _op(row: dict) -> str:
    return row["group"].split(" ", 1)[0]


def _rounded(x):
    """Floats to five significant digits: more is noise and makes diffs long."""
    if isinstance(x, float):
        return float(f"{x:.5g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return [_rounded(v) for v in x] if isinstance(x, list) else x


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
