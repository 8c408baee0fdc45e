"""depthwise_conv's CUDA kernels in the emulator and its Triton kernels in the interpreter, against float64: the cases of
test_depthwise_conv.py through the public functions, in small shapes.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_depthwise_conv as suite
import torch
from gpu_code import BF16, F16, F32, emulator

from mlcore.ops import depthwise_conv2d

OP = "depthwise_conv"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"
# ((N, C, *sizes), multiplier, kernel, stride, padding, dilation)
PROBLEMS = [
    ((1, 1, 1), 1, (1,), 1, 0, 1),
    ((2, 5, 37), 1, (9,), 1, 4, 1),
    ((1, 34, 6, 7), 1, (3, 3), 1, 1, 1),
    ((1, 5, 10, 9), 1, (3, 3), 2, 1, 1),
    ((1, 3, 12, 11), 2, (5, 5), 2, 2, 1),
    ((2, 3, 9, 11), 3, (2, 3), (2, 1), (0, 2), (3, 2)),
    ((1, 2, 8, 9), 1, (1, 7), 1, (0, 3), 1),
    ((1, 2, 11, 9), 1, (9, 1), 3, (4, 0), 1),
    ((1, 2, 13, 13), 1, (6, 6), 5, 3, 1),
    ((1, 2, 3, 3), 1, (3, 3), 1, 5, 1),  # results that see nothing but padding
    ((2, 3, 4, 5, 6), 1, (3, 3, 3), 1, 1, 1),
    ((1, 5, 6, 5, 10), 2, (3, 2, 3), (2, 1, 3), (1, 1, 0), (1, 2, 1)),
]
if gpu_code.INTERPRETING:  # a program takes a line of pixels, and its taps one by one: few lines
    PROBLEMS = [
        ((1, 1, 1), 1, (1,), 1, 0, 1),
        ((2, 5, 37), 1, (9,), 1, 4, 1),
        ((1, 3, 5, 6), 2, (3, 3), 2, 1, 1),
        ((2, 2, 4, 11), 3, (2, 3), (2, 1), (0, 2), (1, 2)),
        ((1, 2, 3, 3), 1, (3, 3), 1, 5, 1),
        ((1, 5, 3, 3, 10), 2, (2, 2, 3), (2, 1, 3), (1, 1, 0), (1, 2, 1)),
    ]
DTYPES = [F16] if gpu_code.INTERPRETING else [BF16, F16]  # the interpreter computes bfloat16 wrongly


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        yield


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: str(p).replace(" ", ""))
def test_interpreted_matches_conv(problem):
    suite.check(BACKEND, problem, suite.make(problem, F32, "contiguous"))
    suite.check(BACKEND, problem, suite.make(problem, F32, "channels_last", bias=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS[2:5:2], ids=lambda p: str(p).replace(" ", ""))
def test_interpreted_16_bits(problem, dtype):
    suite.check(BACKEND, problem, suite.make(problem, dtype, "contiguous"))
    suite.check(BACKEND, problem, suite.make(problem, dtype, "channels_last"))


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
def test_interpreted_layouts(layout):
    suite.check(BACKEND, PROBLEMS[3], suite.make(PROBLEMS[3], F32, layout, bias=False))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_interpreted_padding_modes(mode):
    x, weight = torch.randn(1, 3, 4, 7), torch.randn(3, 1, 3, 3)
    want = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode=mode), weight, groups=3)
    got = depthwise_conv2d(x, weight, padding=1, padding_mode=mode, impl=BACKEND)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", ((0, 2), (1, 0))], ids=str)
def test_interpreted_uneven_padding(padding):
    inputs = torch.randn(1, 3, 4, 7), torch.randn(3, 1, 4, 2)
    (top, bottom), (left, right) = ((1, 2), (0, 1)) if padding == "same" else padding

    def stock(x, weight):
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (left, right, top, bottom)), weight, groups=3)

    outputs = []
    for function in (lambda x, weight: depthwise_conv2d(x, weight, padding=padding, impl=BACKEND), stock):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, want in zip(*outputs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_interpreted_no_rows():
    x, weight = torch.randn(0, 3, 5, 5, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    y = depthwise_conv2d(x, weight, padding=1, impl=BACKEND)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (0, 3, 5, 5) and dx.shape == x.shape and dweight.eq(0).all()


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    def test_emulated_bits_do_not_depend_on_the_order_of_threads():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        x, weight = torch.randn(2, 5, 20, 21, requires_grad=True), torch.randn(5, 1, 3, 5, requires_grad=True)
        outputs = []
        for seed in range(3):
            library.set_seed(seed)
            y = depthwise_conv2d(x, weight, padding=1, impl=BACKEND)
            outputs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other))

    def test_emulated_errors():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        x, weight, y = torch.ones(1, 2, 1, 4, 4), torch.ones(2, 1, 3, 3), torch.full((1, 2, 1, 4, 4), 7.0)
        ones, pad = (1,) * 6, (0, 1, 1)
        for args, message in [
            ((x, weight.bfloat16(), None, *ones, *pad, y), "weight must be float32; got bfloat16"),
            ((x, torch.ones(3, 1, 3, 3), None, *ones, *pad, y), "weight must have a multiple of x's C = 2 filters"),
            ((x, weight, None, 1, 1, 0, 1, 1, 1, *pad, y), "stride must be at least 1; got 0"),
            ((x, weight, torch.ones(3), *ones, *pad, y), r"bias must be \(C\*M\) = \(2\); got \(3\)"),
        ]:
            with pytest.raises(ValueError, match=f"depthwise_conv: {message}"):
                library.call(f"mlc_cuda_{OP}_fwd", *args, None)
            assert y.eq(7).all()
