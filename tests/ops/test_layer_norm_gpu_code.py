"""layer_norm's CUDA kernels in the emulator and its Triton kernels in the interpreter, against the reference."""

from __future__ import annotations

import gpu_code
import pytest
import torch
from gpu_code import Norm, emulator

OP = "layer_norm"
if gpu_code.INTERPRETING:

    @pytest.mark.parametrize("case", gpu_code.INTERPRETED_NORM_CASES, ids=str)
    def test_interpreted_kernels(case):
        gpu_code.check_norm(OP, gpu_code.interpreted(OP), case)

    def test_interpreted_no_rows():
        _check_no_rows(gpu_code.interpreted(OP))


test_interpreted = gpu_code.interpreted_by_triton(__file__)


@pytest.fixture
def kernels():
    if emulator.compiler() is None:
        pytest.skip("the emulator needs Linux and a C++ compiler")
    return gpu_code.emulated(OP)


@pytest.mark.parametrize("case", gpu_code.NORM_CASES, ids=str)
def test_emulated(kernels, case):
    gpu_code.check_norm(OP, kernels, case)


def test_emulated_bits_do_not_depend_on_the_order_of_threads(kernels):
    library = emulator.load(f"kernels/{OP}/{OP}.cu")
    case = Norm(9, 1100, torch.bfloat16, residual=True, row_blocks=2)  # several rows a block, several warps a row
    outputs = []
    for seed in range(4):
        library.set_seed(seed)
        outputs.append(gpu_code.check_norm(OP, kernels, case))
    for name, first in outputs[0].items():
        assert all(torch.equal(first, other[name]) for other in outputs[1:]), name


def _check_no_rows(kernels):
    fwd, bwd = kernels
    empty, mean, rstd, weight, bias = torch.zeros(0, 8), torch.zeros(0), torch.zeros(0), torch.ones(8), torch.ones(8)
    fwd(empty, None, weight, bias, 1e-6, empty, None, mean, rstd)
    dweight, dbias = torch.full((2, 8), float("nan"))
    bwd(empty, None, empty, weight, mean, rstd, empty, dweight, dbias, torch.zeros(2, 0, 8))
    assert dweight.eq(0).all() and dbias.eq(0).all()


def test_emulated_no_rows(kernels):
    _check_no_rows(kernels)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(3, 8).double()}, "layer_norm: x must be float32, bfloat16, float16; got float64"),
        ({"bias": torch.zeros(7)}, r"layer_norm: bias must be \(C\) = \(8\); got \(7\)"),
        ({"residual": torch.zeros(3, 9)}, r"layer_norm: residual must have x's shape \(3, 8\); got \(3, 9\)"),
        ({"mean": torch.zeros(4)}, r"layer_norm: mean must be \(R\) = \(3\); got \(4\)"),
        ({"eps": -1.0}, "layer_norm: eps must not be negative; got -1"),
    ],
)
def test_emulated_errors(kernels, change, text):
    args = {"x": torch.zeros(3, 8), "residual": None, "weight": torch.zeros(8), "bias": None, "eps": 1e-6}
    args |= {"y": torch.zeros(3, 8), "s": None, "mean": torch.zeros(3), "rstd": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=text):
        kernels[0](*args.values())


def test_emulated_partial_errors(kernels):
    x, row, w = torch.zeros(3, 8), torch.zeros(3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"partial must have between 1 and R = 3 row blocks; got shape \(2, 4, 8\)"):
        kernels[1](x, None, x, w, row, row, x, w, w, torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match=r"partial must be \(2, P, C\) = \(2, 2, 8\); got \(1, 2, 8\)"):
        kernels[1](x, None, x, w, row, row, x, w, w, torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="partial must be given where dweight or dbias is"):
        kernels[1](x, None, x, None, row, row, x, None, w, None)
    with pytest.raises(ValueError, match="dweight needs weight"):
        kernels[1](x, None, x, None, row, row, x, w, None, torch.zeros(2, 2, 8))


def test_emulated_gradient_of_bias_alone(kernels):
    x = torch.randn(5, 8)
    dx, dbias, row = torch.zeros(5, 8), torch.full((8,), float("nan")), torch.ones(5)
    kernels[1](x, None, x, None, row, row, dx, None, dbias, torch.zeros(2, 3, 8))
    torch.testing.assert_close(dbias, x.sum(0))
