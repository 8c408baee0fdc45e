"""quant_linear's CUDA kernels in the emulator and its Triton kernels in the interpreter, against the reference and float64: the
cases of test_quant_linear.py through the public function, in small shapes.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_quant_linear as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore import testing
from mlcore.kernels.quant_linear.quant_linear_ref import ACTIVATIONS
from mlcore.ops import quant_linear
from mlcore.quant import pack, pack_codes

OP = "quant_linear"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND):
        monkeypatch.setattr(suite, "LEVELS", [BACKEND])
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        yield


if gpu_code.INTERPRETING:
    every = list(suite.weights(80, 0))
    SHAPES = [(1, 37, 96, 32), (3, 20, 70, None), (20, 33, 50, 7)]  # few rows with K cut, a scale a row, groups of no block
    VARIANTS = [(f, s) for f in suite.FORMATS for s in (True, False) if s or f in ("int8", "int3", "int4")]

    @pytest.mark.parametrize(("format", "symmetric"), VARIANTS)
    def test_interpreted_formats(format, symmetric):
        for number, (M, N, K, group) in enumerate(SHAPES):
            packed = pack(torch.randn(N, K), format, group_size=group, symmetric=symmetric)
            inputs = suite.make(M, N, K)
            for dynamic_int8 in (False, True):
                activation = tuple(ACTIVATIONS)[(number + dynamic_int8) % len(ACTIVATIONS)]
                args = {"packed": packed, "activation": activation, "dynamic_int8": dynamic_int8}
                want = quant_linear(**inputs, **args, impl="reference")
                got = quant_linear(**inputs, **args, impl="triton")
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("dtype", [F32, F16], ids=str)
    @pytest.mark.parametrize(("format", "group"), [("int4", 32), ("int8", None), ("nf4", 16)])
    def test_interpreted_matches_float64(format, group, dtype):
        for activation, (M, N, K) in [("gelu_tanh", (5, 24, 130)), ("silu", (33, 17, 64))]:
            packed = pack(torch.randn(N, K) * K**-0.5, format, group_size=group)
            suite.check_numerics("triton", packed, activation, suite.make(M, N, K, dtype))

    def test_interpreted_codebooks():
        """Entries that float16 can't hold, and several tables."""
        for scale in (1e-6, 1e6):
            book = torch.randn(3, 20) * scale
            packed = pack_codes(
                torch.randint(0, 20, (50, 40)), torch.full((50, 1), 1 / scale), bits=5, group_size=40, codebook=book
            )
            x = torch.randn(4, 40).half()
            for dynamic_int8 in (False, True):
                want = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl="reference")
                got = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl="triton")
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize("seed", range(2))
    def test_interpreted_integers_are_exact(seed, monkeypatch):
        """int64 is the truth, with the ends of the ranges of codes and of x among the shapes."""
        monkeypatch.setattr(suite, "weights", lambda count, seed: every[seed::24])
        suite.test_integers_are_exact_on_every_level(seed)

    @pytest.mark.parametrize("dynamic_int8", [False, True])
    @pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (2, 3, 4, 5, 8), (5, 8)], ids=str)
    def test_interpreted_empty_and_batched(shape, dynamic_int8):
        suite.test_empty_and_batched("triton", shape, dynamic_int8)

    @pytest.mark.parametrize("dynamic_int8", [False, True])
    def test_interpreted_nan_and_infinity(dynamic_int8):
        suite.test_nan_and_infinity_stay_in_their_row("triton", dynamic_int8)

    @pytest.mark.parametrize("layout", testing.LAYOUTS)
    def test_interpreted_layouts(layout):
        suite.test_layouts("triton", layout)

    def test_interpreted_gradient_goes_straight_through():
        packed, x = pack(torch.randn(6, 40), "int8"), torch.randn(3, 40, requires_grad=True)
        y = quant_linear(x, packed, dynamic_int8=True, impl="triton")
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, packed.dequantize().sum(0).expand(3, -1))


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:
    # M chooses the regime; groups that divide a tile of 64 codes, that don't, and none.
    PROBLEMS = [
        ((1, 33, 130, 32), "relu"),
        ((20, 17, 70, None), "gelu"),
        ((35, 40, 100, 9), "gelu_tanh"),
        ((70, 130, 300, 128), "silu"),
        ((3, 17, 1100, 128), None),  # more than two stages
    ]
    INTS = [(f, s) for f in suite.FORMATS[:8] for s in (True, False)] + [("ternary", True)]

    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    @pytest.mark.parametrize(("format", "symmetric"), [("int4", True), ("int4", False), ("int8", True), ("int8", False)])
    def test_emulated_matches_float64(format, symmetric, dtype):
        for (M, N, K, group), activation in PROBLEMS:
            packed = pack(torch.randn(N, K) * K**-0.5, format, group_size=group, symmetric=symmetric)
            suite.check_numerics("cuda", packed, activation, suite.make(M, N, K, dtype))

    @pytest.mark.parametrize("dynamic_int8", [False, True])
    @pytest.mark.parametrize(("format", "symmetric"), INTS)
    def test_emulated_formats(format, symmetric, dynamic_int8):
        for M, N, K, group in [(2, 37, 96, 32), (33, 20, 70, 7)]:
            packed = pack(torch.randn(N, K), format, group_size=group, symmetric=symmetric)
            inputs = suite.make(M, N, K, F16)
            want = quant_linear(**inputs, packed=packed, dynamic_int8=dynamic_int8, impl="reference")
            got = quant_linear(**inputs, packed=packed, dynamic_int8=dynamic_int8, impl="cuda")
            torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-2)

    @pytest.mark.parametrize("seed", range(2))
    def test_emulated_integers_are_exact(seed):
        """int64 is the truth: rows whose largest magnitude is 127, scales of one, and sums that float16 holds."""
        for number, (N, K, group) in enumerate(list(suite.weights(80, seed))[seed::12]):
            bits, extreme = (8, 4, 7, 2, 3, 1, 5, 6)[number % 8], number % 2
            group, top = min(group, max(K, 1)), 2**bits - 1
            x = torch.zeros(5, K)
            x[:, :1] = 127  # and up to 3 more: sums stay below 2048 steps of the scale
            x[1:, 1:4] = torch.randint(0, 2, x[1:, 1:4].shape).float() * 254 - 127
            codes = torch.randint(0, 2, (N, K)) * top if extreme else torch.randint(0, top + 1, (N, K))
            groups = -(-K // group)
            zeros = torch.randint(0, top + 1, (N, groups)) if number % 3 == 0 else None
            packed = pack_codes(codes, torch.full((N, groups), 2.0**-8), bits=bits, group_size=group, zeros=zeros)
            z = 2 ** (bits - 1) if zeros is None else zeros.repeat_interleave(group, 1)[:, :K]
            want = ((x.long() @ (codes - z).T).double() / 256).half()
            for M in (0, 1, 5):
                got = quant_linear(x[:M].half(), packed, dynamic_int8=True, impl="cuda")
                assert torch.equal(got, want[:M]), f"M, N, K = {M, N, K}, group {group}, {bits} bits"

    @pytest.mark.parametrize("dynamic_int8", [False, True])
    @pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (2, 3, 4, 5, 8), (5, 8)], ids=str)
    def test_emulated_empty_and_batched(shape, dynamic_int8):
        *lead, N, K = shape
        packed = pack(torch.randn(N, K), "int4", group_size=3)
        x = torch.randn(*lead, K, dtype=BF16, requires_grad=True)
        bias = torch.randn(N, requires_grad=True)
        args = {"dynamic_int8": dynamic_int8, "activation": "relu"}
        y = quant_linear(x, packed, bias, **args, impl="cuda")
        want = quant_linear(x, packed, bias, **args, impl="reference")
        torch.testing.assert_close(y, want, rtol=1.6e-2, atol=1e-2)
        dx, dbias = torch.autograd.grad(y.sum(), [x, bias])
        assert dx.shape == x.shape and dbias.shape == bias.shape

    @pytest.mark.parametrize("dynamic_int8", [False, True])
    def test_emulated_nan_and_infinity(dynamic_int8):
        packed, x = pack(torch.randn(40, 50), "int8", group_size=16), torch.randn(8, 50, dtype=BF16)
        x[2, 3], x[5, 49] = torch.nan, torch.inf
        got = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl="cuda")
        x[2], x[5] = 0, 0
        clean, keep = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl="cuda"), [0, 1, 3, 4, 6, 7]
        assert torch.equal(got[keep], clean[keep]) and clean[2].eq(0).all()
        assert got[2].isnan().all() and not got[5].isfinite().any()

    @pytest.mark.parametrize("layout", testing.LAYOUTS)
    def test_emulated_layouts(layout):
        packed, inputs = pack(torch.randn(40, 64), "int4", group_size=16), suite.make(6, 40, 64, F16, layout)
        got = quant_linear(**inputs, packed=packed, impl="cuda")
        assert torch.equal(got, quant_linear(**{n: t.contiguous() for n, t in inputs.items()}, packed=packed, impl="cuda"))

    def test_emulated_bits_do_not_depend_on_the_order_of_threads():
        library, outputs = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu"), []
        packed, x = pack(torch.randn(40, 300), "int4", group_size=64, symmetric=False), torch.randn(40, 300, dtype=BF16)
        for seed in range(3):
            library.set_seed(seed)
            outputs.append([quant_linear(x[:M], packed, dynamic_int8=i, impl="cuda") for M in (3, 40) for i in (False, True)])
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other))

    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("format", suite.FORMATS)
    def test_emulated_dequantize(format, dtype):
        for symmetric in (True, False) if format.startswith("int") else (True,):
            packed = pack(torch.randn(37, 70), format, group_size=13, symmetric=symmetric)
            numbers = *packed.shape, packed.bits, packed.offset, packed.group_size
            w = suite._dequantize(torch.empty(0, dtype=dtype), *suite.weight_args(packed), *numbers, "cuda")
            assert torch.equal(w, packed.dequantize(dtype))

    def test_emulated_writes_to_codes_are_seen():
        first, second = (pack(torch.randn(20, 40), "int4") for _ in range(2))
        x = torch.randn(2, 40, dtype=F16)
        quant_linear(x, first, impl="cuda")
        for name, t in first.tensors().items():
            t.copy_(second.tensors()[name])
        assert torch.equal(quant_linear(x, first, impl="cuda"), quant_linear(x, second, impl="cuda"))

    def test_emulated_errors():
        library = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu")
        x, y = torch.ones(3, 40, dtype=F16), torch.full((3, 6), 7.0, dtype=F16)
        codes, scales = torch.zeros(1, 512, dtype=torch.uint8), torch.ones(1, 1, 16)
        for change, message in [
            ({"x": x.float()}, "x must be bfloat16, float16; got float32"),
            ({"codes": codes[:, :256].contiguous()}, r"codes must be \(P, bytes of its tiles\)"),
            ({"bits": 3}, "fragments have 4 or 8 bits; got 3"),
            ({"group_size": 0}, "group_size must be at least 1; got 0"),
            ({"offset": 256}, "offset must be 0 to 255; got 256"),
            ({"codebook": torch.zeros(1, 16)}, "the CUDA kernels take no codebook"),
            ({"activation": 6}, "activation must be 0 to 5; got 6"),
        ]:
            args = {"x": x, "codes": codes, "scales": scales, "zeros": None, "codebook": None, "bias": None, "residual": None}
            args |= {"bits": 4, "offset": 8, "group_size": 40, "activation": 0, "int8": 0, "y": y} | change
            with pytest.raises(ValueError, match=f"quant_linear: {message}"):
                library.call(f"mlc_cuda_{OP}_fwd", *args.values(), None)
            assert y.eq(7).all()


@pytest.mark.skipif(gpu_code.INTERPRETING, reason="the choice is replaced there")
def test_cuda_refuses_codebooks_and_says_so(monkeypatch):
    from mlcore import _backend

    x, nf4 = torch.ones(2, 40), pack(torch.randn(6, 40), "nf4")
    assert _backend.broken_rule(OP, "cuda", x, rest=(nf4,)) == "the cuda kernels take no codebooks; the triton kernels do"
    assert _backend.broken_rule(OP, "cuda", x, rest=(pack(torch.randn(6, 40), "int4"),)) is None
    monkeypatch.setitem(_backend.REST_RULES, (OP, "cpu"), _backend.REST_RULES[OP, "cuda"])
    assert _backend.choose(OP, None, x, rest=(nf4,)) == "reference"
    assert "no codebooks" in _backend.explain(OP, x, nf4).reasons["cpu"]
    with pytest.raises(ValueError, match="can't serve this call: the cuda kernels take no codebooks"):
        _backend.choose(OP, "cpu", x, rest=(nf4,))
