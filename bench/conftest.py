"""pytest bench: collects bench_*.py and times each group interleaved. A bench test is one row (implementation) of one group
(problem); the first row of a group to run checks and times all of them in turns, the others show their part. pytest-benchmark
is given exactly these samples, so its tables and `pytest-benchmark compare` agree with bench/report.py. README.md: how to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import harness  # noqa: E402
import machine_peak  # noqa: E402

SCRATCH = HERE.parent / "build" / "bench" / "last.json"


@dataclass
class Group:
    """One problem: what each row calls, how its output is checked before it is timed, and how much work a call is.

    rows: name -> call. A group that a row is not made for leaves it out, or gives the reason (str) in place of the call.
    check: raises AssertionError for a wrong output of a row.
    flops, bytes: the work of one call that any implementation must do; 0 where the figure says nothing.
    extra: name -> what else to record of this row.
    """

    rows: dict[str, Callable[[], object] | str]
    check: Callable[[object], None]
    flops: float = 0
    bytes: float = 0
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    extra: dict[str, dict] = field(default_factory=dict)


class _Tape:
    """A clock that moves only when a recorded sample is played: how pytest-benchmark gets samples that were timed before."""

    now = 0.0

    def play(self, seconds) -> None:
        self.now += next(seconds)


_tape = _Tape()


def tape_clock() -> float:
    return _tape.now


@dataclass
class _Session:
    machine: dict
    groups: dict[str, dict] = field(default_factory=dict)  # group -> row -> result row, or what was raised for it
    timings: dict[tuple[str, str], harness.Timing] = field(default_factory=dict)


_KEY = pytest.StashKey[_Session]()


def pytest_addoption(parser):
    group = parser.getgroup("mlcore benchmarks")
    group.addoption("--threads", type=int, default=0, help="threads of every row (default: torch's, usually all cores)")
    group.addoption("--results", metavar="NAME", help="keep the results as bench/results/NAME.json (default: build/bench/last.json)")
    group.addoption("--rounds", type=int, default=15, help="samples of each row (default 15)")
    group.addoption("--max-time", type=float, default=20.0, help="seconds after which a group starts no further round (default 20)")
    group.addoption("--compiled", action="store_true", help="add rows that torch.compile makes (minutes of compiling)")


def pytest_collect_file(file_path, parent):
    if file_path.parent == HERE and file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.benchmark(timer=tape_clock))


def pytest_configure(config):
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    config.stash[_KEY] = _Session(harness.cpu_machine())


@pytest.fixture
def race(request, benchmark):
    """race(group, row, make): plays `row` of `group` to pytest-benchmark; make() -> Group is called once a group."""
    config = request.config
    session = config.stash[_KEY]

    def play(group: str, row: str, make: Callable[[], Group]) -> None:
        benchmark.group = group
        if group not in session.groups:
            session.groups[group] = _run(session, config, group, make(), benchmark.enabled)
        result = session.groups[group].get(row, "not for this problem")
        if isinstance(result, str):
            pytest.skip(f"{row}: {result}")
        if isinstance(result, Exception):
            raise result
        if benchmark.enabled:
            seconds = session.timings[group, row].seconds
            benchmark.extra_info.update(session.machine | result["extra"])
            benchmark.pedantic(_tape.play, args=(iter(seconds),), rounds=len(seconds))
        else:
            benchmark(lambda: None)

    return play


def _run(session: _Session, config, name: str, group: Group, timed: bool) -> dict:
    """Checks every row of a group, times those that are right, and returns row -> result row, exception or reason."""
    results, right = {}, {}
    for row, call in group.rows.items():
        if isinstance(call, str):
            results[row] = call
            continue
        try:
            group.before.get(row, lambda: None)()
            group.check(call())
            right[row] = call
            results[row] = {}
        except Exception as error:
            results[row] = error
    if not timed or not right:
        return results
    before = {row: group.before[row] for row in right if row in group.before}
    timings = harness.interleaved(
        right, config.getoption("rounds"), max_time=config.getoption("max_time"), before=before
    )
    for row, timing in timings.items():
        extra = _rates(session.machine, group, timing.min, group.extra.get(row, {}))
        results[row] = harness.result_row(name, row, timing, **extra)
        session.timings[name, row] = timing
    return results


def _rates(machine: dict, group: Group, seconds: float, extra: dict) -> dict:
    rates = dict(extra)
    if group.flops or group.bytes:
        threads = extra.get("threads", machine["threads"])
        peak = machine_peak.measure(threads, machine["isa"].split()[0])
        machine.update(peak if threads == machine["threads"] else {})
        kind, rate = ("fma_gflops", group.flops) if group.flops else ("copy_gbps", group.bytes)
        rate = rate / seconds * 1e-9
        rates |= {"gflops" if group.flops else "gbps": rate, "peak_fraction": rate / peak[kind]}
    return rates


def _rows(session: _Session) -> list[dict]:
    return [r for rows in session.groups.values() for r in rows.values() if isinstance(r, dict) and r]


def _path(config) -> Path:
    name = config.getoption("results")
    return harness.RESULTS / f"{name}.json" if name else SCRATCH


def pytest_sessionfinish(session):
    bench = session.config.stash[_KEY]
    if _rows(bench):
        if not session.config.getoption("results"):
            SCRATCH.unlink(missing_ok=True)
        harness.write_results(_path(session.config), _rows(bench), bench.machine, harness.cpu_versions())


def pytest_terminal_summary(terminalreporter, config):
    if _rows(config.stash[_KEY]):
        import report

        terminalreporter.section("mlcore")
        terminalreporter.write_line(report.as_text(harness.read_results(_path(config))))
        terminalreporter.write_line(f"kept in {_path(config).relative_to(HERE.parent)}")
