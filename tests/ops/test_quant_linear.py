"""mlcore.ops.quant_linear against float64 and int64 over every implementation, format and regime."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore import _C, testing
from mlcore.kernels.quant_linear.quant_linear_ref import ACTIVATIONS
from mlcore.ops import quant_linear
from mlcore.ops.quant_linear import _dequantize, _fwd
from mlcore.quant import pack, pack_codes

CASES = [case for case in testing.cases("quant_linear", "cpu") if case[1] != torch.float64]
KERNELS = [name for name in testing.available("quant_linear", "cpu") if name != "reference"]
LEVELS = testing.ways("quant_linear", "vnni")  # without it the AVX-512 level widens
FORMATS = [f"int{b}" for b in range(1, 9)] + ["ternary", "nf4", "codebook"]


def make(M, N, K, dtype=torch.float32, layout="contiguous"):
    return {
        "x": testing.make_input(M, K, dtype=dtype, layout=layout),
        "bias": torch.randn(N),
        "residual": testing.make_input(M, N, dtype=dtype, layout=layout),
    }


def weight_args(packed):
    return packed.codes, packed.scales, packed.zeros, packed.codebook


def dense(packed, activation):
    """torch's own linear with the dequantized weight, in float32 (float64 for float64 tensors), rounded once."""

    def fn(x, bias, residual):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(x.to(wide), packed.dequantize(wide), bias.to(wide))
        return (ACTIVATIONS[activation](y) + residual.to(wide)).to(x.dtype)

    return fn


def check_numerics(impl, packed, activation, inputs):
    testing.check_numerics(
        lambda x, bias, residual: quant_linear(x, packed, bias, activation, residual=residual, impl=impl),
        dense(packed, activation),
        dense(packed, activation),
        inputs,
        terms={"0": 2.0, "x": 2.0, "bias": 2.0},
    )


PROBLEMS = [((1, 33, 70, 32), None), ((7, 40, 300, 128), "relu"), ((3, 1, 1, None), "gelu"), ((130, 65, 40, 9), "gelu_tanh")]


@pytest.mark.parametrize("problem, activation", [*PROBLEMS, ((9, 37, 50, 16), "silu"), ((5, 18, 40, None), "relu6")], ids=str)
@pytest.mark.parametrize("name, dtype", CASES)
def test_matches_float64(name, dtype, problem, activation):
    M, N, K, group = problem
    packed = pack(torch.randn(N, K) * K**-0.5, "int4", group_size=group)
    with testing.use(name) as impl:
        check_numerics(impl, packed, activation, make(M, N, K, dtype))


@pytest.mark.parametrize("format, symmetric", [(f, s) for f in FORMATS for s in (True, False) if s or f.startswith("int")])
def test_every_format(format, symmetric):
    for M, N, K, group in [(1, 131, 96, 32), (2, 20, 70, None), (4, 64, 33, 7), (5, 7, 130, 64), (14, 67, 260, 129)]:
        packed = pack(torch.randn(N, K), format, group_size=group, symmetric=symmetric)
        inputs, dense = make(M, N, K), packed.dequantize()
        numbers = N, K, packed.bits, packed.offset, packed.group_size
        for dynamic_int8 in (False, True):
            want = quant_linear(**inputs, packed=packed, dynamic_int8=dynamic_int8, impl="reference")
            for level in LEVELS:
                with testing.use(level) as impl:
                    got = quant_linear(**inputs, packed=packed, dynamic_int8=dynamic_int8, impl=impl)
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
                    assert torch.equal(_dequantize(torch.empty(0), *weight_args(packed), *numbers, impl), dense)


def weights(count, seed):
    """N, K and groups with primes, 0 and 1 in them, and groups that divide nothing."""
    rng = random.Random(seed)
    sizes = (1, 2, 3, 5, 7, 11, 13, 15, 16, 17, 23, 31, 32, 37, 63, 64, 65, 71, 97, 127, 128, 129, 131)
    yield from itertools.product((1, 2, 17, 64), (0, 1, 3, 31, 257), (1, 5, 32))
    for _ in range(count):
        yield rng.choice(sizes), rng.choice(sizes) + rng.choice((0, 0, 384)), rng.choice((1, 2, 7, 16, 32, 33, 64, 600))


