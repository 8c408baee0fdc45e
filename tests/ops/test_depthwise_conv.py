"""mlcore.ops.depthwise_conv1d/2d/3d against float64 conv1d/2d/3d of torch, over every implementation and layout."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mlcore
from mlcore import _C, testing
from mlcore.ops import depthwise_conv1d, depthwise_conv2d, depthwise_conv3d
from mlcore.ops.depthwise_conv import _bwd, _fwd

CASES = [case for case in testing.cases("depthwise_conv", "cpu") if case[1] != torch.float64]
KERNELS = [name for name in testing.available("depthwise_conv", "cpu") if name != "reference"]
OURS = {1: depthwise_conv1d, 2: depthwise_conv2d, 3: depthwise_conv3d}
TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
F32, BF16 = torch.float32, torch.bfloat16
# ((N, C, *sizes), multiplier, kernel, stride, padding, dilation)
PROBLEMS = [
    ((1, 1, 1), 1, (1,), 1, 0, 1),
    ((2, 5, 37), 1, (31,), 1, 15, 1),
    ((1, 3, 2600), 1, (4,), 1, 3, 1),  # more than a block of a line
    ((2, 18, 13, 11), 1, (3, 3), 1, 1, 1),
    ((1, 33, 14, 15), 1, (3, 3), 2, 1, 1),
    ((1, 3, 75, 80), 1, (3, 3), 1, 1, 1),  # more than a block of a plane
    ((1, 4, 90, 41), 2, (5, 5), 2, 2, 1),
    ((2, 3, 20, 21), 3, (2, 3), (2, 1), (0, 2), (3, 2)),
    ((1, 7, 17, 16), 1, (7, 7), 1, 3, 1),
    ((1, 2, 15, 15), 1, (3, 3), 1, 4, 4),
    ((1, 2, 9, 20), 1, (1, 9), 1, (0, 4), 1),
    ((1, 2, 20, 9), 1, (9, 1), 3, (4, 0), 1),
    ((1, 2, 13, 13), 1, (6, 6), 2, 3, 1),
    ((1, 2, 23, 23), 1, (7, 7), 5, 0, 1),
    ((1, 2, 3, 3), 1, (3, 3), 1, 5, 1),  # results that see nothing but padding
    ((2, 3, 5, 7, 9), 1, (3, 3, 3), 1, 1, 1),
    ((1, 17, 6, 9, 10), 2, (3, 2, 3), (2, 1, 3), (1, 1, 0), (1, 2, 1)),
]


def make(problem, dtype=F32, layout="contiguous", bias=True):
    shape, multiplier, kernel, *_ = problem
    if layout == "channels_last":
        x = testing.make_input(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    else:
        x = testing.make_input(*shape, dtype=dtype, layout=layout)
    taps = functools.reduce(lambda a, b: a * b, kernel)
    return {
        "x": x,
        "weight": testing.make_input(shape[1] * multiplier, 1, *kernel, dtype=dtype, std=taps**-0.5),
        "bias": testing.make_input(shape[1] * multiplier, dtype=dtype) if bias else None,
    }


def stock(problem):
    """torch's convolution, rounded once to x's dtype (its own 16-bit ones sum in 16 bits and take minutes)."""
    shape, _, kernel, *numbers = problem

    def run(x, weight, bias):
        wide = torch.promote_types(x.dtype, F32)
        given = None if bias is None else bias.to(wide)
        # Contiguous: torch 2.13 with several filters a channel and channels_last now and then crashes the process.
        return TORCH[len(kernel)](x.to(wide).contiguous(), weight.to(wide), given, *numbers, shape[1]).to(x.dtype)

    return run


def check(name, problem, inputs, want=None, **kwargs):
    want = want or stock(problem)
    _, _, kernel, *numbers = problem
    count = inputs["x"].numel() / inputs["x"].shape[1]
    many = 4 * count**0.5  # a weight's gradient is a sum of up to `count` numbers near 1 of either sign
    with testing.use(name) as impl:

        def ours(x, weight, bias):
            return OURS[len(kernel)](x, weight, bias, *numbers, **kwargs, impl=impl)

        testing.check_numerics(ours, want, want, inputs, terms={"0": 2.0, "x": 2.0, "weight": many, "bias": many})


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: str(p).replace(" ", ""))
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{str(c[1]).removeprefix('torch.')}")
def test_matches_conv(case, problem):
    name, dtype = case
    check(name, problem, make(problem, dtype, "contiguous"))
    check(name, problem, make(problem, dtype, "channels_last", bias=False))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("name", KERNELS)
def test_layouts(name, layout):
    for problem in (PROBLEMS[3], PROBLEMS[1]):
        check(name, problem, make(problem, layout=layout))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_problem(data):
    dims = data.draw(st.integers(1, 3))

    def draw(least, most):
        return tuple(data.draw(st.integers(least, most)) for _ in range(dims))

    kernel, stride, padding, dilation = draw(1, 5), draw(1, 4), draw(0, 5), draw(1, 3)
    spans = [max((k - 1) * d + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    extra = draw(0, 25 if dims < 3 else 4)
    sizes = [s + e for s, e in zip(spans, extra, strict=True)]
    N, C, multiplier = (data.draw(st.integers(1, n)) for n in (3, 20, 3))
    problem = ((N, C, *sizes), multiplier, kernel, stride, padding, dilation)
    check("cpu", problem, make(problem, layout=data.draw(st.sampled_from(["contiguous", "channels_last"]))))


@pytest.mark.parametrize("name", testing.available("depthwise_conv", "cpu"))
def test_paddings(name):
    problem = ((2, 5, 11, 12), 1, (4, 3), 1, 0, (2, 1))
    inputs = make(problem)
    for padding, pairs, mode in [
        ("same", (1, 1, 3, 3), "zeros"),
        ("valid", (0, 0, 0, 0), "zeros"),
        (((1, 5), (0, 2)), (0, 2, 1, 5), "zeros"),
        (((1, 5), (0, 2)), (0, 2, 1, 5), "reflect"),
        ((2, 1), (1, 1, 2, 2), "replicate"),
        ("same", (1, 1, 3, 3), "circular"),
    ]:

        def want(x, weight, bias, pairs=pairs, mode=mode):
            padded = F.pad(x, pairs, mode="constant" if mode == "zeros" else mode)
            return F.conv2d(padded, weight, bias, 1, 0, (2, 1), 5)

        asked = (*problem[:3], 1, padding, (2, 1))
        check(name, asked, inputs, want=want, padding_mode=mode)


@pytest.mark.parametrize("name", KERNELS)
def test_mixed_dtypes(name):
    """16-bit x beside float32 parameters."""
    inputs = make(PROBLEMS[3], BF16)
    inputs["weight"], inputs["bias"] = inputs["weight"].float(), inputs["bias"].float()
    check(name, PROBLEMS[3], inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_y_lies_as_x(layout):
    inputs = make(PROBLEMS[3], layout=layout)
    x = inputs["x"].requires_grad_()
    y = depthwise_conv2d(x, inputs["weight"], padding=1)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("problem", [PROBLEMS[3], PROBLEMS[6], ((3, 40, 30, 31), 1, (3, 3), 1, 1, 1)], ids=str)
def test_bits_do_not_depend_on_threads_or_batch(problem, layout):
    inputs = make(problem, layout=layout)

    def run(x):
        leaves = [t.detach().requires_grad_() for t in (x, inputs["weight"], inputs["bias"])]
        y = depthwise_conv2d(*leaves, *problem[3:])
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    want = run(inputs["x"])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for got, w in zip(run(inputs["x"]), want, strict=True):
            assert torch.equal(got, w)
    for got, w in zip(run(inputs["x"][:1])[:2], want[:2], strict=True):
        assert torch.equal(got, w[:1])


@pytest.mark.parametrize("stride", [1, 2])
def test_results_that_pass_by_the_caches(stride):
    """From 16 MiB on, channels_last results are streamed: the same bits as of an image alone, which is smaller."""
    x = torch.randn(2, 64, 184 * stride, 184 * stride).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, 1, 3, 3), torch.randn(64)
    y = depthwise_conv2d(x, weight, bias, stride, 1)
    assert y.numel() * 4 > 16 << 20
    assert torch.equal(y, torch.cat([depthwise_conv2d(x[i : i + 1], weight, bias, stride, 1) for i in range(2)]))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(depthwise_conv2d(x, weight, bias, stride, 1), x, y)
    for i in range(2):
        one = x[i : i + 1].detach().requires_grad_()
        (want,) = torch.autograd.grad(depthwise_conv2d(one, weight, bias, stride, 1), one, y[i : i + 1])
        assert torch.equal(dx[i : i + 1], want)
    want = F.conv2d(x[:1, :, :32, :32].detach().double(), weight.double(), bias.double(), stride, 1, groups=64)
    assert torch.allclose(y[:1, :, :14, :14].double(), want[:, :, :14, :14], atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_channel(layout):
    inputs = make(PROBLEMS[3], layout=layout)
    x = inputs["x"].clone(memory_format=torch.preserve_format)
    x[0, 4, 6, 6] = float("nan")
    y = depthwise_conv2d(x, inputs["weight"], padding=1)
    wrong = y.isnan().nonzero()
    assert len(wrong) == 9 and wrong[:, 1].eq(4).all()
    assert wrong[:, 2].min() == 5 and wrong[:, 2].max() == 7
    leaves = [x.requires_grad_(), inputs["weight"].requires_grad_()]
    _, dweight = torch.autograd.grad(depthwise_conv2d(*leaves, padding=1).sum(), leaves)
    assert dweight.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [4]


def test_empty_batch_and_no_batch():
    x, weight = torch.randn(0, 3, 5, 5, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    y = depthwise_conv2d(x, weight, padding=1)
    assert y.shape == (0, 3, 5, 5)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape and dweight.eq(0).all()
    x = torch.randn(3, 5, 5)
    assert torch.equal(depthwise_conv2d(x, weight), depthwise_conv2d(x[None], weight)[0])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_are_asked_for(layout, wanted):
    inputs = list(make(PROBLEMS[4], layout=layout).values())
    leaves = [t.requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    got = torch.autograd.grad(depthwise_conv2d(*leaves, 2, 1).sum(), [t for t in leaves if t.requires_grad])
    want = torch.autograd.grad(F.conv2d(*leaves, 2, 1, 1, 33).sum(), [t for t in leaves if t.requires_grad])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.graph
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_registered_ops(layout):
    x, weight, bias = (t[:, :, None] if t.dim() == 4 else t for t in make(PROBLEMS[4], layout=layout).values())
    weight = weight[:, 0]
    numbers = ([1, 2, 2], [1, 1, 1], [0, 0, 1, 1, 1, 1])
    testing.check_op(_fwd, (x, weight, bias, *numbers, "cpu"))
    dy = _fwd(x, weight, bias, *numbers, "cpu")
    testing.check_op(_bwd, (dy, x, weight, *numbers, True, True, "cpu"))
    testing.check_op(_bwd, (dy, x, weight, *numbers, True, False, "cpu"))


@pytest.mark.graph
def test_compile_and_export():
    def fn(x, weight, bias):
        return depthwise_conv2d(x, weight, bias, 2, 1)

    def args(N, C, H, W):
        leaves = torch.randn(N, C, H, W), torch.randn(C, 1, 3, 3)
        return *(t.requires_grad_() for t in leaves), torch.randn(C)

    testing.check_public(fn, args(2, 6, 10, 9), args(3, 5, 33, 20))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradcheck(dims):
    x, weight = torch.randn(1, 1, *(4, 3, 2)[:dims]), torch.randn(2, 1, *(2, 3, 2)[:dims])
    leaves = [t.double().requires_grad_() for t in (x, weight, torch.randn(2))]
    assert torch.autograd.gradcheck(lambda *t: OURS[dims](*t, 2, 1), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: OURS[dims](*t, 2, 1), leaves)


def test_second_derivatives():
    leaves = [t.requires_grad_() for t in make(PROBLEMS[3]).values()]

    def penalty(impl):
        y = depthwise_conv2d(*leaves, padding=1, impl=impl)
        grads = torch.autograd.grad(y.square().sum(), leaves[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, want in zip(penalty("cpu"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_transforms_and_autocast():
    x, weight = torch.randn(4, 2, 3, 9, 8), torch.randn(3, 1, 3, 3)
    want = torch.stack([depthwise_conv2d(part, weight) for part in x])
    torch.testing.assert_close(torch.func.vmap(lambda x: depthwise_conv2d(x, weight))(x), want)
    with torch.autocast("cpu", dtype=BF16):
        y = depthwise_conv2d(x[0], weight)
    assert y.dtype == BF16 and torch.equal(y, depthwise_conv2d(x[0].bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 9)}, "x must be (N, C, H, W); got shape (3, 9)"),
        ({"x": torch.ones(1, 3, 9, 9, dtype=torch.int64)}, "x must be a floating-point tensor; got torch.int64"),
        ({"weight": torch.ones(4, 1, 3, 3)}, "weight must be (C * multiplier, 1, KH, KW) with C = 3 >= 1; got (4, 1, 3, 3)"),
        ({"weight": torch.ones(3, 3, 3, 3)}, "weight must be (C * multiplier, 1, KH, KW) with C = 3 >= 1; got (3, 3, 3, 3)"),
        ({"bias": torch.ones(4)}, "bias must have shape (3,); got (4,)"),
        ({"stride": 0}, "stride must be an integer >= 1, or 2 of them; got 0"),
        ({"stride": (1, 2, 3)}, "stride must be an integer >= 1, or 2 of them; got (1, 2, 3)"),
        ({"dilation": (1, 0)}, "dilation must be an integer >= 1, or 2 of them; got (1, 0)"),
        ({"padding": -1}, "padding must be an integer >= 0, or 2 of them; got -1"),
        ({"padding": "full"}, 'padding must be "same", "valid", or numbers; got \'full\''),
        ({"padding": "same", "stride": 2}, 'padding="same" needs stride 1; got (2, 2)'),
        ({"padding_mode": "mirror"}, "padding_mode must be one of zeros, reflect, replicate, circular; got 'mirror'"),
        (
            {"padding_mode": "reflect", "padding": (1, 9)},
            "padding_mode='reflect' needs padding below the size of x; got 9 for 9",
        ),
        (
            {"padding_mode": "circular", "padding": 10},
            "padding_mode='circular' needs padding at most the size of x; got 10 for 9",
        ),
        ({"dilation": 5}, "the kernel spans 11 along H, where x with its padding has 9"),
        (
            {"weight": torch.ones(3, 1, 3, 3, dtype=BF16)},
            "weight must be torch.float32 as x, or torch.float32, on cpu; got torch.bfloat16 on cpu",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError) as error:
        depthwise_conv2d(**{"x": torch.ones(2, 3, 9, 9), "weight": torch.ones(3, 1, 3, 3), **change})
    assert str(error.value) == f"depthwise_conv2d: {message}"


def test_raw_binding_refuses_before_it_writes():
    x, weight, y = torch.ones(2, 3, 1, 9, 9), torch.ones(3, 1, 3, 3), torch.full((2, 3, 1, 7, 7), 7.0)
    good = [x, weight, None, *[1] * 6, *[0] * 3, y]
    _C.depthwise_conv_fwd(*good)
    assert y.eq(9).all()
    y.fill_(7)
    for at, value, message in [
        (0, x.double(), "x must be float32, bfloat16, float16; got float64"),
        (0, x[..., ::2], "y must be (N, C*M, Do, Ho, Wo)"),
        (1, weight.half(), "weight must be float32; got float16"),
        (1, weight[:2], "weight must have a multiple of x's C = 3 filters"),
        (2, torch.ones(4), "bias must be (C*M) = (3); got (4)"),
        (5, 0, "stride must be at least 1; got 0"),
        (8, 0, "dilation must be at least 1; got 0"),
        (11, -1, "pad must not be negative; got -1"),
        (12, y.transpose(3, 4), "y must be contiguous in W; got stride 7"),
    ]:
        args = list(good)
        args[at] = value
        if at == 0 and value.dtype == F32:
            message = "x must be contiguous in W; got stride 2"
        with pytest.raises(ValueError, match="depthwise_conv: ") as error:
            _C.depthwise_conv_fwd(*args)
        assert message in str(error.value)
        assert y.eq(7).all()


def test_explain():
    assert mlcore.explain("depthwise_conv", torch.ones(1, 1, 1, 1)).chosen == "cpu"
