"""No CUDA kernel takes more registers, spills or shared memory than kernels/ptxas_budget.json allows: tools/ptxas_budget.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parents[2] / "tools" / "ptxas_budget.py"
_SPEC = importlib.util.spec_from_file_location("ptxas_budget", _PATH)
ptxas_budget = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ptxas_budget)

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 94 registers, used 1 barriers, 27648 bytes smem, 392 bytes cmem[0]
ptxas info    : Compiling entry function 'g' for 'sm_80'
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
F = {"stack": 8, "spill": 20, "registers": 94, "shared": 27648}
G = {"stack": 0, "spill": 0, "registers": 12, "shared": 0}


def test_parse():
    assert ptxas_budget.parse(REPORT) == {"sm_80": {"f": F, "g": G}}


def test_compare():
    measured = {"op": {"sm_80": {"f": F, "g": G}}}
    assert ptxas_budget.compare(measured, measured) == ([], [])
    budget = {"op": {"sm_80": {"f": {**F, "registers": 93}, "g": {**G, "registers": 13}, "h": G}}, "gone": {}}
    failures, improvements = ptxas_budget.compare(measured, budget)
    assert failures == [
        "op sm_80 f: registers 94, budget 93",
        "op sm_80 h: in the budget, but no such kernel",
        "gone: in the budget, but no such .cu file",
    ]
    assert improvements == ["op sm_80 g: registers 12, budget 13"]
    assert ptxas_budget.compare(measured, {"op": {"sm_80": {"f": F}}})[0] == ["op sm_80 g: not in the budget"]


@pytest.mark.skipif(ptxas_budget.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("source", ptxas_budget.sources(), ids=lambda p: p.stem)
def test_within_budget(source):
    release, budget = ptxas_budget.load_budget()
    measured = {source.stem: ptxas_budget.measure(source)}
    if release != ptxas_budget.release():
        pytest.skip(f"the budget is for nvcc {release}, this is {ptxas_budget.release()}; the kernels compile")
    own = {op: figures for op, figures in budget.items() if op == source.stem}
    failures, improvements = ptxas_budget.compare(measured, own)
    print("\n".join(improvements))
    assert not failures, "\n".join(failures)
