"""binary_conv2d against torch's convolution of signs in float64 (exact integers), on every implementation; its gradients
against the reference's.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from binary_suite import WAYS, signs

import mlcore
from mlcore import _C, testing
from mlcore.ops import PackedSigns, binary_conv2d, pack_binary_conv, pack_pixels, unpack_signs
from mlcore.ops.binary_conv2d import _fwd, _pack
from mlcore.quant import pack_codes


def image(*shape, last=False):
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if last else x


# B, C, O, H, W, kernel, stride, padding, dilation
SHAPES = [
    (1, 3, 5, 7, 9, (3, 3), 1, 1, 1),
    (2, 37, 70, 13, 11, (3, 3), 1, 1, 1),
    (2, 64, 64, 9, 17, (3, 3), 2, 1, 1),
    (1, 33, 16, 12, 12, (5, 3), (2, 1), (2, 0), (1, 2)),
    (1, 32, 17, 10, 10, (1, 1), 1, 0, 1),
    (3, 5, 2, 8, 8, (1, 1), 2, 3, 1),
    (1, 20, 130, 5, 5, (5, 5), 1, 4, 1),
    (1, 2, 3, 4, 4, (3, 3), 3, 7, 2),
    (1, 70, 9, 1, 31, (1, 7), 1, (0, 3), 3),
    (1, 8, 8, 6, 6, (3, 3), 1, "same", 2),
    (1, 8, 8, 6, 6, (2, 4), 1, "same", 1),
    (1, 8, 8, 6, 7, (3, 3), 2, ((0, 1), (2, 1)), 1),
]


def truth(x, w, stride, padding, dilation):
    x = signs(x)
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        x, padding = F.pad(x, (*padding[1], *padding[0])), 0
    return F.conv2d(x, signs(w), stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*WAYS, "reference"])
def test_exact(name, shape, last):
    B, C, O, H, W, kernel, *geometry = shape
    x, w = image(B, C, H, W, last=last), torch.randn(O, C, *kernel)
    packed = pack_binary_conv(w, torch.ones(O))
    with testing.use(name) as impl:
        y = binary_conv2d(x, packed, None, *geometry, kernel_size=kernel, impl=impl)
    assert torch.equal(y.double(), truth(x, w, *geometry))


def test_exact_for_many_shapes():
    """552 shapes on every way, beside binary_linear's 2 160: sizes up to odd ones, kernels larger than the image, more
    padding than kernel.
    """
    sizes = itertools.product((1, 3, 40), (1, 19), (1, 4, 7), (1, 2, 3), (1, 2), (0, 1, 4), (1, 3))
    for C, O, H, k, stride, padding, dilation in sizes:
        if H + 2 * padding < (k - 1) * dilation + 1:
            continue
        x, w = torch.randn(2, C, H, 5 + H), torch.randn(O, C, k, k)
        packed, want = pack_binary_conv(w, torch.ones(O)), truth(x, w, stride, padding, dilation).float()
        for name in WAYS:
            with testing.use(name) as impl:
                y = binary_conv2d(x, packed, None, stride, padding, dilation, kernel_size=k, impl=impl)
            assert torch.equal(y, want), (name, C, O, H, k, stride, padding, dilation)


@pytest.mark.parametrize("name", WAYS)
def test_padding_is_no_sign(name):
    """All inputs and weights +1: a sum is the number of taps inside."""
    x, packed = torch.ones(1, 40, 4, 4), pack_binary_conv(torch.ones(3, 40, 3, 3))
    with testing.use(name) as impl:
        y = binary_conv2d(x, packed, padding=1, kernel_size=3, impl=impl)
    assert torch.equal(y[0, 0], 40.0 * torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]))


def formula(x, w, alpha, bias, scaled, stride, padding, dilation):
    """XNOR-Net in torch."""
    y = F.conv2d(signs(x).to(x.dtype), signs(w).to(x.dtype), stride=stride, padding=padding, dilation=dilation)
    y = y * alpha.to(x.dtype)[:, None, None]
    if scaled:
        box = torch.full((1, 1, *w.shape[2:]), 1 / (w.shape[2] * w.shape[3]), dtype=x.dtype)
        y = y * F.conv2d(x.abs().mean(1, keepdim=True), box, stride=stride, padding=padding, dilation=dilation)
    return y + bias[:, None, None]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name, dtype", testing.cases("binary_conv2d"))
def test_matches_float64(name, dtype, scaled):
    w, geometry = torch.randn(20, 37, 3, 2), ((2, 1), 1, 1)
    packed = pack_binary_conv(w)

    def ours(x, bias):
        with testing.use(name) as impl:
            return binary_conv2d(x, packed, bias, *geometry, kernel_size=(3, 2), activation_scale=scaled, impl=impl)

    def math(x, bias):
        return formula(x, w, packed.scales[:, 0].flatten()[:20], bias, scaled, *geometry)

    inputs = {"x": testing.make_input(2, 37, 9, 8, dtype=dtype), "bias": testing.make_input(20, dtype=dtype)}
    testing.check_numerics(ours, math, math, inputs, gradients=False)


def test_ways_agree_to_the_bit():
    """Levels, threads, memory layouts, and what else is in the batch."""
    packed, bias, x = pack_binary_conv(torch.randn(70, 40, 3, 3)), torch.randn(70), torch.randn(3, 40, 15, 14)
    results = []
    for name in [*WAYS, "reference"]:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            with testing.use(name) as impl:
                for t in (x, x.to(memory_format=torch.channels_last), x[:1], x.transpose(2, 3).contiguous().transpose(2, 3)):
                    results.append(binary_conv2d(t, packed, bias, padding=1, kernel_size=3, impl=impl))
    torch.set_num_threads(2)
    assert all(torch.equal(r, results[0][: len(r)]) for r in results)
    assert results[1].is_contiguous(memory_format=torch.channels_last) and results[0].is_contiguous()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", [*WAYS, "reference"])
def test_layers_stay_packed(name, last):
    first, second = pack_binary_conv(torch.randn(75, 37, 3, 3)), pack_binary_conv(torch.randn(20, 75, 1, 1))
    x, bias = image(2, 37, 9, 8, last=last), torch.randn(75)
    with testing.use(name) as impl:
        packed = pack_pixels(x, scale=True, impl=impl)
        assert torch.equal(unpack_signs(packed).permute(0, 3, 1, 2).double(), signs(x))
        torch.testing.assert_close(packed.scale, x.abs().mean(1))
        hidden = binary_conv2d(packed, first, bias, padding=1, kernel_size=3, impl=impl)
        want = binary_conv2d(x, first, bias, padding=1, kernel_size=3, activation_scale=True, impl=impl)
        torch.testing.assert_close(hidden, want, rtol=0, atol=0)
        bits = binary_conv2d(packed, first, bias, padding=1, kernel_size=3, packed_output=True, impl=impl)
        assert bits.features == 75 and torch.equal(unpack_signs(bits).permute(0, 3, 1, 2).double(), signs(hidden))
        y = binary_conv2d(bits, second, kernel_size=1, impl=impl)
        assert torch.equal(y, binary_conv2d(hidden, second, kernel_size=1, impl=impl))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", testing.available("binary_conv2d"))
def test_empty_and_unbatched(name, scaled):
    packed = pack_binary_conv(torch.randn(5, 8, 3, 3))
    with testing.use(name) as impl:
        x = torch.randn(0, 8, 6, 6, requires_grad=True)
        y = binary_conv2d(x, packed, padding=1, kernel_size=3, activation_scale=scaled, impl=impl)
        assert y.shape == (0, 5, 6, 6) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        one = torch.randn(8, 6, 6)
        alone, batch = (binary_conv2d(t, packed, kernel_size=3, activation_scale=scaled, impl=impl) for t in (one, one[None]))
        assert torch.equal(alone, batch[0])
        none = binary_conv2d(one[None], pack_binary_conv(torch.randn(0, 8, 3, 3)), kernel_size=3, impl=impl)
        assert none.shape == (1, 0, 4, 4)


@pytest.mark.parametrize("name", WAYS)
def test_nan_stays_in_its_windows(name):
    packed, x = pack_binary_conv(torch.randn(5, 8, 3, 3)), torch.randn(2, 8, 6, 6)
    clean = x.clone()
    x[0, 3, 2, 2], clean[0, 3, 2, 2] = torch.nan, 1.0
    with testing.use(name) as impl:
        assert torch.equal(*(binary_conv2d(t, packed, kernel_size=3, impl=impl) for t in (x, clean)))
        scaled = binary_conv2d(x, packed, kernel_size=3, activation_scale=True, impl=impl)
    assert scaled[0, :, :3, :3].isnan().all() and scaled[0, :, 3:].isfinite().all() and scaled[1].isfinite().all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("estimator", ["identity", "approx"])
@pytest.mark.parametrize("geometry", [(1, 1, 1), ((2, 1), (1, 0), (1, 2)), (1, "same", 1)], ids=str)
def test_gradients_are_the_references(geometry, estimator, scaled):
    packed, results = pack_binary_conv(torch.randn(20, 9, 3, 2)), []
    x, bias, other = torch.randn(2, 9, 7, 8), torch.randn(20), torch.randn(2, 9, 7, 8)
    how = {"kernel_size": (3, 2), "activation_scale": scaled, "estimator": estimator}
    for impl in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = binary_conv2d(leaves[0], packed, leaves[1], *geometry, **how, impl=impl)
        seed = torch.linspace(-1, 1, y.numel()).view(y.shape)
        grads = torch.autograd.grad((y * seed).sum(), leaves, create_graph=True)
        second = torch.autograd.grad((grads[0] * other).sum(), leaves[0]) if estimator == "approx" else ()
        results.append((y, *grads, *second))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_op():
    packed = pack_binary_conv(torch.randn(20, 9, 3, 2))
    for last in (False, True):
        x = image(2, 9, 7, 8, last=last)
        words, _ = _pack(x, True, "cpu")
        for scaled in (True, False):
            testing.check_op(_pack, (x, scaled, "cpu"))
        numbers = 20, 9, (3, 2), (1, 1), (1, 1), (1, 1, 0, 1)
        for dtype in (torch.float32, torch.int32):
            bias, scale = torch.randn(20), torch.rand(2, 7, 8)
            testing.check_op(_fwd, (words, packed.codes, packed.scales, scale, bias, *numbers, dtype, last, "cpu"))


@pytest.mark.parametrize("scaled", [False, True])
def test_compile_and_export(scaled):
    packed = pack_binary_conv(torch.randn(20, 9, 3, 3))

    def fn(x, bias):
        return binary_conv2d(x, packed, bias, padding=1, kernel_size=3, activation_scale=scaled)

    def args(B, H):
        return torch.randn(B, 9, H, H + 1, requires_grad=True), torch.randn(20, requires_grad=True)

    testing.check_public(fn, args(5, 7), args(6, 11))


def test_autocast_and_vmap():
    packed, x = pack_binary_conv(torch.randn(6, 9, 3, 3)), torch.randn(3, 2, 9, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = binary_conv2d(x[0], packed, kernel_size=3)
    assert y.dtype == torch.bfloat16
    many = torch.vmap(lambda t: binary_conv2d(t, packed, kernel_size=3))(x)
    torch.testing.assert_close(many[1], binary_conv2d(x[1], packed, kernel_size=3))


PACKED = pack_binary_conv(torch.randn(6, 8, 3, 3))
X = torch.randn(1, 8, 5, 5)
UNEQUAL = pack_codes(torch.zeros(6, 72, dtype=torch.uint8), torch.rand(6, 9), bits=1, group_size=8,
                     codebook=torch.tensor([-1.0, 1.0]), format="binary")  # fmt: skip


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: binary_conv2d(torch.randn(1, 9, 5, 5), PACKED, kernel_size=3), r"x must be \(B, C, H, W\) .* C = 8; got"),
        (lambda: binary_conv2d(X.int(), PACKED, kernel_size=3), "x must be a floating-point tensor; got torch.int32"),
        (lambda: binary_conv2d(X, PACKED, kernel_size=5), r"packed must be \(O, kh \* kw \* C\) for kernel_size \(5, 5\)"),
        (lambda: binary_conv2d(X, PACKED, kernel_size=2), "packed must have groups of 18; got group_size 8"),
        (lambda: binary_conv2d(X, UNEQUAL, kernel_size=3), "one scale a row"),
        (lambda: binary_conv2d(X, PACKED, torch.randn(5), kernel_size=3), r"bias must be floating, \(6,\)"),
        (lambda: binary_conv2d(X, PACKED, stride=0, kernel_size=3), "stride must be an integer >= 1, or 2 of them; got 0"),
        (lambda: binary_conv2d(X, PACKED, padding="full", kernel_size=3), 'padding must be "same", "valid", or numbers'),
        (lambda: binary_conv2d(X, PACKED, stride=2, padding="same", kernel_size=3), 'padding="same" needs stride 1'),
        (lambda: binary_conv2d(X, PACKED, dilation=3, kernel_size=3), "the kernel spans 7 along H, .* has 5"),
        (lambda: binary_conv2d(X, PACKED, kernel_size=3, estimator="best"), "estimator must be identity"),
        (lambda: binary_conv2d(X.double(), PACKED, kernel_size=3, impl="cpu"), "float64 is none of its dtypes"),
        (lambda: binary_conv2d(pack_pixels(X), PACKED, kernel_size=3, activation_scale=True), "activation_scale belongs"),
        (lambda: binary_conv2d(PackedSigns(torch.zeros(3, 1, dtype=torch.int32), 8), PACKED, kernel_size=3), "packed x must"),
        (lambda: binary_conv2d(X.clone().requires_grad_(), PACKED, kernel_size=3, packed_output=True), "no gradient"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=f"binary_conv2d: .*{message}"):
        call()


def test_bad_packing():
    for weight in (torch.randn(3, 4), torch.full((1, 1, 1, 1), torch.nan), torch.randn(3, 0, 3, 3)):
        with pytest.raises(ValueError, match="pack_binary_conv: weight must be floating and finite"):
            pack_binary_conv(weight)
    with pytest.raises(ValueError, match=r"pack_binary_conv: scale must be \(3,\); got \(4,\)"):
        pack_binary_conv(torch.randn(3, 1, 1, 1), torch.ones(4))
    with pytest.raises(ValueError, match="pack_pixels: x must be floating"):
        pack_pixels(torch.randn(3, 4, 4))


def test_kernel_refuses_what_contradicts_itself():
    words, y, stray = pack_pixels(X).words, torch.empty(1, 6, 3, 3), PACKED.codes.clone()
    stray[0, 6] = 255
    scales = PACKED.scales[:, :1].contiguous()

    def call(words=words, codes=PACKED.codes, pixel_scale=None, kernel=(3, 3), stride=(1, 1), pad=(0, 0), y=y):
        _C.binary_conv2d_fwd(words, codes, scales, pixel_scale, None, 6, 8, *kernel, *stride, 1, 1, *pad, y)

    call()
    for change, message in [
        ({"codes": stray}, "codes must be 0 in the padding of K = 8"),
        ({"codes": PACKED.codes[:, :64].contiguous()}, "codes must be"),
        ({"words": words[:, :, :, :0].contiguous()}, "words must be"),
        ({"kernel": (0, 3)}, "kernel must be 1 to 32767; got 0, 3"),
        ({"stride": (1, 0)}, "stride and dilation must be at least 1"),
        ({"pad": (-1, 0)}, "padding must be at least 0"),
        ({"pixel_scale": torch.ones(1, 3, 4)}, "pixel_scale must be"),
        ({"y": torch.empty(1, 6, 3, 6)[..., ::2]}, "x and y must be contiguous or channels_last"),
        ({"y": torch.empty(1, 5, 3, 3)}, "y must be"),
        ({"y": torch.empty(1, 3, 3, 2, dtype=torch.int32)}, "y must be"),
    ]:
        with pytest.raises(ValueError, match=f"binary_conv2d: {message}"):
            call(**change)


def test_explain():
    assert mlcore.explain("binary_conv2d", X).chosen == "cpu"
