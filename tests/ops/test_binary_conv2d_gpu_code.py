"""binary_conv2d's CUDA kernels in the emulator and its Triton kernels in the interpreter, against torch's convolution of signs
and, to the bit, the CPU's: the cases of test_binary_conv2d.py through the public functions.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_binary_conv2d as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore.ops import PackedSigns, binary_conv2d, pack_binary_conv, pack_pixels
from mlcore.ops.binary_conv2d import _fwd, _pack

OP = "binary_conv2d"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"
DTYPES = [F32, F16] if gpu_code.INTERPRETING else [F32, BF16, F16]  # the interpreter computes bfloat16 wrongly
# The last ones: words that fill a copy of 16 bytes, and those of a tap that end a step.
SHAPES = [*suite.SHAPES, (1, 160, 20, 5, 4, (3, 2), 1, 1, 1), (1, 128, 5, 4, 3, (3, 3), 1, 2, 1)]
if gpu_code.INTERPRETING:
    SHAPES = [shape for shape in SHAPES if shape[1] * shape[3] * shape[4] < 3000]


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        yield


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_sums_are_exact(shape, last):
    suite.test_exact(BACKEND, shape, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_interpreted_bits_are_the_cpus(last, dtype):
    """Scales, bias, rounding, layouts and packed results; pixel scales are sums in another order."""
    packed, bias, where = pack_binary_conv(torch.randn(70, 37, 3, 2)), torch.randn(70), ((2, 1), (1, 2), (1, 2))
    x = suite.image(2, 37, 7, 6, last=last).to(dtype)
    given, got = (pack_pixels(x, scale=True, impl=impl) for impl in ("cpu", BACKEND))
    assert torch.equal(got.words, given.words)
    torch.testing.assert_close(got.scale, given.scale)
    want, got = (binary_conv2d(x, packed, bias, *where, kernel_size=(3, 2), impl=i) for i in ("cpu", BACKEND))
    assert torch.equal(got, want) and got.stride() == want.stride()
    for scale in (None, given.scale):
        signs = PackedSigns(given.words, 37, scale)
        how = {"kernel_size": (3, 2)}
        want, got = (binary_conv2d(signs, packed, bias, *where, **how, dtype=dtype, impl=i) for i in ("cpu", BACKEND))
        assert torch.equal(got, want)
        want, got = (binary_conv2d(signs, packed, bias, *where, **how, packed_output=True, impl=i) for i in ("cpu", BACKEND))
        assert torch.equal(got.words, want.words)


def test_interpreted_padding_is_no_sign():
    suite.test_padding_is_no_sign(BACKEND)


def test_interpreted_bits_behind_C_do_not_count():
    packed, x = pack_binary_conv(torch.randn(20, 13, 3, 3)), torch.randn(1, 13, 4, 5)
    want = binary_conv2d(x, packed, padding=1, kernel_size=3, impl=BACKEND)
    packed.codes.view(torch.int32).bitwise_or_(-1 << 31)  # sign 31 of each word, whose signs end at 13
    assert torch.equal(binary_conv2d(x, packed, padding=1, kernel_size=3, impl=BACKEND), want)


@pytest.mark.parametrize("last", [False] if gpu_code.INTERPRETING else [False, True])
def test_interpreted_layers_stay_packed(last):
    suite.test_layers_stay_packed(BACKEND, last)


@pytest.mark.parametrize("scaled", [False, True])
def test_interpreted_empty_and_unbatched(scaled):
    suite.test_empty_and_unbatched(BACKEND, scaled)


def test_interpreted_nan_stays_in_its_windows():
    suite.test_nan_stays_in_its_windows(BACKEND)


@pytest.mark.parametrize("scaled", [False, True])
def test_interpreted_gradients_are_the_references(scaled):
    packed, results = pack_binary_conv(torch.randn(20, 9, 3, 2)), []
    x, bias, where = torch.randn(2, 9, 5, 6), torch.randn(20), ((2, 1), (1, 0), (1, 2))
    for impl in (BACKEND, "reference"):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = binary_conv2d(leaves[0], packed, leaves[1], *where, kernel_size=(3, 2), activation_scale=scaled, impl=impl)
        seed = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append((y, *torch.autograd.grad((y * seed).sum(), leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    def test_emulated_bits_do_not_depend_on_the_order_of_threads():
        library, outputs = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu"), []
        packed, x = pack_binary_conv(torch.randn(40, 37, 3, 3)), torch.randn(1, 37, 5, 5)
        for seed in range(3):
            library.set_seed(seed)
            outputs.append(binary_conv2d(x, packed, padding=1, kernel_size=3, activation_scale=True, impl="cuda"))
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])

    def test_emulated_op():
        packed, x = pack_binary_conv(torch.randn(20, 9, 3, 2)), torch.randn(2, 9, 4, 5)
        words, _ = _pack(x, True, "cuda")
        suite.testing.check_op(_pack, (x, True, "cuda"))
        numbers = 20, 9, (3, 2), (1, 1), (1, 1), (1, 1, 0, 1)
        for dtype in (F32, torch.int32):
            args = words, packed.codes, packed.scales, torch.rand(2, 4, 5), torch.randn(20), *numbers, dtype, False, "cuda"
            suite.testing.check_op(_fwd, args)

    def test_emulated_long_sums_are_cut():
        """Few tiles of many words: their warps count slices of K."""
        suite.test_exact("cuda", (1, 260, 20, 7, 7, (3, 3), 1, 1, 1), False)

    def test_emulated_errors():
        library, packed, y = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu"), suite.PACKED, torch.full((1, 6, 3, 3), 7.0)
        words, scales = pack_pixels(suite.X, impl="cpu").words, packed.scales[:, :1].contiguous()
        for change, message in [
            ({"codes": packed.codes[:, :64].contiguous()}, "codes must be"),
            ({"words": words[:, :, :, :0].contiguous()}, "words must be"),
            ({"kh": 0}, "kernel must be 1 to 32767; got 0, 3"),
            ({"sw": 0}, "stride and dilation must be at least 1"),
            ({"ph": -1}, "padding must be at least 0"),
            ({"pixel_scale": torch.ones(1, 3, 4)}, "pixel_scale must be"),
            ({"y": torch.empty(1, 6, 3, 6)[..., ::2]}, "x and y must be contiguous or channels_last"),
            ({"y": torch.empty(1, 5, 3, 3)}, "y must be"),
        ]:
            args = {"words": words, "codes": packed.codes, "scales": scales, "pixel_scale": None, "bias": None, "O": 6, "C": 8}
            args |= {"kh": 3, "kw": 3, "sh": 1, "sw": 1, "dh": 1, "dw": 1, "ph": 0, "pw": 0, "y": y} | change
            with pytest.raises(ValueError, match=f"binary_conv2d: {message}"):
                library.call(f"mlc_cuda_{OP}_fwd", *args.values(), None)
            assert y.eq(7).all()
        with pytest.raises(ValueError, match=r"binary_conv2d: x must be \(B, C, H, W\)"):
            library.call(f"mlc_cuda_{OP}_pack", torch.ones(3), words, None, None)
