"""tools/gpu.py where there is no GPU: its parts that need none, and the one line that it says."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import torch

_PATH = Path(__file__).resolve().parents[2] / "tools" / "gpu.py"
_SPEC = importlib.util.spec_from_file_location("gpu_tool", _PATH)
gpu = sys.modules["gpu_tool"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gpu)


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    return gpu.Report(budget=60)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_and_a_failure(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().out == "gpu: torch sees no CUDA device: nothing to run\n"


@pytest.mark.parametrize(
    "capability, name", [((8, 0), "80-real"), ((8, 9), "89-real"), ((9, 0), "90a-real"), ((10, 0), "100a-real")]
)
def test_architecture(capability, name):
    assert gpu.architecture(capability) == name


def test_a_failed_step_is_reported_and_the_next_one_runs(report):
    assert not gpu.step(report, "first", python("raise SystemExit(3)"), 30, os.environ)
    assert gpu.step(report, "second", python("print('fine')"), 30, os.environ)
    assert [outcome for _, outcome, _ in report.steps] == ["FAILED: exit status 3", "passed"]
    assert report.failed()


def test_a_step_past_its_limit_is_ended_with_its_children(report):
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    begin = time.monotonic()
    assert not gpu.step(report, "slow", python(code), 5, os.environ)
    assert time.monotonic() - begin < 20
    assert report.steps[0][1].startswith("FAILED: not finished within its time limit")
    child = int((gpu.BUILD / "slow.log").read_text())
    time.sleep(0.2)
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_benchmarks_get_the_results_file_and_a_share_of_the_time(report, tmp_path, monkeypatch):
    bench = tmp_path / "bench"
    bench.mkdir()
    for name in ("gpu_a.py", "gpu_b.py"):
        (bench / name).write_text("import pathlib, sys\nwith open(sys.argv[2], 'a') as f: f.write(sys.argv[4] + '\\n')\n")
    (bench / "bench_c.py").write_text("raise SystemExit('not a GPU benchmark')")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.benchmarks(report, tmp_path / "out.txt", os.environ)
    assert [(name, outcome) for name, outcome, _ in report.steps] == [("gpu_a", "passed"), ("gpu_b", "passed")]
    assert all(10 <= int(seconds) <= 40 for seconds in (tmp_path / "out.txt").read_text().split())
