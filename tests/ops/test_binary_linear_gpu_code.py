"""binary_linear's CUDA kernels in the emulator and its Triton kernels in the interpreter, against int64 arithmetic and, to the
bit, the CPU's: the cases of test_binary_linear.py through the public functions, in small shapes.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_binary_linear as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore import testing
from mlcore.ops import PackedSigns, binary_linear, pack_signs
from mlcore.ops.binary_linear import _fwd, _pack
from mlcore.quant import pack

OP = "binary_linear"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"
DTYPES = [F32, F16] if gpu_code.INTERPRETING else [F32, BF16, F16]  # the interpreter computes bfloat16 wrongly
# Few rows and more, one column, parts of tiles, words that fill a copy of 16 bytes and that don't, several stages.
SHAPES = [
    (1, 1, 1),
    (1, 37, 70),
    (3, 5, 33),
    (16, 70, 513),
    (2, 1, 2500),
    (17, 33, 64),
    (70, 130, 257),
    (66, 5, 1700),
    (35, 40, 2200),
]
SOME = SHAPES[1:8:2]
if gpu_code.INTERPRETING:
    SHAPES, SOME = SHAPES[:6], SHAPES[1:6:4]


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        yield


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_interpreted_sums_are_exact(M, N, K):
    packed, w = suite.units(N, K)
    x = torch.randn(M, K)
    x[0], x[-1] = w[0], -w[0]
    assert torch.equal(binary_linear(x, packed, impl=BACKEND).long(), suite.signs(x).long() @ w.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SOME)
def test_interpreted_bits_are_the_cpus(M, N, K, dtype):
    """Scales, bias, rounding and packed results; row scales are sums in another order."""
    packed, bias, x = pack(torch.randn(N, K), "binary"), torch.randn(N), torch.randn(M, K).to(dtype)
    given = pack_signs(x, scale=True, impl="cpu")
    got = pack_signs(x, scale=True, impl=BACKEND)
    assert torch.equal(got.words, given.words)
    torch.testing.assert_close(got.scale, given.scale)
    for scale in (None, given.scale):
        signs = PackedSigns(given.words, K, scale)
        for b in (None, bias):
            want, got = (binary_linear(signs, packed, b, dtype=dtype, impl=impl) for impl in ("cpu", BACKEND))
            assert torch.equal(got, want)
            want, got = (binary_linear(signs, packed, b, packed_output=True, impl=impl) for impl in ("cpu", BACKEND))
            assert torch.equal(got.words, want.words)


def test_interpreted_bits_behind_K_do_not_count():
    packed, x = pack(torch.randn(20, 45), "binary"), torch.randn(3, 45)
    want = binary_linear(x, packed, impl=BACKEND)
    words = packed.codes.view(torch.int32).view(2, 2, 16)
    words[:, 1] |= -1 << 31  # sign 31 of the last word, whose signs end at 13
    assert torch.equal(binary_linear(x, packed, impl=BACKEND), want)


def test_interpreted_layers_stay_packed():
    suite.test_layers_stay_packed(BACKEND)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_interpreted_layouts(layout):
    suite.test_layouts(BACKEND, layout)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (0, 0, 0), (2, 3, 4, 5, 8), (5, 8)], ids=str)
def test_interpreted_empty_and_batched(shape, scaled):
    suite.test_empty_and_batched(BACKEND, shape, scaled)


def test_interpreted_nan_stays_in_its_row():
    suite.test_nan_stays_in_its_row(BACKEND)


@pytest.mark.parametrize("scaled", [False, True])
def test_interpreted_gradients_are_the_references(scaled):
    packed, results = pack(torch.randn(20, 50), "binary"), []
    x, bias, seed = torch.randn(2, 4, 50), torch.randn(20), torch.randn(2, 4, 20)
    for impl in (BACKEND, "reference"):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = binary_linear(leaves[0], packed, leaves[1], activation_scale=scaled, impl=impl)
        results.append((y, *torch.autograd.grad((y * seed).sum(), leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    def test_emulated_bits_do_not_depend_on_the_order_of_threads():
        library, outputs = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu"), []
        packed, x = pack(torch.randn(40, 700), "binary"), torch.randn(20, 700)
        for seed in range(3):
            library.set_seed(seed)
            outputs.append([binary_linear(x[:M], packed, activation_scale=True, impl="cuda") for M in (3, 20)])
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other))

    def test_emulated_op():
        packed, x = pack(torch.randn(40, 70), "binary"), torch.randn(2, 3, 70)
        words, scale = _pack(x, True, "cuda")
        testing.check_op(_pack, (x, True, "cuda"))
        for dtype in (F32, torch.int32):
            testing.check_op(_fwd, (words, packed.codes, packed.scales, scale, torch.randn(40), 40, 70, dtype, "cuda"))

    def test_emulated_odd_addresses():
        """Words and codes that 16-byte copies can't take."""
        packed, x = pack(torch.randn(20, 200), "binary"), torch.randn(5, 200)
        signs = pack_signs(x, impl="cpu")
        want = binary_linear(signs, packed, impl="cpu")
        words, codes = torch.empty(5 * 7 + 1, dtype=torch.int32), torch.empty(packed.codes.numel() + 4, dtype=torch.uint8)
        words[1:], codes[4:] = signs.words.flatten(), packed.codes.flatten()
        y, library = torch.empty(5, 20), gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu")
        args = words[1:].view(5, 7), codes[4:].view_as(packed.codes), packed.scales, None, None, 20, 200, y, None
        library.call("mlc_cuda_binary_linear_fwd", *args)
        assert torch.equal(y, want)

    def test_emulated_errors():
        library, packed = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu"), suite.PACKED
        words, y = pack_signs(torch.randn(3, 40), impl="cpu").words, torch.full((3, 6), 7.0)
        for change, message in [
            ({"words": words[:, :1].contiguous()}, "words must be"),
            ({"codes": packed.codes[:, :-1].contiguous()}, "codes must be"),
            ({"scales": packed.scales[:, :, :8].contiguous()}, "scales must be"),
            ({"row_scale": torch.ones(4)}, "row_scale must be"),
            ({"bias": torch.ones(5)}, "bias must be"),
            ({"K": 1 << 30}, "K must be below"),
            ({"N": -1}, "sizes must be at least 0"),
            ({"y": torch.empty(3, 7)}, "y must be"),
        ]:
            args = {"words": words, "codes": packed.codes, "scales": packed.scales, "row_scale": None, "bias": None}
            args |= {"N": 6, "K": 40, "y": y} | change
            with pytest.raises(ValueError, match=f"binary_linear: {message}"):
                library.call(f"mlc_cuda_{OP}_fwd", *args.values(), None)
            assert y.eq(7).all()
        with pytest.raises(ValueError, match=r"binary_linear: x must be \(M, K\)"):
            library.call(f"mlc_cuda_{OP}_pack", torch.ones(3), words, None, None)
