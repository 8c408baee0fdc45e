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

SCRATCH = HERE.parent / "build" / "bench" / "last.json"


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
    groups: dict[str, dict] = field(default_factory=dict)  # group -> row -> result row, or the exception of its check
    timings: dict[tuple[str, str], harness.Timing] = field(default_factory=dict)


_KEY = pytest.StashKey[_Session]()


def pytest_addoption(parser):
    group = parser.getgroup("mlcore benchmarks")
    group.addoption("--threads", type=int, default=0, help="threads of every row (default: torch's, usually all cores)")
    group.addoption(
        "--results",
        metavar="NAME",
        help="keep the results as bench/results/NAME.json, or at a path that ends in .json (default: build/bench/last.json)",
    )
    group.addoption("--rounds", type=int, default=15, help="samples of each row (default 15)")
    group.addoption(
        "--max-time", type=float, default=20.0, help="seconds after which a group starts no further round (default 20)"
    )
    group.addoption("--compiled", action="store_true", help="add rows that torch.compile makes (minutes of compiling)")


def pytest_collect_file(file_path, parent):
    if file_path.parent == HERE and file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=tape_clock))
    if not config.getoption("compiled"):
        compiled = [item for item in ours if "(compiled)" in item.callspec.params["row"]]
        items[:] = [item for item in items if item not in compiled]
        config.hook.pytest_deselected(items=compiled)


def pytest_configure(config):
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    config.stash[_KEY] = _Session(harness.cpu_machine())


def pytest_report_header(config):
    return harness.others_at_work()


@pytest.fixture
def race(request, benchmark):
    """race(group, row, make): plays `row` of `group` to pytest-benchmark; make() -> harness.Group is called once a group."""
    config = request.config
    session = config.stash[_KEY]

    def play(group: str, row: str, make: Callable[[], harness.Group]) -> None:
        benchmark.group = group
        if group not in session.groups:
            rounds = config.getoption("rounds") if benchmark.enabled else 0
            session.groups[group] = harness.run_group(
                group, make(), session.machine, rounds=rounds, max_time=config.getoption("max_time"), timings=session.timings
            )
        result = session.groups[group][row]
        if isinstance(result, Exception):
            raise result
        if benchmark.enabled:
            seconds = session.timings[group, row].seconds
            benchmark.extra_info.update(session.machine | result["extra"])
            benchmark.pedantic(_tape.play, args=(iter(seconds),), rounds=len(seconds))
        else:
            benchmark(lambda: None)

    return play


def _rows(session: _Session) -> list[dict]:
    return [r for rows in session.groups.values() for r in rows.values() if isinstance(r, dict) and "seconds_min" in r]


def _path(config) -> Path:
    name = config.getoption("results")
    if name and name.endswith(".json"):
        return Path(name).resolve()
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
        terminalreporter.write_line(f"kept in {_path(config).parent.name}/{_path(config).name}")
