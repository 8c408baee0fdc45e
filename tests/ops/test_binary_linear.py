"""binary_linear against int64 arithmetic and float64, on every implementation; its gradients against the reference's."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from binary_suite import LEVELS, WAYS, signs

import mlcore
from mlcore import _C, testing
from mlcore.ops import PackedSigns, binarize, binary_linear, pack_signs, unpack_signs
from mlcore.ops.binary_linear import _fwd, _pack
from mlcore.quant import pack, pack_codes


def units(N, K):
    """A weight of signs with scale 1, and the signs."""
    w = torch.randint(0, 2, (N, K)) * 2 - 1
    codebook = torch.tensor([-1.0, 1.0])
    packed = pack_codes(
        (w + 1) // 2, torch.ones(N, 1 if K else 0), bits=1, group_size=max(K, 1), codebook=codebook, format="binary"
    )
    return packed, w


def weights(count):
    """N and K: none, one, primes, around what words, panels and tiles hold, and several blocks of counters."""
    rng = random.Random(0)
    sizes = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 32, 33, 37, 61, 63, 64, 65, 67, 97, 101, 127, 128, 131, 139)
    yield from itertools.product((0, 1, 2, 16, 17, 64, 67), (0, 1, 2, 31, 32, 33, 257))
    for _ in range(count):
        yield rng.choice(sizes), rng.choice(sizes) + rng.choice((0, 0, 0, 0, 0, 0, 997, 1999))


def test_exact_for_many_shapes():
    """Sums equal int64 arithmetic: 2 160 shapes on every way, with all-equal and all-different rows among them."""
    for number, (N, K) in enumerate(weights(311)):
        rows = 0, 1, 2, 3 + number % 4, 7 + number % 7, 14 + number % 10
        packed, w = units(N, K)
        x = torch.randn(rows[-1], K)
        if N:
            x[0], x[1] = w[0], -w[-1]
        want = (signs(x).long() @ w.T).float()
        for name in WAYS:
            with testing.use(name) as impl:
                for M in rows:
                    assert torch.equal(binary_linear(x[:M], packed, impl=impl), want[:M]), (name, M, N, K)


@pytest.mark.parametrize("name", WAYS)
def test_exact_where_bytes_would_overflow(name):
    """All bits differ, over more words than a byte can count."""
    K, N = 70_001, 70
    packed = pack(torch.ones(N, K), "binary")
    with testing.use(name) as impl:
        assert torch.equal(binary_linear(-torch.ones(7, K), packed, impl=impl), torch.full((7, N), -float(K)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("M, N, K", [(5, 70, 100), (1, 17, 33), (9, 64, 256)])
@pytest.mark.parametrize("name, dtype", testing.cases("binary_linear"))
def test_matches_float64(name, dtype, M, N, K, scaled):
    packed = pack(torch.randn(N, K), "binary")
    dense = packed.dequantize(torch.float64)

    def truth(x, bias):
        y = binarize(x) @ dense.to(x.dtype).T
        return (y * x.abs().mean(-1, keepdim=True) if scaled else y) + bias

    def ours(x, bias):
        with testing.use(name) as impl:
            return binary_linear(x, packed, bias, activation_scale=scaled, impl=impl)

    inputs = {"x": testing.make_input(M, K, dtype=dtype), "bias": testing.make_input(N, dtype=dtype)}
    testing.check_numerics(ours, truth, truth, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ways_agree_to_the_bit(dtype):
    packed, x, bias = pack(torch.randn(150, 300), "binary"), torch.randn(19, 300).to(dtype), torch.randn(150)
    results = []
    for name in [*WAYS, "reference"]:
        with testing.use(name) as impl:
            results.append(binary_linear(x, packed, bias, impl=impl))
            torch.set_num_threads(1)
            results.append(binary_linear(x, packed, bias, impl=impl))
            torch.set_num_threads(2)
            results += [binary_linear(x[:rows], packed, bias, impl=impl) for rows in (1, 6, 7)]
    assert all(torch.equal(r, results[0][: len(r)]) for r in results)


@pytest.mark.parametrize("name", [*WAYS, "reference"])
def test_layers_stay_packed(name):
    """Packed in, packed out: the same as signs of a float result, which the next layer takes."""
    first, second = pack(torch.randn(75, 133), "binary"), pack(torch.randn(20, 75), "binary")
    x, bias = torch.randn(2, 11, 133), torch.randn(75)
    with testing.use(name) as impl:
        packed = pack_signs(x, scale=True, impl=impl)
        assert torch.equal(unpack_signs(packed), signs(x).float())
        torch.testing.assert_close(packed.scale, x.abs().mean(-1))
        assert torch.equal(packed.words, pack_signs(x, impl="reference").words)
        hidden = binary_linear(packed, first, bias, impl=impl)
        assert torch.equal(hidden, binary_linear(x, first, bias, activation_scale=True, impl=impl))
        bits = binary_linear(packed, first, bias, packed_output=True, impl=impl)
        assert bits.features == 75 and torch.equal(unpack_signs(bits), signs(hidden).float())
        assert torch.equal(binary_linear(bits, second, impl=impl), binary_linear(hidden, second, impl=impl))
        low = binary_linear(bits, second, dtype=torch.float16, impl=impl)
        assert torch.equal(low, binary_linear(hidden, second, impl=impl).half())


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("name", LEVELS)
def test_layouts(name, layout):
    packed, x = pack(torch.randn(40, 50), "binary"), testing.make_input(6, 50, layout=layout)
    with testing.use(name) as impl:
        got = binary_linear(x, packed, activation_scale=True, impl=impl)
        assert torch.equal(got, binary_linear(x.contiguous(), packed, activation_scale=True, impl=impl))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (0, 0, 0), (2, 3, 4, 5, 8), (5, 8)], ids=str)
@pytest.mark.parametrize("name", testing.available("binary_linear"))
def test_empty_and_batched(name, shape, scaled):
    *lead, N, K = shape
    packed = pack(torch.randn(N, K), "binary") if K else units(N, 0)[0]
    x, bias = torch.randn(*lead, K, requires_grad=True), torch.randn(N, requires_grad=True)
    with testing.use(name) as impl:
        y = binary_linear(x, packed, bias, activation_scale=scaled, impl=impl)
        assert y.shape == (*lead, N)
        if K == 0:
            assert torch.equal(y, bias.expand_as(y))
        dx, dbias = torch.autograd.grad(y.sum(), [x, bias])
        bits = binary_linear(x.detach(), packed, packed_output=True, impl=impl)
    assert dx.shape == x.shape and dbias.shape == bias.shape and bits.words.shape == (*lead, -(-N // 32))


@pytest.mark.parametrize("name", [*WAYS, "reference"])
def test_nan_stays_in_its_row(name):
    packed, x = pack(torch.randn(40, 50), "binary"), torch.randn(8, 50)
    x[2, 3], x[5, 49], x[6, 0] = torch.nan, -torch.inf, -0.0
    with testing.use(name) as impl:
        plain, scaled = (binary_linear(x, packed, activation_scale=s, impl=impl) for s in (False, True))
        want = signs(x).float() @ packed.dequantize().T
    torch.testing.assert_close(plain, want)  # NaN and -0 count as +1
    assert scaled[2].isnan().all() and not scaled[5].isfinite().any()
    assert scaled[[0, 1, 3, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("estimator", ["identity", "clipped", "approx", "swish"])
def test_gradients_are_the_references(estimator, scaled):
    packed, seed, results = pack(torch.randn(20, 50), "binary"), torch.randn(2, 4, 20), []
    x, bias, other = torch.randn(2, 4, 50), torch.randn(20), torch.randn(2, 4, 50)
    for impl in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = binary_linear(leaves[0], packed, leaves[1], activation_scale=scaled, estimator=estimator, impl=impl)
        grads = torch.autograd.grad((y * seed).sum(), leaves, create_graph=True)
        second = torch.autograd.grad((grads[0] * other).sum(), leaves[0]) if estimator in ("approx", "swish") else ()
        results.append((y, *grads, *second))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_op():
    packed, x = pack(torch.randn(40, 70), "binary"), torch.randn(2, 3, 70)
    words, scale = _pack(x, True, "cpu")
    for scaled in (True, False):
        testing.check_op(_pack, (x, scaled, "cpu"))
    for dtype in (torch.float32, torch.int32, torch.bfloat16):
        testing.check_op(_fwd, (words, packed.codes, packed.scales, scale, torch.randn(40), 40, 70, dtype, "cpu"))


@pytest.mark.parametrize("scaled", [False, True])
def test_compile_and_export(scaled):
    packed = pack(torch.randn(40, 70), "binary")

    def fn(x, bias):
        return binary_linear(x, packed, bias, activation_scale=scaled)

    def args(M):
        return torch.randn(M, 70, requires_grad=True), torch.randn(40, requires_grad=True)

    testing.check_public(fn, args(7), args(9))

    def chain(x):
        return binary_linear(binary_linear(x, packed, packed_output=True), pack_of_40)

    pack_of_40 = pack(torch.randn(12, 40), "binary")
    testing.check_public(chain, (torch.randn(7, 70),), (torch.randn(9, 70),))


def test_autocast_and_vmap():
    packed, x = pack(torch.randn(6, 40), "binary"), torch.randn(3, 2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = binary_linear(x, packed)
    assert y.dtype == torch.bfloat16 and torch.equal(y, binary_linear(x.bfloat16(), packed))
    torch.testing.assert_close(torch.vmap(lambda t: binary_linear(t, packed))(x), binary_linear(x, packed))
    with pytest.raises(ValueError, match=r"can't serve torch\.func"):
        torch.vmap(lambda t: binary_linear(t, packed, impl="cpu"))(x)


PACKED = pack(torch.randn(6, 40), "binary")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: binary_linear(torch.randn(3, 41), PACKED), r"x must be \(..., K\) with the weight's K = 40; got \(3, 41\)"),
        (lambda: binary_linear(torch.ones(3, 40).int(), PACKED), "x must be a floating-point tensor; got torch.int32"),
        (lambda: binary_linear(pack_signs(torch.randn(3, 41)), PACKED), "x must have the weight's K = 40 features; got 41"),
        (lambda: binary_linear(pack_signs(torch.randn(3, 40)), PACKED, activation_scale=True), "activation_scale belongs to"),
        (lambda: binary_linear(torch.randn(3, 40), PACKED, torch.randn(5)), r"bias must be floating, \(6,\)"),
        (lambda: binary_linear(torch.randn(3, 40), PACKED, estimator="best"), "estimator must be identity, .*; got 'best'"),
        (lambda: binary_linear(torch.randn(3, 40), PACKED, dtype=torch.int32), "dtype must be None, or"),
        (lambda: binary_linear(torch.randn(3, 40), PACKED, dtype=torch.float32, packed_output=True), "dtype must be None, or"),
        (lambda: binary_linear(torch.randn(3, 40, requires_grad=True), PACKED, packed_output=True), "no gradient"),
        (lambda: binary_linear(torch.randn(3, 40), pack(torch.randn(6, 40), "int4")), "format 'binary'"),
        (lambda: binary_linear(torch.randn(3, 40), pack(torch.randn(6, 40), "binary", group_size=8)), "groups of 40; got"),
        (lambda: binary_linear(torch.randn(3, 40).double(), PACKED, impl="cpu"), "float64 is none of its dtypes"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=f"binary_linear: .*{message}"):
        call()


def test_packed_signs_hold_what_they_say():
    with pytest.raises(ValueError, match=r"PackedSigns: words must be int32 \(..., 2\) for 40 features"):
        PackedSigns(torch.zeros(3, 1, dtype=torch.int32), 40)
    with pytest.raises(ValueError, match=r"PackedSigns: scale must be torch.float32 \(3,\)"):
        PackedSigns(torch.zeros(3, 2, dtype=torch.int32), 40, torch.ones(2))
    with pytest.raises(ValueError, match=r"pack_signs: x must be floating"):
        pack_signs(torch.ones(3).int())


def test_kernel_refuses_what_contradicts_itself():
    words, y = pack_signs(torch.randn(3, 40)).words, torch.empty(3, 6)
    stray = PACKED.codes.clone()
    stray[0, 127] = 255

    def call(words=words, codes=PACKED.codes, scales=PACKED.scales, row_scale=None, bias=None, N=6, K=40, y=y):
        _C.binary_linear_fwd(words, codes, scales, row_scale, bias, N, K, y)

    call()
    for change, message in [
        ({"words": words[:, :1].contiguous()}, "words must be"),
        ({"codes": PACKED.codes[:, :-1].contiguous()}, "codes must be"),
        ({"codes": stray}, "codes must be 0 in the padding of K = 40"),
        ({"scales": PACKED.scales[:, :, :8].contiguous()}, "scales must be"),
        ({"row_scale": torch.ones(4)}, "row_scale must be"),
        ({"bias": torch.ones(5)}, "bias must be"),
        ({"K": 70}, "codes must be"),
        ({"N": -1}, "sizes must be at least 0"),
        ({"y": torch.empty(3, 7)}, "y must be"),
        ({"y": torch.empty(3, 2, dtype=torch.int32)}, "y must be"),
    ]:
        with pytest.raises(ValueError, match=f"binary_linear: {message}"):
            call(**change)


def test_explain():
    assert mlcore.explain("binary_linear", torch.randn(3, 40)).chosen == "cpu"
