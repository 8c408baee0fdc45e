"""mlcore.ops.attention against float64, over every implementation on this machine, at odd shapes, with every argument."""

from __future__ import annotations

import pytest
import torch
from attention_suite import check, math_path, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import mlcore
from mlcore import _C, testing
from mlcore.kernels.attention import attention_ref
from mlcore.ops import attention
from mlcore.ops.attention import _bwd, _fwd
from mlcore.patterns import Causal, Dense

CASES = [case for case in testing.cases("attention") if case[1] != torch.float64]  # that one is the truth itself
KERNELS = [name for name in testing.available("attention") if name != "reference"]
# (B, H, Hkv, Tq, Tk, D, Dv)
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 1, 239, 32, 32),
    (1, 2, 1, 3, 799, 40, 59),
    (2, 4, 2, 127, 130, 64, 64),
    (1, 2, 2, 239, 1, 16, 8),
    (1, 4, 1, 113, 203, 80, 96),
    (1, 2, 2, 200, 65, 111, 128),
    (1, 1, 1, 70, 129, 256, 256),
]
SMALL = (2, 4, 2, 70, 131, 40, 33)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(name, dtype, causal, shape):
    check(name, qkv(shape, dtype), causal=causal)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("bias_shape", [(2, 4, 70, 131), (1, 1, 70, 131), (2, 1, 1, 131), (1, 4, 70, 1), (131,)], ids=str)
