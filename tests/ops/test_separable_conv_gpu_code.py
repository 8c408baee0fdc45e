"""separable_conv's CUDA kernels in the emulator and its Triton kernels in the interpreter, against float64: the cases of
test_separable_conv.py through the public functions, in small shapes.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_separable_conv as suite
import test_separable_conv_training as training
import torch
import torch.nn.functional as F
from gpu_code import BF16, F16, F32, emulator

from mlcore.ops import BatchNorm, PackedConv, PackedSeparable, batch_norm2d, separable_conv2d
from mlcore.ops._separable import blocks_of

OP = "separable_conv"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"
# ((N, C, H, W), J, kernel, stride, padding, dilation)
PROBLEMS = [
    ((1, 1, 1, 1), 1, (1, 1), 1, 0, 1),
    ((2, 18, 7, 6), 7, (3, 3), 1, 1, 1),
    ((1, 33, 8, 9), 65, (3, 3), 2, 1, 1),
    ((1, 68, 9, 8), 132, (3, 3), 1, 1, 1),  # several slices of channels and blocks of columns
    ((2, 5, 10, 9), 16, (2, 3), (2, 1), (0, 2), (3, 2)),
    ((1, 4, 2, 40), 3, (1, 9), 1, (0, 4), 1),
]
if gpu_code.INTERPRETING:  # programs take a line of pixels, and its taps one by one: few lines
    PROBLEMS = [
        ((1, 1, 1, 1), 1, (1, 1), 1, 0, 1),
        ((1, 5, 4, 5), 7, (3, 3), 1, 1, 1),
        ((1, 33, 5, 4), 65, (3, 3), 2, 1, 1),
        ((1, 3, 5, 6), 4, (2, 3), (2, 1), (0, 2), (3, 2)),
    ]
LARGE_KERNEL = ((1, 3, 9, 9), 4, (9, 9), 1, 4, 1)  # more taps than are staged
DTYPES = [F16] if gpu_code.INTERPRETING else [BF16, F16]  # the interpreter computes bfloat16 wrongly


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND), gpu_code.serving("depthwise_conv", BACKEND):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        yield


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: str(p).replace(" ", ""))
def test_interpreted_matches_convolutions(problem):
    suite.check(BACKEND, problem, suite.make(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS[2 : 3 if gpu_code.INTERPRETING else 4], ids=lambda p: str(p).replace(" ", ""))
def test_interpreted_16_bits(problem, dtype):
    suite.check(BACKEND, problem, suite.make(problem, dtype))


def test_interpreted_activations_and_layouts():
    suite.check(BACKEND, PROBLEMS[1], suite.make(PROBLEMS[1]), "silu", "silu")
    for layout in () if gpu_code.INTERPRETING else ("contiguous", "sliced", "expanded"):
        suite.check(BACKEND, PROBLEMS[1], suite.make(PROBLEMS[1], layout=layout))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_interpreted_corners(activation):
    inputs = [t.double() for t in suite.make(PROBLEMS[1]).values()]
    outputs = []
    for wide, function in ((F32, separable_conv2d), (torch.float64, suite.stock(PROBLEMS[1], activation))):
        leaves = [t.to(wide).requires_grad_() for t in inputs]
        y = function(*leaves, *PROBLEMS[1][3:], activation=activation) if wide == F32 else function(*leaves)
        outputs.append((y, *torch.autograd.grad((y * torch.arange(7.0).view(7, 1, 1).to(wide)).sum(), leaves)))
    for got, want in zip(*outputs, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_interpreted_training_norm(offset):
    training.test_training_norm(BACKEND, offset, (2, 6, 5, 6) if gpu_code.INTERPRETING else (3, 34, 9, 8))


@pytest.mark.parametrize("depthwise", [True, False])
def test_interpreted_training_norm_behind_the_product(depthwise):
    training.test_training_norm_behind_the_product(BACKEND, depthwise, (2, 6, 5, 8), 70)
    training.test_training_norm_behind_the_product(BACKEND, depthwise, (2, 3, 2, 1), 5)


def test_interpreted_batch_norm2d():
    training.test_batch_norm2d(BACKEND, (2, 70, 4, 6), "channels_last")
    training.test_batch_norm2d(BACKEND, (1, 5, 40, 3), "contiguous")


def test_interpreted_pixels_over_many_parts():
    """Moments of a mean far from 0 over parts of one and of several tiles."""
    x = torch.randn(1, 9, 80, 2).movedim(-1, 1) + 50.0  # one row of blocks of 16 rows, then many
    for t in (x, x.transpose(2, 3)):
        mean, var = torch.zeros(2), torch.zeros(2)
        y = batch_norm2d(t, BatchNorm(None, None, mean, var, True, 1.0), impl=BACKEND)
        want = F.batch_norm(t.double(), None, None, training=True)
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean.double(), t.double().mean((0, 2, 3)))
        torch.testing.assert_close(var.double(), t.double().var((0, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_interpreted_packed(dtype):
    weight, bias = torch.randn(9, 3, 3, 3) / 5, torch.randn(9)
    norm = BatchNorm(torch.rand(9), torch.randn(9), torch.randn(9), torch.rand(9) + 0.5)
    moments = [t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    x = torch.randn(2, 3, 9, 8).to(dtype)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == F32 else {"rtol": 1e-2, "atol": 1e-2}
    y = F.conv2d(x.double(), weight.double(), bias.double(), 2, 1)
    want = F.relu6(F.batch_norm(y, *moments))
    got = PackedConv(weight, bias, 2, 1, norm=norm, activation="relu6")(x)
    torch.testing.assert_close(got.double(), want, **tolerance)
    pointwise, residual = torch.randn(5, 9, 1, 1) / 3, torch.randn(2, 5, 3, 2).to(dtype)
    packed = PackedSeparable(weight[:, :1], pointwise, bias, None, 2, 1, norm=norm, activation="relu")
    want = F.conv2d(
        F.relu(F.batch_norm(F.conv2d(want, weight[:, :1].double(), bias.double(), 2, 1, 1, 9), *moments)), pointwise.double()
    )
    torch.testing.assert_close(packed(got, residual).double(), want + residual.double(), **tolerance)


def test_interpreted_nan_and_empty_batch():
    x, depthwise, pointwise, *_ = suite.make(((2, 18, 7, 6), 7, (3, 3))).values()
    x = x.clone(memory_format=torch.preserve_format)
    x[0, 4, 4, 4] = float("nan")
    y = separable_conv2d(x, depthwise, pointwise, padding=1, activation="relu", impl=BACKEND)
    wrong = y.isnan()
    assert wrong[0, :, 3:6, 3:6].all() and wrong.sum() == 9 * 7
    empty, filters = x[:0].detach().requires_grad_(), depthwise.requires_grad_()
    y = separable_conv2d(empty, filters, pointwise, torch.ones(18), padding=1, impl=BACKEND)
    dx, dfilters = torch.autograd.grad(y.sum(), (empty, filters))
    assert y.shape == (0, 7, 7, 6) and dx.shape == empty.shape and dfilters.eq(0).all()


def test_interpreted_padding_has_no_product():
    """An infinite weight meets zeros outside of x only."""
    x, depthwise, pointwise = torch.randn(1, 2, 3, 3), torch.randn(2, 1, 3, 3), torch.randn(3, 2, 1, 1)
    depthwise[:, :, 0] = float("inf")
    y = separable_conv2d(x, depthwise, pointwise, padding=1, impl=BACKEND)
    assert y[:, :, 0].isfinite().all() and not y[:, :, 1:].isfinite().any()


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    def test_emulated_large_kernel():
        suite.check(BACKEND, LARGE_KERNEL, suite.make(LARGE_KERNEL))

    def test_emulated_bits_do_not_depend_on_the_order_of_threads():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        x, depthwise, pointwise, *_ = suite.make(PROBLEMS[3]).values()
        leaves = [t.requires_grad_() for t in (x.expand(3, -1, -1, -1), depthwise, pointwise)]
        outputs = []
        for seed in range(2):
            library.set_seed(seed)
            norms = {"norm": BatchNorm(training=True), "pointwise_norm": BatchNorm(training=True)}
            y = separable_conv2d(*leaves, padding=1, **norms, impl=BACKEND)
            outputs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))

    def test_emulated_errors():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        x, depthwise = torch.ones(1, 9, 9, 3).movedim(-1, 1), torch.ones(3, 3, 3)
        y = torch.full((1, 7, 7, 5), 7.0).movedim(-1, 1)
        good = [x, depthwise, None, None, blocks_of(torch.ones(3, 5)), None, None, *(1,) * 4, *(0,) * 6, y, None, None]
        for at, value, message in [
            (0, x.double(), "x must be float32, bfloat16, float16; got float64"),
            (0, x.contiguous(), "x must be contiguous in C; got stride 81"),
            (1, depthwise[:2], r"depthwise must be \(C, KH, KW\) = \(3, 3, 3\); got \(2, 3, 3\)"),
            (4, torch.ones(3, 5), r"pointwise must be .* = \(1, 1, 64, 64\); got \(3, 5\)"),
            (7, 0, "stride must be at least 1; got 0"),
            (13, 2, "patch_h and patch_w must both be positive, or 0; got 2 and 0"),
            (15, 4, r"f must be 0 \(none\), 1 \(relu\), 2 \(relu6\) or 3 \(silu\); got 4"),
            (19, torch.ones(2, 5), "partial and moments must be given together"),
        ]:
            args = list(good)
            args[at] = value
            with pytest.raises(ValueError, match=f"{OP}: {message}"):
                library.call(f"mlc_cuda_{OP}_fwd", *args, None)
            assert y.eq(7).all()
        library.call(f"mlc_cuda_{OP}_fwd", *good, None)
        assert y.eq(27).all()
