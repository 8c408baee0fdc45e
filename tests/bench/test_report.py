"""bench/: the results format, interleaved timing, the generated tables, and that pytest-benchmark is told the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import harness  # noqa: E402
import report  # noqa: E402

MACHINE = {"device": "Test CPU", "kind": "cpu", "isa": "avx2", "threads": 2, "fma_gflops": 200.0, "copy_gbps": 20.0}
VERSIONS = {"mlcore": "0.1.0", "torch": "2.13.0"}


def row(group, name, ms, **extra):
    return harness.result_row(group, name, harness.Timing([ms * 1e-3, ms * 2e-3]), **extra)


ROWS = [
    row("attention float32 fwd (1,8,2048,64) full", "torch-sdpa", 30.0, gflops=50.0, peak_fraction=0.25),
    row("attention float32 fwd (1,8,2048,64) full", "mlcore", 20.0, gflops=75.0, peak_fraction=0.375),
    row("attention float32 fwd (8,12,128,32) full", "mlcore", 2.0, gflops=60.0, peak_fraction=0.3),
    row("attention float32 fwd (8,12,128,32) full", "torch-sdpa", 1.0, gflops=120.0, peak_fraction=0.6),
    row("attention float32 fwd (8,12,128,32) full", "torch-math", 0.5, gflops=240.0, peak_fraction=1.2),
    row("overhead rms_norm (16,64) float32", "x + y", 0.001),
    row("overhead rms_norm (16,64) float32", "mlcore: registered op", 0.0025, limit=3.0),
    row("scaling attention bwd", "mlcore, 1 thread", 10.0, impl="mlcore", threads=1),
    row("scaling attention bwd", "mlcore, all threads", 5.5, impl="mlcore", threads=2),
]


@pytest.fixture
def folder(tmp_path):
    harness.write_results(tmp_path / "cpu-test.json", ROWS, MACHINE, VERSIONS)
    return tmp_path


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(f"| {start}")]


def test_speed_table_has_every_row_and_the_ratio_to_the_fastest_other(folder):
    text = report.generated("cpu-test attention", folder)
    (large,) = lines_of(text, "float32 fwd (1,8,2048,64)")
    (small,) = lines_of(text, "float32 fwd (8,12,128,32)")
    assert large == "| float32 fwd (1,8,2048,64) full | 20.0 ms | 30.0 ms |  | 75 | 38% | 1.50 |"
    assert small == "| float32 fwd (8,12,128,32) full | 2.00 ms | 1.00 ms | 500 µs | 60 | 30% | 0.25 |"
    assert "it is in 1 of 2, geometric mean 0.61." in text
    assert "registered op" not in text


def test_machine_line_says_where_with_what_and_when(folder):
    line = report.machine_line(harness.read_results(folder / "cpu-test.json"))
    for part in ("Test CPU", "avx2", "2 threads", "200 GFLOP/s", "20.0 GB/s", "mlcore 0.1.0", "torch 2.13.0", ROWS[0]["date"]):
        assert part in line


def test_overhead_and_scaling_have_tables_of_their_own(folder):
    text = report.generated("* overhead scaling", folder)
    assert lines_of(text, "rms_norm (16,64) float32: mlcore: registered op")[0].endswith("| 2.50 µs | 2.50 | ≤ 3 |")
    assert lines_of(text, "attention bwd: mlcore") == ["| attention bwd: mlcore | 10.0 ms | 5.50 ms | 1.82 with 2 threads |"]


def test_check_fails_on_a_stale_table_and_passes_on_a_fresh_one(folder, capsys):
    document = folder / "DOC.md"
    document.write_text("# Title\n\n<!-- bench: cpu-* attention -->\n<!-- /bench -->\n\nAfter.\n")
    args = [str(document), "--results", str(folder), "--plots", str(folder / "plots")]
    assert report.main([*args, "--check"]) == 1
    assert "DOC.md" in capsys.readouterr().err
    assert "20.0 ms" not in document.read_text(), "--check writes nothing"

    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    assert report.main(args) == 0
    text = document.read_text()
    assert "20.0 ms" in text and text.startswith("# Title\n") and text.endswith("<!-- /bench -->\n\nAfter.\n")
    assert (folder / "plots" / "cpu-test-attention.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([*args, "--check"]) == 0

    harness.write_results(folder / "cpu-test.json", [row(ROWS[0]["group"], "mlcore", 19.0)], MACHINE, VERSIONS)
    assert report.main([*args, "--check"]) == 1
    document.write_text(text.replace("20.0 ms", "2.0 ms"))
    assert report.main([*args, "--check"]) == 1


def test_documents_of_the_repository_are_fresh():
    assert report.main(["--check"]) == 0


def test_what_was_not_measured_says_so(folder):
    assert report.generated("gpu-*", folder) == "Not measured."
    assert report.generated("cpu-* conv", folder) == "Not measured."


def test_an_unclosed_marker_raises(folder):
    with pytest.raises(ValueError, match="/bench"):
        report.refreshed("<!-- bench: cpu-* -->\ntext\n", folder)


def test_new_groups_join_a_file_and_measured_again_replace(folder):
    path = folder / "cpu-test.json"
    harness.write_results(path, [row("rms_norm x", "mlcore", 1.0), row(ROWS[0]["group"], "mlcore", 7.0)], MACHINE, VERSIONS)
    groups = report.groups_of(harness.read_results(path), "attention")
    assert list(groups["float32 fwd (1,8,2048,64) full"]) == ["mlcore"]
    assert groups["float32 fwd (1,8,2048,64) full"]["mlcore"]["seconds_min"] == 0.007
    assert len(groups) == 2 and report.groups_of(harness.read_results(path), "rms_norm")


def test_another_machine_never_shares_a_file(folder):
    path = folder / "cpu-test.json"
    with pytest.warns(UserWarning, match="dropped 9 rows"):
        harness.write_results(path, [row("rms_norm x", "mlcore", 1.0)], MACHINE | {"threads": 4}, VERSIONS)
    assert [r["group"] for r in harness.read_results(path)["rows"]] == ["rms_norm x"]


@pytest.mark.parametrize("change", [{"schema": 0}, {"rows": [{"group": "a b", "row": "mlcore"}]}])
def test_a_file_of_another_form_raises(folder, change):
    path = folder / "cpu-test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"schema must be|must have"):
        harness.read_results(path)


def test_interleaved_takes_turns():
    order = []
    rows = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = harness.interleaved(rows, repeats=4, min_time=0)
    assert order == ["a", "b", *"ba", *"ab", *"ba", *"ab"], "a warm-up of each, then rounds in alternating order"
    assert [len(timings[name].seconds) for name in "ab"] == [4, 4]


def test_interleaved_repeats_short_calls_and_prepares_rows():
    calls, prepared = [], []
    timing = harness.interleaved({"a": lambda: calls.append(1)}, 3, 1e-3, before={"a": lambda: prepared.append(1)})["a"]
    assert len(prepared) == 4
    assert len(calls) > 300 and timing.min < 1e-4


def test_max_time_stops_after_three_rounds():
    assert len(harness.interleaved({"a": lambda: None}, 100, 0, max_time=0)["a"].seconds) == 3


def test_a_wrong_row_is_not_timed_and_does_not_stop_the_others():
    def check(name, output):
        assert output == 1, f"{name} is wrong"
        return 0.0

    group = harness.Group({"mlcore": lambda: 2, "torch": lambda: 1}, check)
    results = harness.run_group("op problem", group, dict(MACHINE), rounds=3, max_time=0)
    assert isinstance(results["mlcore"], AssertionError) and results["torch"]["extra"] == {"rounds": 3, "error": 0.0}


def test_a_busy_machine_is_reported(monkeypatch):
    stats = iter(["cpu 10 0 0 90 0 0 0 0\n", "cpu 90 0 0 110 0 0 0 0\n", "cpu 0 0 0 0 0 0 0 0\n", "cpu 1 0 0 99 0 0 0 0\n"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(stats))
    assert harness.others_at_work(0).startswith("Other programs use 80%")
    assert harness.others_at_work(0) is None


def test_relative_error():
    assert harness.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.5 / 29.25**0.5)


def test_a_bench_gives_pytest_benchmark_the_interleaved_samples(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(BENCH / "bench_overhead.py"), "--rounds", "3"]
    command += ["--max-time", "0.1", "--results", str(ours), "--benchmark-json", str(theirs)]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # pytest-benchmark rests in xdist's workers
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {r["row"]: r for r in harness.read_results(ours)["rows"]}
    stats = {b["params"]["row"]: b["stats"] for b in json.loads(theirs.read_text())["benchmarks"]}
    assert rows.keys() == stats.keys() and "x + y" in rows
    for name, r in rows.items():
        assert stats[name]["rounds"] == 3
        assert stats[name]["min"] == pytest.approx(r["seconds_min"], rel=1e-3)
