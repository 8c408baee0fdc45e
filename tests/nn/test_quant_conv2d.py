"""mlcore.nn.QuantConv2d against torch's convolution with the dequantized weight in float64, and against int64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcore import testing
from mlcore.kernels.quant_linear.quant_linear_ref import ACTIVATIONS
from mlcore.nn import QuantConv2d
from mlcore.quant import pack_codes

LEVELS = [name for name in testing.available("quant_linear", "cpu") if name != "reference"]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
POINTWISE = [  # C, J, H, W, convolution
    (7, 5, 6, 9, {}),
    (33, 40, 5, 5, {"stride": 2, "padding": (1, 0)}),
    (16, 3, 4, 3, {"stride": (1, 3), "padding": (0, 2), "padding_mode": "circular", "bias": False}),
    (64, 64, 7, 7, {"padding": 1, "padding_mode": "reflect", "dilation": 3}),
    (1, 1, 3, 4, {"padding": "same"}),
]
DEPTHWISE = [  # C, filters, kernel, H, W, convolution
    (17, 1, 3, 9, 8, {"padding": 1}),
    (32, 1, (5, 2), 11, 7, {"padding": "same", "bias": False}),
    (6, 3, 3, 9, 9, {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 3)}),
    (20, 1, 7, 8, 8, {"padding": 3, "padding_mode": "replicate"}),
    (16, 1, 1, 5, 6, {"stride": 3}),
]


def wanted(conv, packed, x, activation=None, residual=None):
    """In float64, by torch."""
    wide = copy.deepcopy(conv).double()
    wide.weight.data = packed.dequantize(torch.float64).view_as(conv.weight)
    y = ACTIVATIONS[activation](wide(x.double()))
    return y if residual is None else y + residual


def pointwise(case):
    C, J, H, W, how = case
    return nn.Conv2d(C, J, 1, **how), (C, H, W)


def depthwise(case):
    C, M, kernel, H, W, how = case
    return nn.Conv2d(C, C * M, kernel, groups=C, **how), (C, H, W)


CASES = [pointwise(c) for c in POINTWISE] + [depthwise(c) for c in DEPTHWISE]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_matches_float64(number, layout):
    conv, size = CASES[number]
    activation = tuple(ACTIVATIONS)[number % len(ACTIVATIONS)]
    layer = QuantConv2d.from_float(conv, ("int8", "int4")[number % 2], group_size=(None, 5)[number % 2], activation=activation,
                                   dynamic_int8=False)  # fmt: skip
    for batch in (2, 1, 0):
        x = torch.randn(batch, *size).to(memory_format=FORMATS[layout])
        want = wanted(conv, layer.packed, x, activation)
        residual = torch.randn_like(want, dtype=torch.float32)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = layer(x, residual)
            torch.testing.assert_close(got.double(), want + residual, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(layer(x := torch.randn(*size)), layer(x[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("number", [1, 5, 7])
def test_other_dtypes(number, dtype):
    conv, size = CASES[number]
    layer = QuantConv2d.from_float(conv, activation="relu6", dynamic_int8=False)
    x = torch.randn(2, *size).to(dtype).to(memory_format=torch.channels_last)
    want, eps = wanted(conv, layer.packed, x, "relu6").detach(), torch.finfo(dtype).eps
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = layer(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=max(2 * eps, 1e-6), atol=max(2 * eps, 1e-6))


@pytest.mark.parametrize("level", LEVELS)
def test_integers_are_exact(level):
    """int64 is the truth: pixels whose largest magnitude is 127 and scales of one leave only integers."""
    g = torch.Generator().manual_seed(1)
    for number in range(60):
        C, J = (int(torch.randint(1, 70, (), generator=g)) for _ in range(2))
        H, W, stride, padding = (int(torch.randint(low, 9, (), generator=g)) % top + low
                                 for low, top in ((1, 8), (1, 8), (1, 3), (0, 3)))  # fmt: skip
        extreme = number % 3 == 0  # the ends of the ranges alone: what saturates, does
        x = torch.randint(0, 2, (2, C, H, W), generator=g) * 254 - 127 if extreme else torch.randint(-127, 128, (2, C, H, W))
        x[:, 0] = 127
        codes = torch.randint(0, 2, (J, C), generator=g) * 255 if extreme else torch.randint(0, 256, (J, C), generator=g)
        packed = pack_codes(codes, torch.ones(J, 1), bits=8, group_size=C)
        conv = nn.Conv2d(C, J, 1, stride, padding, bias=False)
        want = F.conv2d(x, (codes - 128)[:, :, None, None], None, stride, padding)
        layer = QuantConv2d.from_packed(packed, conv)
        with testing.use(level):
            for memory_format in FORMATS.values():
                assert torch.equal(layer(x.float().to(memory_format=memory_format)), want.float()), (
                    C,
                    J,
                    H,
                    W,
                    stride,
                    padding,
                )


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_levels_and_threads_agree_to_the_bit(activation):
    conv = nn.Conv2d(48, 33, 1)
    layer, x, results = QuantConv2d.from_float(conv, activation=activation), torch.randn(3, 48, 7, 5), []
    for level in LEVELS:
        with testing.use(level):
            results.append(layer(x))
            torch.set_num_threads(1)
            assert torch.equal(layer(x[1:2])[0], results[-1][1])  # nor does the rest of the batch matter
            torch.set_num_threads(2)
    if activation != "silu":
        assert all(torch.equal(r, results[0]) for r in results)


def test_layouts_of_results():
    """A pointwise convolution's y is channels_last whatever x is, and neither x nor y is copied where it is already."""
    layer, x = QuantConv2d(16, 32), torch.randn(2, 16, 6, 6)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), layer(x.to(memory_format=torch.channels_last)))
    depth = QuantConv2d(16, 16, 3, padding=1, groups=16)
    for memory_format in FORMATS.values():
        assert depth(x.to(memory_format=memory_format)).is_contiguous(memory_format=memory_format)