def test_bias_and_its_gradient(name, dtype, bias_shape):
    inputs = qkv(SMALL, dtype)
    check(name, {**inputs, "bias": testing.make_input(*bias_shape, dtype=dtype)})


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(2, 4, 70, 131), (2, 1, 1, 131), (70, 131), (1, 4, 70, 1)], ids=str)
def test_pattern_with_unseen_rows(name, dtype, shape):
    pattern = torch.rand(shape) > 0.5
    pattern[..., -1:, : shape[-1] - 1] = False
    if pattern.dim() == 4 and shape[-2] > 1:
        pattern[:, :, 5:9] = False
    check(name, qkv(SMALL, dtype), pattern=pattern)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_everything_at_once(name, dtype):
    inputs = {**qkv(SMALL, dtype), "bias": testing.make_input(2, 1, 70, 131, dtype=dtype)}
    check(name, inputs, pattern=torch.rand(2, 4, 70, 131) > 0.3, causal=True, softcap=2.5, scale=0.3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
def test_any_strides(name, layout):
    check(name, qkv(SMALL, layout=layout), causal=True)


@pytest.mark.parametrize("name", KERNELS)
def test_tiles_that_are_empty_full_and_mixed(name):
    """Long enough for all three kinds of tile, for queries beyond keys and keys beyond queries."""
    pattern = torch.zeros(300, 400, dtype=torch.bool)
    pattern[:128, :192] = True
    pattern[128:200, 100:330] = True
    pattern[250:, ::7] = True
    check(name, qkv((1, 2, 1, 300, 400, 32, 32)), pattern=pattern)
    check(name, qkv((1, 2, 1, 400, 140, 32, 32)), causal=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes_and_patterns(data):
    """Right keys for right queries at any shape. How exact results are is the other tests' business: sizes here may be 1."""
    n = st.integers(1, 140)
    groups, Hkv, B = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    Tq, Tk, D, Dv = data.draw(n), data.draw(n), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    density = data.draw(st.sampled_from([0.02, 0.5, 0.98]))
    shape = tuple(data.draw(st.sampled_from([1, full])) for full in (B, groups * Hkv, Tq, Tk))
    pattern = torch.rand(shape) < density if data.draw(st.booleans()) else None
    causal, name = data.draw(st.booleans()), data.draw(st.sampled_from(KERNELS))
    inputs = qkv((B, groups * Hkv, Hkv, Tq, Tk, D, Dv), layout=data.draw(st.sampled_from(testing.LAYOUTS)))
    d_o = torch.randn(B, groups * Hkv, Tq, Dv)

    def run(fn, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs.values()]
        o, lse = fn(*leaves)
        grads = torch.autograd.grad((o * d_o.to(dtype)).sum() + lse[lse.isfinite()].sum(), leaves)
        return [t.detach().float() for t in (o, lse, *grads)]

    want = run(lambda q, k, v: math_path(q, k, v, pattern=pattern, causal=causal), torch.float64)
    with testing.use(name) as impl:
        got = run(lambda q, k, v: attention(q, k, v, pattern=pattern, causal=causal, return_lse=True, impl=impl), torch.float32)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
def test_dropout_is_the_stated_function_of_the_seed(name, dropout_p):
    inputs = qkv(SMALL)

    def run(impl):
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        o = attention(*leaves, dropout_p=dropout_p, causal=True, impl=impl)
        return o.detach(), *torch.autograd.grad(o.square().sum(), leaves)

    with testing.use(name) as impl:
        got = run(impl)
    for g, want in zip(got, run("reference")):
        torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-5)
    torch.manual_seed(11)
    assert not torch.equal(attention(*inputs.values(), dropout_p=0.5), attention(*inputs.values(), dropout_p=0.5))


def test_dropout_drops_the_stated_fraction():
    keep = attention_ref.dropout_keep((2, 3, 300, 300), 1234567890123456789, 0.25)
    assert abs(keep.double().mean().item() - 0.75) < 0.003
    rows, columns = keep.double().mean(-1), keep.double().mean(-2)
    assert rows.min() > 0.6 and rows.max() < 0.9 and columns.min() > 0.6 and columns.max() < 0.9
    other = attention_ref.dropout_keep((2, 3, 300, 300), 1234567890123456790, 0.25)
    assert abs((keep == other).double().mean().item() - (0.75**2 + 0.25**2)) < 0.003


@pytest.mark.parametrize("name", KERNELS)
def test_unseen_keys_may_hold_anything(name):
    """NaN and infinities in keys and values reach only the queries that see them, forward and backward."""
    inputs = qkv((2, 2, 2, 130, 150, 24, 24))
    pattern = torch.ones(2, 1, 130, 150, dtype=torch.bool)
    pattern[:, :, :, 70:80] = False
    pattern[:, :, :20, 100] = False
    pattern[:, :, 20:, 100] = False
    dirty = {n: t.clone() for n, t in inputs.items()}
    for n in ("k", "v"):
        dirty[n][:, :, 70:80] = float("nan")
        dirty[n][:, :, 100] = float("inf")

    def run(tensors, **kwargs):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        with testing.use(name) as impl:
            o = attention(*leaves, impl=impl, **kwargs)
        return o.detach(), *torch.autograd.grad(o.sum(), leaves)

    for got, want in zip(run(dirty, pattern=pattern), run(inputs, pattern=pattern)):
        assert torch.equal(got, want)
    dirty = {n: t.clone() for n, t in inputs.items()}
    dirty["k"][:, :, 149] = dirty["v"][:, :, 149] = float("nan")  # only the last query may see it
    clean = run(inputs, causal=True)
    spoilt = run(dirty, causal=True)
    assert torch.equal(spoilt[0][:, :, :-1], clean[0][:, :, :-1]) and spoilt[0][:, :, -1].isnan().all()
    assert torch.equal(spoilt[1][:, :, :-1], clean[1][:, :, :-1])


@pytest.mark.parametrize("name", KERNELS)
def test_nan_that_is_seen_shows(name):
    inputs = qkv((1, 1, 1, 70, 130, 16, 16))
    inputs["q"][0, 0, 3, 5] = float("nan")
    with testing.use(name) as impl:
        o = attention(**inputs, impl=impl)
    assert o[0, 0, 3].isnan().all() and o[0, 0, [2, 4]].isfinite().all()


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 5, 7, 8, 8), (2, 0, 0, 5, 7, 8, 8), (2, 2, 2, 0, 7, 8, 8), (2, 2, 2, 5, 0, 8, 8)], ids=str
)
def test_empty_dimensions(shape):
    leaves = [t.requires_grad_() for t in qkv(shape).values()]
    o, lse = attention(*leaves, return_lse=True, impl="cpu")
    assert o.shape == (shape[0], shape[1], shape[3], shape[6])
    assert (o == 0).all() and (lse == float("-inf")).all()
    for g, t in zip(torch.autograd.grad(o.sum(), leaves), leaves):
        assert g.shape == t.shape and (g == 0).all()


