"""rms_norm's CUDA kernels in the emulator and its Triton kernels in the interpreter, against the reference."""

from __future__ import annotations

import gpu_code
import pytest
import torch
from gpu_code import Norm, emulator

OP = "rms_norm"
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
    empty, rstd, weight = torch.zeros(0, 8), torch.zeros(0), torch.ones(8)
    fwd(empty, None, weight, 1e-6, empty, None, rstd)
    dweight = torch.full((8,), float("nan"))
    bwd(empty, None, empty, weight, rstd, empty, dweight, torch.zeros(0, 8))
    assert dweight.eq(0).all()


def test_emulated_no_rows(kernels):
    _check_no_rows(kernels)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": torch.zeros(3, 8).double()}, "rms_norm: x must be float32, bfloat16, float16; got float64"),
        ({"x": torch.zeros(8, 3).t()}, "rms_norm: x must be contiguous in its last dimension; got stride 3"),
        ({"weight": torch.zeros(7)}, r"rms_norm: weight must be \(C\) = \(8\); got \(7\)"),
        ({"y": torch.zeros(3, 8).half()}, "rms_norm: y must be float32; got float16"),
        ({"rstd": torch.zeros(4)}, r"rms_norm: rstd must be \(R\) = \(3\); got \(4\)"),
        ({"eps": -1.0}, "rms_norm: eps must not be negative; got -1"),
    ],
)
def test_emulated_errors(kernels, change, text):
    args = {"x": torch.zeros(3, 8), "residual": None, "weight": torch.zeros(8), "eps": 1e-6, "y": torch.zeros(3, 8)}
    args |= {"s": None, "rstd": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=text):
        kernels[0](*args.values())


def test_emulated_partial_errors(kernels):
    x, rstd, w = torch.zeros(3, 8), torch.zeros(3), torch.zeros(8)
    with pytest.raises(ValueError, match=r"partial must have between 1 and R = 3 row blocks; got shape \(4, 8\)"):
        kernels[1](x, None, x, w, rstd, x, w, torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"partial must be \(P, C\) = \(2, 8\); got \(2, 7\)"):
        kernels[1](x, None, x, w, rstd, x, w, torch.zeros(2, 7))
    with pytest.raises(ValueError, match="partial must be given where dweight is"):
        kernels[1](x, None, x, w, rstd, x, w, None)
    with pytest.raises(ValueError, match="dweight needs weight"):
        kernels[1](x, None, x, None, rstd, x, w, torch.zeros(2, 8))