def test_a_bad_pixel_spoils_itself_alone():
    layer, x = QuantConv2d(8, 4), torch.randn(1, 8, 3, 3)
    clean = layer(x)
    x[0, 2, 1, 1] = float("nan")
    y = layer(x)
    bad = y.isnan().any(1)[0]
    assert bad.sum() == 1 and bad[1, 1] and y[0, :, 1, 1].isnan().all()
    assert torch.equal(y[:, :, ~bad], clean[:, :, ~bad])


@pytest.mark.parametrize("number", [1, 5, 6, 7])
def test_gradients(number):
    conv, size = CASES[number]
    layer = QuantConv2d.from_float(conv, activation="silu", dynamic_int8=False)
    x = torch.randn(2, *size, requires_grad=True)
    want = wanted(conv, layer.packed, leaf := x.detach().double().requires_grad_(), "silu")
    dy = torch.randn_like(want)
    want.backward(dy)
    layer(x).backward(dy.float())
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        assert layer.bias.grad is not None and [n for n, _ in layer.named_parameters()] == ["bias"]
    rounded = QuantConv2d.from_float(CASES[0][0])  # straight through the rounding of x
    (dx,) = torch.autograd.grad(rounded(x := torch.randn(1, 7, 6, 9, requires_grad=True)).sum(), x)
    torch.testing.assert_close(dx, rounded.packed.dequantize().sum(0).view(1, 7, 1, 1).expand_as(dx), rtol=1e-5, atol=1e-6)


def test_folds_norms():
    for case in (POINTWISE[1], DEPTHWISE[0]):
        conv, size = (pointwise if case is POINTWISE[1] else depthwise)(case)
        norm = nn.BatchNorm2d(conv.out_channels).eval()
        for t in (norm.weight, norm.bias, norm.running_mean):
            t.data.normal_()
        norm.running_var.uniform_(0.5, 2)
        layer = QuantConv2d.from_float(conv, norm=norm, activation="relu6")
        plain, x = QuantConv2d.from_float(conv), torch.randn(2, *size)
        torch.testing.assert_close(layer(x), F.relu6(norm(plain(x))), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="norm must have fixed moments"):
            QuantConv2d.from_float(conv, norm=norm.train())


@pytest.mark.parametrize("number", [1, 5])
def test_state_dict_and_copies(number, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    conv, size = CASES[number]
    source, target = QuantConv2d.from_float(conv, "int4", group_size=5, symmetric=False), QuantConv2d.from_float(conv)
    x = torch.randn(2, *size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        before = target(x)
        safetensors.save_file(source.state_dict(), tmp_path / "w")
        target.load_state_dict(safetensors.load_file(tmp_path / "w"))
        target.dynamic_int8 = source.dynamic_int8
        assert torch.equal(target(x), source(x)) and not torch.equal(target(x), before)
        twin = copy.deepcopy(source)
        twin.codes.zero_()
        assert torch.equal(copy.deepcopy(source)(x), source(x)) and not torch.equal(twin(x), source(x))
    with pytest.raises(RuntimeError, match="the layer's"):
        QuantConv2d(3, 2).load_state_dict(source.state_dict())


@pytest.mark.parametrize("number", [0, 5])
def test_compiles(number):
    conv, size = CASES[number]
    layer, x = QuantConv2d.from_float(conv, activation="relu"), torch.randn(2, *size)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


def test_constructor_and_repr():
    torch.manual_seed(3)
    layer = QuantConv2d(8, 6, stride=2, padding=1, activation="relu")
    torch.manual_seed(3)
    stock = nn.Conv2d(8, 6, 1, stride=2, padding=1)
    torch.testing.assert_close(layer.packed.dequantize(), stock.weight.detach().flatten(1), rtol=0, atol=3e-3)
    assert repr(layer) == (
        "QuantConv2d(8, 6, kernel_size=(1, 1), stride=(2, 2), padding=(1, 1), activation=relu, int, bits=8, group_size=8, "
        "dynamic_int8)"
    )
    assert "groups=4" in repr(QuantConv2d(4, 8, 3, groups=4)) and layer.out_channels == 6 and not layer.depthwise


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: QuantConv2d(4, 4, 3), "must be pointwise or depthwise; got kernel .* with 1 groups of 4 channels"),
        (lambda: QuantConv2d(4, 4, 1, groups=2), "must be pointwise or depthwise"),
        (lambda: QuantConv2d(4, 4, 3, groups=4, dynamic_int8=True), "dynamic_int8 belongs to pointwise"),
        (lambda: QuantConv2d(4, 4, activation="tanh"), "activation must be one of None, .*; got 'tanh'"),
        (lambda: QuantConv2d(4, 5)(torch.zeros(2, 3, 4, 4)), r"x must be \(N, 4, H, W\), or without N; got \(2, 3, 4, 4\)"),
        (lambda: QuantConv2d(4, 5)(torch.zeros(4)), r"x must be \(N, 4, H, W\)"),
        (
            lambda: QuantConv2d.from_packed(QuantConv2d(3, 5).packed, nn.Conv2d(4, 5, 1)),
            r"packed must be \(5, 4\); got \(5, 3\)",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=f"QuantConv2d: .*{message}"):
        call()