@pytest.mark.parametrize("shape", [(1, 4, 2, 300, 330, 40, 48), (9, 2, 1, 70, 70, 32, 32), (3, 2, 2, 5, 200, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_thread_count(shape, dtype):
    inputs = qkv(shape, dtype)
    bias = torch.randn(1, 1, shape[3], shape[4])

    def run(threads):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (*inputs.values(), bias)]
        o, lse = attention(*leaves[:3], bias=leaves[3], causal=True, return_lse=True)
        return o.detach(), lse.detach(), *torch.autograd.grad(o.float().sum() + lse[lse.isfinite()].sum(), leaves)

    first = run(1)
    for threads in (2, 3, 2, 4):
        for got, want in zip(run(threads), first):
            assert torch.equal(got, want)


def test_a_rows_bits_do_not_depend_on_what_stands_around_it():
    inputs = qkv((3, 4, 2, 150, 210, 40, 40))
    whole = attention(**inputs)
    alone = attention(*(t[1:2] for t in inputs.values()))
    assert torch.equal(whole[1:2], alone)
    queries = attention(inputs["q"][:, :, 70:75], inputs["k"], inputs["v"])
    assert torch.equal(whole[:, :, 70:75], queries)
    causal = attention(**inputs, causal=True)
    step = attention(inputs["q"][:, :, -1:], inputs["k"], inputs["v"], causal=True)
    assert torch.equal(causal[:, :, -1:], step)


def test_isa_levels_agree():
    inputs = qkv((1, 4, 2, 150, 210, 40, 40))
    results = []
    for name in KERNELS:
        with testing.use(name) as impl:
            results.append(attention(**inputs, causal=True, impl=impl))
    for r in results[1:]:
        torch.testing.assert_close(r, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.graph
def test_registered_ops():
    q, k, v = qkv(SMALL).values()
    numbers = (0.2, 0.0, 0.0, "cpu")
    mask, bias = torch.rand(2, 1, 70, 131) > 0.3, torch.randn(1, 4, 70, 131)
    masked = Causal() & Dense(mask)
    relative, sinks = torch.randn(1, 4, 200), torch.randn(4)
    for arguments in (
        (None, None, None, None, [], Causal().spec),
        (bias, relative, sinks, None, list(masked.tensors), masked.spec),
    ):
        testing.check_op(_fwd, (q, k, v, *arguments, *numbers))
        o, lse = _fwd(q, k, v, *arguments, *numbers)
        for need_dbias in (False, arguments[0] is not None):
            given = (o, lse, torch.randn_like(o), None, need_dbias, arguments[1] is not None)
            testing.check_op(_bwd, (q, k, v, *arguments, *numbers, *given))


@pytest.mark.graph
def test_compiles_and_exports():
    def layer(q, k, v, bias):
        return attention(q * 2, k, v, bias=bias, causal=True)

    def arguments(Tq, Tk):
        tensors = [*qkv((2, 4, 2, Tq, Tk, 16, 24)).values(), torch.randn(4, Tq, Tk)]
        return [t.requires_grad_() for t in tensors]

    testing.check_public(layer, arguments(33, 40), arguments(70, 131))


def test_second_derivatives_and_transforms():
    leaves = [t.double().requires_grad_() for t in qkv((1, 2, 1, 3, 4, 3, 2)).values()]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, causal=True, return_lse=True), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, causal=True), leaves)
    narrow = [t.detach().float().requires_grad_() for t in leaves]
    for tensors in (leaves, narrow):  # the narrow ones run the kernel forward, then the reference
        (g,) = torch.autograd.grad(attention(*tensors).square().sum(), tensors[0], create_graph=True)
        tensors.append(torch.autograd.grad(g.square().sum(), tensors[1])[0])
        tensors[:] = [*tensors[:3], tensors[-1]]
    torch.testing.assert_close(narrow[-1].double(), leaves[-1], rtol=1e-4, atol=1e-5)
    q, k, v = (t.detach() for t in narrow[:3])
    stacked = torch.stack([q, 2 * q])
    torch.testing.assert_close(torch.func.vmap(lambda x: attention(x, k, v))(stacked)[1], attention(2 * q, k, v))
    _, tangent = torch.func.jvp(lambda x: attention(x, k, v), (q,), (torch.ones_like(q),))
    assert tangent.isfinite().all()


