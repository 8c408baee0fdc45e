"""mlcore.ops.separable_conv2d against float64 convolutions of torch, its gradients, norms, packing and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mlcore
from mlcore import _C, testing
from mlcore.ops import BatchNorm, PackedConv, PackedSeparable, separable_conv2d
from mlcore.ops._separable import PLAIN, _bwd, _fwd, _hidden, _moments, blocks_of

CASES = [case for case in testing.cases("separable_conv") if case[1] != torch.float64]
KERNELS = [name for name in testing.available("separable_conv") if name != "reference"]
F32 = torch.float32
# ((N, C, H, W), J, kernel, stride, padding, dilation)
PROBLEMS = [
    ((1, 1, 1, 1), 1, (1, 1), 1, 0, 1),
    ((2, 18, 13, 11), 7, (3, 3), 1, 1, 1),
    ((1, 33, 14, 15), 65, (3, 3), 2, 1, 1),
    ((3, 130, 7, 7), 100, (3, 3), 1, 1, 1),
    ((1, 24, 40, 41), 70, (5, 5), 2, 2, 1),
    ((2, 5, 20, 21), 16, (2, 3), (2, 1), (0, 2), (3, 2)),
    ((1, 40, 9, 130), 3, (1, 9), 1, (0, 4), 1),
]
FUNCTIONS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}


def make(problem, dtype=F32, layout="channels_last"):
    shape, J, kernel, *_ = problem
    if layout == "channels_last":
        x = testing.make_input(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    else:
        x = testing.make_input(*shape, dtype=dtype, layout=layout)
    taps = kernel[0] * kernel[1]
    return {
        "x": x,
        "depthwise": testing.make_input(shape[1], 1, *kernel, dtype=dtype, std=taps**-0.5),
        "pointwise": testing.make_input(J, shape[1], 1, 1, dtype=dtype, std=shape[1] ** -0.5),
        "depthwise_bias": testing.make_input(shape[1], dtype=dtype),
        "pointwise_bias": testing.make_input(J, dtype=dtype),
    }


def stock(problem, activation=None, last=None):
    """torch's convolutions, rounded once to x's dtype."""

    def run(x, depthwise, pointwise, depthwise_bias, pointwise_bias):
        wide = torch.promote_types(x.dtype, F32)
        x_, *rest = (t.to(wide) for t in (x, depthwise, pointwise, depthwise_bias, pointwise_bias))
        h = F.conv2d(x_.contiguous(), rest[0], rest[2], *problem[3:], x.shape[1])
        return FUNCTIONS[last](F.conv2d(FUNCTIONS[activation](h), rest[1], rest[3])).to(x.dtype)

    return run


def check(name, problem, inputs, activation=None, last=None):
    with testing.use(name) as impl:

        def ours(x, depthwise, pointwise, depthwise_bias, pointwise_bias):
            vectors = (depthwise_bias, pointwise_bias)
            names = {"activation": activation, "pointwise_activation": last, "impl": impl}
            return separable_conv2d(x, depthwise, pointwise, *vectors, *problem[3:], **names)

        many = 8 * (inputs["x"].numel() / inputs["x"].shape[1]) ** 0.5
        want = stock(problem, activation, last)
        terms = {"0": 4.0, "x": 6.0, "depthwise": many, "pointwise": many, "depthwise_bias": many, "pointwise_bias": many}
        testing.check_numerics(ours, want, want, inputs, terms=terms)


@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == F32])
def test_padding_before_is_not_padding_after(name):
    x, depthwise, pointwise = torch.randn(2, 18, 13, 11), torch.randn(18, 1, 3, 3), torch.randn(7, 18, 1, 1) / 8
    with testing.use(name) as impl:
        got = separable_conv2d(x, depthwise, pointwise, stride=2, padding=((0, 1), (2, 0)), impl=impl)
        want = separable_conv2d(F.pad(x, (2, 0, 0, 1)), depthwise, pointwise, stride=2, impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: str(p).replace(" ", ""))
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{str(c[1]).removeprefix('torch.')}")
def test_matches_convolutions(case, problem):
    name, dtype = case
    check(name, problem, make(problem, dtype))


@pytest.mark.parametrize("name", KERNELS)
def test_activations_and_layouts(name):
    check(name, PROBLEMS[1], make(PROBLEMS[1]), "silu", "silu")
    check(name, PROBLEMS[2], make(PROBLEMS[2], layout="contiguous"), None, "silu")
    for layout in testing.LAYOUTS:
        check(name, PROBLEMS[1], make(PROBLEMS[1], layout=layout))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_corners(activation):
    """Values without a sum near the corners, so that float32 and float64 take the same side."""
    inputs = list(make(PROBLEMS[3]).values())
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got = separable_conv2d(*leaves, *PROBLEMS[3][3:], activation=activation)
    want = stock(PROBLEMS[3], activation)(*wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(got)
    for g, w in zip(torch.autograd.grad(got, leaves, seed), torch.autograd.grad(want, wide, seed.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_problem(data):
    def draw(least, most):
        return tuple(data.draw(st.integers(least, most)) for _ in range(2))

    kernel, stride, padding, dilation = draw(1, 5), draw(1, 3), draw(0, 4), draw(1, 3)
    spans = [max((k - 1) * d + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    sizes = [s + e for s, e in zip(spans, draw(0, 25), strict=True)]
    N, C, J = (data.draw(st.integers(1, n)) for n in (3, 80, 80))
    problem = ((N, C, *sizes), J, kernel, stride, padding, dilation)
    check("cpu", problem, make(problem, layout=data.draw(st.sampled_from(["contiguous", "channels_last"]))))


def test_fused_epilogue_is_what_autograd_computes():
    inputs = make(PROBLEMS[3])
    residual = testing.make_input(3, 7, 7, 100).movedim(-1, 1)
    norm = BatchNorm(torch.rand(130), torch.randn(130), torch.randn(130), torch.rand(130) + 0.5)
    args = (*inputs.values(), 1, 1)
    words = {"norm": norm, "activation": "relu", "pointwise_activation": "relu6", "residual": residual}
    with torch.no_grad():
        fused = separable_conv2d(*args, **words)
    fold = PackedSeparable(*args[1:], norm=norm, activation="relu", pointwise_activation="relu6")
    torch.testing.assert_close(fold(args[0], residual), fused)
    with pytest.raises(ValueError, match="separable_conv2d: x must be \\(N, C, H, W\\) with C of the weights; got"):
        fold(args[0][:, :7])
    with pytest.raises(ValueError, match="PackedSeparable: it has no gradients"):
        fold(args[0].clone().requires_grad_())
    with pytest.raises(ValueError, match="PackedSeparable: norms must have fixed moments; got training=True"):
        PackedSeparable(*args[1:], norm=BatchNorm(training=True))
    wide = [t.double() for t in inputs.values()]
    h = F.conv2d(wide[0], wide[1], wide[3], 1, 1, 1, 130)
    h = F.batch_norm(h, *(t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)))
    want = F.relu6(F.conv2d(h.relu(), wide[2], wide[4])) + residual.double()
    torch.testing.assert_close(fused.double(), want, rtol=1e-5, atol=1e-5)
    residual.requires_grad_()
    torch.testing.assert_close(separable_conv2d(*args, **words), fused)
    assert torch.autograd.grad(separable_conv2d(*args, **words).sum(), residual)[0].eq(1).all()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, J, kernel, numbers",
    [
        ((2, 3, 33, 30), 32, (3, 3), (2, 1, 1)),
        ((1, 70, 9, 8), 65, (2, 3), ((1, 2), (2, 0), (1, 2))),
        ((0, 3, 9, 9), 4, (3, 3), ()),
    ],
    ids=str,
)
def test_packed_conv(shape, J, kernel, numbers, dtype):
    weight, bias = torch.randn(J, shape[1], *kernel) / (shape[1] * kernel[0] * kernel[1]) ** 0.5, torch.randn(J)
    norm = BatchNorm(torch.rand(J), torch.randn(J), torch.randn(J), torch.rand(J) + 0.5)
    packed = PackedConv(weight, bias, *numbers, norm=norm, activation="relu6")
    for layout in testing.LAYOUTS:
        x = testing.make_input(*shape, dtype=dtype, layout=layout)
        moments = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        y = F.conv2d(x.double(), weight.double(), bias.double(), *numbers)
        want = F.relu6(F.batch_norm(y, *(t.double() for t in moments)))
        tolerance = 2e-5 if dtype == F32 else 2e-2
        torch.testing.assert_close(packed(x).double(), want, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=f"PackedConv: x must be \\(N, {shape[1]}, H, W\\); got"):
        packed(torch.ones(1, shape[1] + 1, 9, 9))


def test_multiplier_and_pointwise_alone():
    x, depthwise, pointwise = torch.randn(2, 4, 9, 9), torch.randn(12, 1, 3, 3), torch.randn(5, 12, 1, 1)
    want = F.conv2d(F.conv2d(x, depthwise, None, 2, 1, 1, 4), pointwise)
    torch.testing.assert_close(separable_conv2d(x, depthwise, pointwise, stride=2, padding=1), want, rtol=1e-4, atol=1e-4)
    matrix = torch.randn(5, 4, 1, 1)
    leaves = [t.detach().requires_grad_() for t in (x, matrix)]
    got, want = separable_conv2d(leaves[0], None, leaves[1], stride=2), F.conv2d(*leaves, stride=2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for g, w in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[3], PROBLEMS[4]], ids=str)
def test_bits_do_not_depend_on_threads_or_batch(problem):
    inputs = list(make(problem).values())
    norm = BatchNorm(torch.rand(problem[0][1]), None, None, None, True)

    def run(x, training):
        leaves = [t.detach().requires_grad_(training) for t in (x, *inputs[1:])]
        y = separable_conv2d(*leaves, *problem[3:], norm=norm if training else None, activation="relu")
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), leaves[:2]) if training else ())]

    want = run(inputs[0], True), run(inputs[0], False)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for got, w in zip(run(inputs[0], False), want[1], strict=True):
            assert torch.equal(got, w)
        assert torch.equal(run(inputs[0], True)[0], want[0][0])
    assert torch.equal(run(inputs[0][:1], False)[0], want[1][0][:1])


def test_nan_and_empty_batch():
    x, depthwise, pointwise, *_ = make(PROBLEMS[1]).values()
    x = x.clone(memory_format=torch.preserve_format)
    x[0, 4, 6, 6] = float("nan")
    y = separable_conv2d(x, depthwise, pointwise, padding=1, activation="relu")
    wrong = y.isnan()
    assert wrong[0, :, 5:8, 5:8].all() and wrong.sum() == 9 * 7
    empty = x[:0].detach().requires_grad_()
    y = separable_conv2d(empty, depthwise, pointwise, padding=1)
    assert y.shape == (0, 7, 13, 11) and torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


@pytest.mark.graph
def test_registered_ops():
    x, depthwise, pointwise, *_ = make(PROBLEMS[2]).values()
    weights, numbers = (x, depthwise[:, 0], None, None), [2, 2, 1, 1, 1, 1, 1, 1]
    args = (*weights, blocks_of(pointwise[:, :, 0, 0].t()), None, None, 65, numbers, 1, 2)
    testing.check_op(_fwd, (*args, False, "cpu"))
    testing.check_op(_fwd, (*args, True, "cpu"))
    testing.check_op(_hidden, (*weights, None, numbers, 1, "cpu"))
    testing.check_op(_moments, (x, depthwise[:, 0], numbers, "cpu"))
    d, moments = torch.randn(1, 7, 8, 33).movedim(-1, 1), torch.rand(2, 33)
    testing.check_op(_bwd, (d, *weights, None, numbers, 3, "cpu"))
    testing.check_op(_bwd, (d, *weights, moments, numbers, 3, "cpu"))
    testing.check_op(_bwd, (d, d, None, None, None, moments, PLAIN, 3, "cpu"))


@pytest.mark.graph
def test_compile_and_second_derivatives():
    def fn(x, depthwise, pointwise):
        return separable_conv2d(x, depthwise, pointwise, padding=1, activation="silu")

    leaves = [t.requires_grad_() for t in (torch.randn(2, 6, 8, 9), torch.randn(6, 1, 3, 3), torch.randn(4, 6, 1, 1))]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(fn(*leaves).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def penalty(impl):
        y = separable_conv2d(*leaves, padding=1, activation="silu", impl=impl)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, want in zip(penalty("cpu"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-1)
    double = [torch.randn(1, 2, 4, 3).double(), torch.randn(2, 1, 2, 2).double(), torch.randn(3, 2, 1, 1).double()]
    assert torch.autograd.gradcheck(lambda *t: separable_conv2d(*t, activation="silu"), [t.requires_grad_() for t in double])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 9)}, "x must be a floating-point tensor (N, C, H, W); got torch.float32 (3, 9)"),
        (
            {"depthwise_weight": torch.ones(4, 1, 3, 3)},
            "depthwise_weight must be (C * multiplier, 1, KH, KW) with C = 3 >= 1; got (4, 1, 3, 3)",
        ),
        ({"pointwise_weight": torch.ones(5, 4, 1, 1)}, "pointwise_weight must be (J, 3, 1, 1); got (5, 4, 1, 1)"),
        ({"pointwise_weight": torch.ones(5, 3, 3, 3)}, "pointwise_weight must be (J, 3, 1, 1); got (5, 3, 3, 3)"),
        ({"pointwise_bias": torch.ones(3)}, "pointwise_bias must have shape (5,); got (3,)"),
        ({"stride": 0}, "stride must be an integer >= 1, or 2 of them; got 0"),
        ({"padding": "full"}, 'padding must be "same", "valid", or numbers; got \'full\''),
        ({"padding": "same", "stride": 2}, 'padding="same" needs stride 1; got (2, 2)'),
        ({"dilation": 5}, "the kernel spans 11 along H, where x with its padding has 9"),
        ({"activation": "tanh"}, "activation must be one of None, 'relu', 'relu6', 'silu'; got 'tanh'"),
        ({"norm": BatchNorm()}, "norm needs running_mean and running_var where it is not training"),
        ({"pointwise_norm": BatchNorm()}, "pointwise_norm needs running_mean and running_var where it is not training"),
        (
            {"pointwise_norm": BatchNorm(torch.ones(3), training=True)},
            "pointwise_norm.weight must have shape (5,); got (3,)",
        ),
        ({"residual": torch.ones(2, 5, 7, 7).half()}, "residual must be torch.float32 as x, on cpu; got torch.float16 on cpu"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(change, message):
    good = {"x": torch.ones(2, 3, 9, 9), "depthwise_weight": torch.ones(3, 1, 3, 3), "pointwise_weight": torch.ones(5, 3, 1, 1)}
    with pytest.raises(ValueError) as error:
        separable_conv2d(**{**good, **change})
    assert str(error.value) == f"separable_conv2d: {message}"


def test_raw_binding_refuses_before_it_writes():
    x, depthwise, y = torch.ones(1, 9, 9, 3).movedim(-1, 1), torch.ones(3, 3, 3), torch.full((1, 7, 7, 5), 7.0).movedim(-1, 1)
    good = [x, depthwise, None, None, blocks_of(torch.ones(3, 5)), None, None, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, y, None, None]
    _C.separable_conv_fwd(*good)
    assert y.eq(27).all()
    y.fill_(7)
    for at, value, message in [
        (0, x.double(), "x must be float32, bfloat16, float16; got float64"),
        (0, x.contiguous(), "x must be contiguous in C; got stride 81"),
        (1, depthwise[:2], "depthwise must be (C, KH, KW) = (3, 3, 3); got (2, 3, 3)"),
        (4, torch.ones(3, 5), "pointwise must be (J, C), or in blocks of 64 by 64 = (5, 3); got (3, 5)"),
        (4, good[4][..., 1:], "pointwise must be (ceil(J/64), ceil(C/64), 64, 64) = (1, 1, 64, 64); got (1, 1, 64, 63)"),
        (7, 0, "stride must be at least 1; got 0"),
        (13, 2, "patch_h and patch_w must both be positive, or 0; got 2 and 0"),
        (15, 4, "f must be 0 (none), 1 (relu), 2 (relu6) or 3 (silu); got 4"),
        (19, torch.ones(2, 5), "partial and moments must be given together"),
    ]:
        args = list(good)
        args[at] = value
        with pytest.raises(ValueError, match="separable_conv: ") as error:
            _C.separable_conv_fwd(*args)
        assert message in str(error.value)
        assert y.eq(7).all()


def test_explain():
    assert mlcore.explain("separable_conv", torch.ones(1, 1, 1, 1)).chosen == "cpu"