@pytest.mark.parametrize("seed", range(3))
def test_integers_are_exact_on_every_level(seed):
    """int64 is the truth. Rows whose largest magnitude is 127 and scales of one leave only integers; over the three seeds
    2 100 shapes, all codes, half of them only with the ends of their ranges."""
    torch.manual_seed(seed)
    for number, (N, K, group) in enumerate(weights(80, seed)):
        bits = (8, 4, 7, 2, 3, 1, 5, 6)[(number + seed) % 8]
        extreme, top, rows = number // 8 % 2, 2**bits - 1, (0, 1, 2 + number % 3, 5 + number % 4, 10 + number % 9)
        x = torch.randint(0, 2, (rows[-1], K)) * 254 - 127 if extreme else torch.randint(-127, 128, (rows[-1], K))
        x[:, :1] = 127
        codes = torch.randint(0, 2, (N, K)) * top if extreme else torch.randint(0, top + 1, (N, K))
        group = min(group, max(K, 1))
        groups = -(-K // group)
        zeros = torch.randint(0, top + 1, (N, groups)) if number % 3 == 0 else None
        packed = pack_codes(codes, torch.ones(N, groups), bits=bits, group_size=group, zeros=zeros)
        z = 2 ** (bits - 1) if zeros is None else zeros.repeat_interleave(group, 1)[:, :K]
        want = (x @ (codes - z).T).float()
        for level in LEVELS:
            with testing.use(level) as impl:
                for M in rows:
                    got = quant_linear(x[:M].float(), packed, dynamic_int8=True, impl=impl)
                    assert torch.equal(got, want[:M]), f"{level}: M, N, K = {M, N, K}, group {group}, {bits} bits"


def test_integer_sums_do_not_overflow():
    """One group of all extremes, longer than an int32 sum may be."""
    K = 140_000
    packed = pack_codes(torch.full((3, K), 255), torch.ones(3, 1), bits=8, group_size=K, zeros=torch.zeros(3, 1).long())
    for level in LEVELS:
        with testing.use(level) as impl:
            got = quant_linear(torch.full((2, K), 127.0), packed, dynamic_int8=True, impl=impl)
        assert (got.double() - 127 * 255 * K).abs().max() <= 127 * 255 * K * 2**-23


@pytest.mark.parametrize("format, group", [("int8", None), ("int4", 32), ("int3", 20), ("ternary", None), ("nf4", 64)])
def test_levels_agree_to_the_bit(format, group):
    """The integer mode's floats too: the same roundings in the same order at every level."""
    packed, inputs = pack(torch.randn(70, 200), format, group_size=group), make(9, 70, 200)
    results = []
    for level in LEVELS:
        with testing.use(level) as impl:
            results.append(quant_linear(**inputs, packed=packed, activation="relu", dynamic_int8=True, impl=impl))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dynamic_int8", [False, True])
@pytest.mark.parametrize(
    "format, group", [("int8", None), ("int4", 32), ("int4", 200), ("int3", 33), ("int2", 64), ("nf4", 50)]
)
@pytest.mark.parametrize("level", LEVELS)
def test_a_rows_bits_depend_on_nothing_else(level, format, group, dynamic_int8):
    """Neither on how many rows there are, which is what chooses the regime, nor on the threads."""
    for symmetric in (True, False) if format.startswith("int") else (True,):
        packed = pack(torch.randn(200, 400), format, group_size=group, symmetric=symmetric)
        x = torch.randn(70, 400)
        with testing.use(level) as impl:
            whole = quant_linear(x, packed, activation="gelu", dynamic_int8=dynamic_int8, impl=impl)
            for rows in (1, 2, 3, 4, 5, 8, 64):
                part = quant_linear(x[:rows], packed, activation="gelu", dynamic_int8=dynamic_int8, impl=impl)
                assert torch.equal(part, whole[:rows]), rows
            torch.set_num_threads(1)
            alone = quant_linear(x, packed, activation="gelu", dynamic_int8=dynamic_int8, impl=impl)
            torch.set_num_threads(2)
        assert torch.equal(alone, whole)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_layouts(level, layout):
    packed, inputs = pack(torch.randn(40, 50), "int4", group_size=16), make(6, 40, 50, layout=layout)
    with testing.use(level) as impl:
        got = quant_linear(**inputs, packed=packed, impl=impl)
        want = quant_linear(**{n: t.contiguous() for n, t in inputs.items()}, packed=packed, impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dynamic_int8", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (0, 0, 0), (2, 3, 4, 5, 8), (5, 8)], ids=str)
@pytest.mark.parametrize("name", testing.available("quant_linear", "cpu"))
def test_empty_and_batched(name, shape, dynamic_int8):
    *lead, N, K = shape
    packed = pack(torch.randn(N, K), "int4", group_size=3)
    x, bias = torch.randn(*lead, K, requires_grad=True), torch.randn(N, requires_grad=True)
    with testing.use(name) as impl:
        y = quant_linear(x, packed, bias, "relu", dynamic_int8=dynamic_int8, impl=impl)
        assert y.shape == (*lead, N)
        if K == 0:
            assert torch.equal(y, bias.relu().expand_as(y))
        dx, dbias = torch.autograd.grad(y.sum(), [x, bias])
    assert dx.shape == x.shape and dbias.shape == bias.shape


@pytest.mark.parametrize("dynamic_int8", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_nan_and_infinity_stay_in_their_row(level, dynamic_int8):
    packed, x = pack(torch.randn(40, 50), "int4", group_size=16), torch.randn(8, 50)
    x[2, 3], x[5, 49], x[6, 0] = torch.nan, torch.inf, 3e38
    with testing.use(level) as impl:
        got = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl=impl)
        x[2], x[5] = 0, 0
        clean = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl=impl)
    keep = [0, 1, 3, 4, 6, 7]
    assert torch.equal(got[keep], clean[keep])
    assert got[2].isnan().all() and not got[5].isfinite().any()
    assert torch.equal(clean[2], torch.zeros(40))


@pytest.mark.parametrize("entries, tables", [(2, 1), (16, 3), (16, 50), (20, 1), (20, 3), (256, 3)])
def test_codebooks_of_several_tables(entries, tables):
    x, packed = torch.randn(9, 60), pack(torch.randn(50, 60), "codebook", entries=entries, tables=tables)
    for dynamic_int8 in (False, True):
        want = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl="reference")
        for level in LEVELS:
            with testing.use(level) as impl:
                got = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl=impl)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dynamic_int8", [0, 1])