def test_autocast():
    q, k, v = (t.requires_grad_() for t in qkv(SMALL).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(q, k, v)
        assert o.dtype == torch.bfloat16 and torch.ops.mlcore.attention_fwd(
            q.detach(), k.detach(), v.detach(), None, None, None, None, [], "('and',)", 0.1, 0.0, 0.0, "cpu"
        )[0].dtype == torch.bfloat16  # fmt: skip
    o.sum().backward()
    assert q.grad.dtype == torch.float32


def test_explicit_impl_never_falls_back():
    q, k, v = qkv(SMALL).values()
    for impl, tensors, words in (
        ("cuda", (q, k, v), "no CUDA device|no cuda kernel"),
        ("cpu", (q.double(), k.double(), v.double()), "float64"),
        ("cpu", [torch.randn(1, 1, 2, 300)] * 3, "1 to 256; got 300"),
        ("nothing", (q, k, v), "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(*tensors, impl=impl)
    assert mlcore.explain("attention", q, k, v).chosen == "cpu"
    assert attention(*[torch.randn(1, 1, 2, 300)] * 3).shape == (1, 1, 2, 300)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(4, 70, 40)}, r"q must be \(B, H, Tq, D\); got shape \(4, 70, 40\)"),
        ({"k": torch.randn(2, 3, 131, 40), "v": torch.randn(2, 3, 131, 33)}, "k has 3 heads, which must divide q's 4"),
        ({"k": torch.randn(2, 2, 131, 41)}, r"k must be \(B, Hkv, Tk, D\)"),
        ({"v": torch.randn(2, 2, 130, 33)}, r"v must be \(B, Hkv, Tk, Dv\)"),
        ({"k": torch.randn(2, 2, 131, 40).bfloat16()}, "same floating dtype"),
        ({"pattern": torch.ones(70, 130, dtype=torch.bool)}, r"pattern must broadcast .* got shape \(70, 130\)"),
        ({"pattern": torch.ones(70, 131)}, "pattern must be a boolean tensor"),
        ({"bias": torch.ones(3, 70, 131)}, "bias must broadcast"),
        ({"bias": torch.ones(70, 131, dtype=torch.int32)}, "bias must be a floating-point tensor"),
        ({"scale": float("nan")}, "scale must be a finite number; got nan"),
        ({"scale": torch.ones(3)}, "scale must be a finite number"),
        ({"softcap": -1.0}, "softcap must be a positive number or None; got -1.0"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\]; got 1.5"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_raise_one_clear_line(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        attention(**{**qkv(SMALL), **change})
    assert "\n" not in str(caught.value)


def test_raw_binding_checks_before_it_writes():
    q, k, v = qkv(SMALL).values()
    o, lse = torch.full((2, 4, 70, 33), 7.0), torch.full((2, 2, 4, 70), 7.0)
    tiles = (None, None, None, None, 1, 1)

    def call(*tensors, tiles=tiles, softcap=0.0):
        _C.attention_fwd(*tensors, None, None, None, -1, -1, 0, *tiles, 0.1, softcap, 0.0, 0, o, lse)

    lists = [torch.tensor([0, 1, 1]), torch.tensor([0], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)]
    bits = torch.empty(0, 64, dtype=torch.int64)
    for bad, words in (
        (lambda: call(q[0], k, v), "q must be"),
        (lambda: call(q, k[..., :8], v), "k must be"),
        (lambda: call(q, k.double(), v), "k must be float32"),
        (lambda: call(q, k, v.transpose(2, 3)), "v must be"),
        (lambda: call(q, k, v, softcap=-1.0), "softcap"),
        (lambda: call(q, k, v, tiles=(lists[0][:2], *lists[1:], bits, 2, 1)), "row_ptr must have"),
        (lambda: call(q, k, v, tiles=(lists[0], lists[1] + 9, lists[2], bits, 1, 1)), "cols must rise"),
        (lambda: call(q, k, v, tiles=(lists[0], lists[1], lists[2] + 4, bits, 1, 1)), "ids must be"),
        (lambda: call(q, k, v, tiles=(-lists[0], *lists[1:], bits, 1, 1)), "row_ptr|cols"),
        (lambda: call(None, k, v), "q"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            bad()
    assert (o == 7).all() and (lse == 7).all()
