"""binary_linear and binary_conv2d on a GPU: the CUDA and Triton kernels give the CPU's bits, also in sizes of real models."""

from __future__ import annotations

import pytest
import test_binary_conv2d as conv_suite
import torch
from gpu_code import BF16, F16, F32

from mlcore import explain
from mlcore.ops import PackedSigns, binary_conv2d, binary_linear, pack_binary_conv, pack_pixels, pack_signs
from mlcore.quant import pack

BACKENDS = [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"]
LINEARS = [(1, 1, 1), (1, 37, 70), (3, 5, 33), (16, 130, 513), (33, 64, 256), (70, 130, 1700), (0, 3, 8), (3, 0, 8), (3, 5, 0)]
LARGE = [(1, 4096, 4096), (16, 1040, 11008), (300, 4096, 2880), (2048, 1024, 4096)]


def on_gpu(signs):
    return PackedSigns(signs.words.cuda(), signs.features, None if signs.scale is None else signs.scale.cuda())


def check_linear(backend, M, N, K, dtype):
    packed = pack(torch.randn(N, K), "binary") if K else without_columns(N)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N)
    there, given = packed.to("cuda"), pack_signs(x, scale=True)
    got = pack_signs(x.cuda(), scale=True, impl=backend)
    assert torch.equal(got.words.cpu(), given.words)
    torch.testing.assert_close(got.scale.cpu(), given.scale)
    for args in ({"dtype": dtype}, {"packed_output": True}):
        want = binary_linear(given, packed, bias, **args)
        got = binary_linear(on_gpu(given), there, bias.cuda(), **args, impl=backend)
        assert torch.equal(getattr(got, "words", got).cpu(), getattr(want, "words", want))
    assert torch.equal(binary_linear(x.cuda(), there, impl=backend).cpu(), binary_linear(x, packed))


def without_columns(N):
    """A weight without columns."""
    from test_binary_linear import units

    return units(N, 0)[0]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_bits_are_the_cpus(backend, dtype):
    for M, N, K in LINEARS:
        check_linear(backend, M, N, K, dtype)


@pytest.mark.parametrize(("M", "N", "K"), LARGE)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large_linear(backend, M, N, K):
    check_linear(backend, M, N, K, F32)


def check_conv(backend, shape, last, dtype=F32):
    B, C, O, H, W, kernel, *geometry = shape
    x, bias = conv_suite.image(B, C, H, W, last=last).to(dtype), torch.randn(O)
    packed = pack_binary_conv(torch.randn(O, C, *kernel))
    there, args = packed.to("cuda"), {"kernel_size": kernel}
    given, got = pack_pixels(x), pack_pixels(x.cuda(), scale=True, impl=backend)
    assert torch.equal(got.words.cpu(), given.words)
    want = binary_conv2d(x, packed, bias, *geometry, **args)
    got = binary_conv2d(x.cuda(), there, bias.cuda(), *geometry, **args, impl=backend)
    assert torch.equal(got.cpu(), want) and got.stride() == want.stride()
    want = binary_conv2d(given, packed, bias, *geometry, **args, packed_output=True)
    got = binary_conv2d(on_gpu(given), there, bias.cuda(), *geometry, **args, packed_output=True, impl=backend)
    assert torch.equal(got.words.cpu(), want.words)
    scaled, want = (
        binary_conv2d(t, w, None, *geometry, **args, activation_scale=True, impl=i)
        for t, w, i in ((x.cuda(), there, backend), (x, packed, "cpu"))
    )
    torch.testing.assert_close(scaled.cpu(), want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_bits_are_the_cpus(backend, last, dtype):
    for shape in conv_suite.SHAPES:
        check_conv(backend, shape, last, dtype)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large_conv(backend, last):
    check_conv(backend, (2, 256, 256, 56, 56, (3, 3), 1, 1, 1), last)
    check_conv(backend, (8, 64, 128, 28, 29, (3, 3), 2, 1, 1), last)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gradients_and_layers(backend):
    packed, x = pack(torch.randn(70, 200), "binary").to("cuda"), torch.randn(9, 200, device="cuda")
    grads = []
    for impl in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(binary_linear(leaf, packed, activation_scale=True, impl=impl).square().sum(), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-3)
    second = pack(torch.randn(12, 70), "binary").to("cuda")
    bits = binary_linear(x, packed, packed_output=True, impl=backend)
    hidden = binary_linear(x, packed, impl=backend)
    assert torch.equal(binary_linear(bits, second, impl=backend), binary_linear(hidden, second, impl=backend))


def test_the_choice_is_explained():
    assert explain("binary_linear", torch.randn(2, 40, device="cuda")).chosen == "cuda"
    assert explain("binary_conv2d", torch.randn(1, 3, 4, 4, device="cuda", dtype=BF16)).chosen == "cuda"