def test_op(dynamic_int8):
    for packed in (pack(torch.randn(5, 40), "int4", group_size=16, symmetric=False), pack(torch.randn(5, 40), "nf4")):
        numbers = packed.bits, packed.offset, packed.group_size
        x, bias, residual = torch.randn(2, 3, 40), torch.randn(5), torch.randn(2, 3, 5)
        testing.check_op(_fwd, (x, *weight_args(packed), bias, residual, 5, *numbers, 2, dynamic_int8, "cpu"))
        testing.check_op(_dequantize, (x, *weight_args(packed), 5, 40, *numbers, "cpu"))


@pytest.mark.graph
@pytest.mark.parametrize("dynamic_int8", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_compile_and_export(activation, dynamic_int8):
    packed = pack(torch.randn(6, 40), "int4", group_size=16)

    def fn(x, bias, residual):
        return quant_linear(x, packed, bias, activation, residual=residual, dynamic_int8=dynamic_int8)

    def args(M):
        return torch.randn(M, 40, requires_grad=True), torch.randn(6, requires_grad=True), torch.randn(M, 6)

    testing.check_public(fn, args(7), args(9))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradcheck(activation):
    packed = pack(torch.randn(3, 5), "int4", group_size=2)
    leaves = [t.double().requires_grad_() for t in (torch.randn(2, 5), torch.randn(3), torch.randn(2, 3))]

    def fn(x, bias, residual):
        return quant_linear(x, packed, bias, activation, residual=residual)

    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("level", LEVELS)
def test_gelu_is_accurate_everywhere(level):
    """Against float64 with a weight of one: between the pieces of its table, in both tails, and where they end."""
    one = pack_codes(torch.tensor([[9]]), torch.ones(1, 1), bits=4, group_size=1)
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 0.0, 1e-30, -1e-30])
    x = torch.cat([torch.linspace(-9, 9, 40_000), torch.arange(-30, 31) * 0.2, ends])[:, None]
    with testing.use(level) as impl:
        got = quant_linear(x, one, activation="gelu", impl=impl).double()
    want = F.gelu(x.double())
    want[x == -torch.inf] = 0
    torch.testing.assert_close(got, want, rtol=4e-7, atol=3e-7, equal_nan=True)
    near = (x > -2) & x.isfinite()
    torch.testing.assert_close(got[near], want[near], rtol=1e-6, atol=0)
    assert (got[x < -12].abs() < 1e-15).all()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_second_derivatives_of_the_kernels(activation):
    packed, results = pack(torch.randn(6, 40), "int4", group_size=16), []
    x, seed = torch.randn(3, 40), torch.randn(3, 40)
    for impl in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(quant_linear(leaf, packed, activation=activation, impl=impl).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((dx * seed).sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_gradient_of_the_integer_mode_goes_straight_through():
    packed, x = pack(torch.randn(6, 40), "int8"), torch.randn(3, 40)
    grads = []
    for impl in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        y = quant_linear(leaf, packed, dynamic_int8=True, impl=impl)
        grads.append(torch.autograd.grad(y.sum(), leaf)[0])
        torch.testing.assert_close(grads[-1], packed.dequantize().sum(0).expand(3, -1))
    torch.testing.assert_close(*grads)


def test_autocast():
    packed, x = pack(torch.randn(6, 40), "int4"), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = quant_linear(x, packed)
    assert y.dtype == torch.bfloat16 and torch.equal(y, quant_linear(x.bfloat16(), packed))


def test_vmap_takes_the_reference():
    packed, x = pack(torch.randn(6, 40), "int4"), torch.randn(3, 2, 40)
    torch.testing.assert_close(torch.vmap(lambda t: quant_linear(t, packed))(x), quant_linear(x, packed))
    with pytest.raises(ValueError, match=r"can't serve torch\.func"):
        torch.vmap(lambda t: quant_linear(t, packed, impl="cpu"))(x)


PACKED = pack(torch.randn(6, 40), "int4", group_size=16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quant_linear(torch.randn(3, 41), PACKED), r"x must be \(..., K\) with the weight's K = 40; got \(3, 41\)"),
        (lambda: quant_linear(torch.ones(3, 40).int(), PACKED), "x must be a floating-point tensor; got torch.int32"),
        (lambda: quant_linear(torch.randn(3, 40), PACKED, torch.randn(5)), r"bias must be floating, \(6,\)"),
        (lambda: quant_linear(torch.randn(3, 40), PACKED, activation="tanh"), "activation must be None, relu, .*; got 'tanh'"),
        (lambda: quant_linear(torch.randn(3, 40), PACKED, residual=torch.randn(3, 5)), r"residual must be .* \(3, 6\)"),
        (lambda: quant_linear(torch.randn(3, 40).double(), PACKED, impl="cpu"), "float64 is none of its dtypes"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=f"quant_linear: .*{message}"):
        call()


def test_kernel_refuses_what_contradicts_itself():
    x, y = torch.randn(3, 40), torch.empty(3, 6)
    good = {"codes": PACKED.codes, "scales": PACKED.scales, "zeros": None, "codebook": None, "bits": 4, "offset": 8}
    good["group_size"] = 16

    def call(**change):
        args = good | change
        weight = [args[n] for n in ("codes", "scales", "zeros", "codebook")]
        numbers = [args[n] for n in ("bits", "offset", "group_size")]
        _C.quant_linear_fwd(x, *weight, None, None, *numbers, 0, 0, y)

    call()
    for change, message in [
        ({"codes": PACKED.codes[:, :-1].contiguous()}, "codes must be"),
        ({"scales": PACKED.scales[:, :2].contiguous()}, "scales must be"),
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        ({"bits": 5}, "codes must be"),
        ({"group_size": 0}, "group_size must be at least 1; got 0"),
        ({"offset": 256}, "offset must be 0 to 255; got 256"),
        ({"codebook": torch.zeros(1, 8)}, "codebook must be"),
        (
            {"codebook": torch.zeros(1, 16), "zeros": torch.zeros_like(PACKED.scales).byte()},
            "zeros and codebook exclude each other",
        ),
    ]:
        with pytest.raises(ValueError, match=f"quant_linear: {message}"):
            call(**change)


def test_explain():
    assert mlcore.explain("quant_linear", torch.randn(3, 40)).chosen == "cpu"
