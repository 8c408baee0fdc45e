"""RMS norm, alone and with the residual added first, against torch's. Shapes and checks: _norms.py."""

import pytest
import torch.nn.functional as F
from _norms import DTYPES, PROBLEMS, make_group
from harness import name_of

import mlcore

EPS = 1e-6


def ours(x, weight, residual=None):
    return mlcore.ops.rms_norm(x, weight, residual=residual, eps=EPS)


def stock(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


@pytest.mark.parametrize("row", ["mlcore", "torch", "torch (compiled)"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_rms_norm(race, request, problem, dtype, row):
    compiled = request.config.getoption("compiled")
    race(f"rms_norm {name_of(dtype)} {problem}", row, lambda: make_group(problem, dtype, False, ours, stock, compiled))
