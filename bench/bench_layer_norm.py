"""Layer norm, alone and with the residual added first, against torch's. Shapes and checks: _norms.py."""

import pytest
import torch.nn.functional as F
from _norms import DTYPES, PROBLEMS, make_group
from harness import name_of

import mlcore

EPS = 1e-5


def ours(x, weight, bias, residual=None):
    return mlcore.ops.layer_norm(x, weight, bias, residual=residual, eps=EPS)


def stock(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


@pytest.mark.parametrize("row", ["mlcore", "torch", "torch (compiled)"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_layer_norm(race, request, problem, dtype, row):
    compiled = request.config.getoption("compiled")
    race(f"layer_norm {name_of(dtype)} {problem}", row, lambda: make_group(problem, dtype, True, ours, stock, compiled))
