"""mlcore.ops.aft against its weighted means in float64, for every kind of bias, on every implementation on this machine."""

from __future__ import annotations

import pytest
import torch

import mlcore
from mlcore import _C, testing
from mlcore.kernels.aft import aft_ref
from mlcore.ops import aft
from mlcore.ops.aft import _bwd, _fwd

KERNELS = [name for name in testing.available("aft") if name != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, H, T, D)
SHAPES = [(2, 3, 1, 16), (1, 2, 63, 33), (2, 2, 130, 12), (1, 1, 40, 100)]
SMALL = (2, 2, 70, 12)
# name -> (heads of the bias: 1, H or None, its dimensions, window)
KINDS = {
    "simple": (None, 0, None),
    "full": (1, 3, None),
    "full of heads": ("H", 3, None),
    "local": (1, 3, 5),
    "local, wide": ("H", 3, 70),
    "conv": ("H", 2, 5),
    "conv, wide": (1, 2, 90),
    "conv, one": (1, 2, 1),
}


def make(kind, shape, dtype=torch.float32, causal=False, layout="contiguous", S=None, spread=1.0):
    """(inputs, options) of a kind."""
    B, H, T, D = shape
    heads, dims, window = KINDS[kind]
    S = S or T
    inputs = {"q": testing.make_input(B, H, T, D, dtype=dtype, layout=layout)}
    inputs |= {n: testing.make_input(B, H, S, D, dtype=dtype, layout=layout) for n in ("k", "v")}
    inputs["k"] = inputs["k"] * spread
    if heads is not None:
        columns = S if window is None else window if causal else 2 * window - 1
        inputs["bias"] = spread * torch.randn(H if heads == "H" else 1, *((T, columns) if dims == 3 else (columns,)))
    return inputs, {"window": window, "causal": causal}


def magnitudes(inputs, d_o, window, causal):
    """What cancels in o and its gradients, in float64: a |v| instead of a v, a |dy| (|v| + |y|) instead of a dy (v - y)."""
    q, k, v = (inputs[n].double() for n in ("q", "k", "v"))
    d_o = d_o.double()
    w = aft_ref.position_bias(inputs.get("bias"), window, q.shape[2], k.shape[2])
    scores = k[:, :, None] + (0.0 if w is None else w.double()[..., None])  # (B, H, T | 1, S, D)
    scores = scores.expand(*q.shape[:3], *k.shape[2:])
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:4], dtype=torch.bool).tril()[..., None], -torch.inf)
    weights = scores.softmax(3).nan_to_num(0.0)
    y = (weights * v[:, :, None]).sum(3)
    terms = weights * (d_o * q.sigmoid()).abs()[:, :, :, None] * (v.abs()[:, :, None] + y.abs()[:, :, :, None])
    pairs = terms.sum((0, 4))  # (H, T, S)
    if inputs.get("bias") is not None and inputs["bias"].shape[0] == 1:
        pairs = pairs.sum(0, keepdim=True)
    largest = pairs.max()
    if inputs.get("bias") is not None and inputs["bias"].dim() == 2:
        largest = max(pairs.diagonal(i, 1, 2).sum(1).max() for i in range(1 - pairs.shape[1], pairs.shape[2]))
    # A pair's gradient is a chain of 2 D products, whose roundings add up as a random walk.
    mean = (weights * v.abs()[:, :, None]).sum(3) * q.sigmoid()  # of values of either sign
    found = {"o": mean, "q": mean * d_o.abs(), "k": terms.sum(2)}
    return {n: t.max().item() for n, t in found.items()} | {"bias": float(largest) * (2 * q.shape[3]) ** 0.5 / 2}


def check(inputs, options, names=KERNELS, torch_way=aft_ref.products):
    """Outputs and gradients of implementations by the tolerance rule. torch's way is the usual two products, or softmax."""

    def leaves(dtype=None):
        return {n: t.detach().to(dtype or t.dtype).clone().requires_grad_() for n, t in inputs.items()}

    seed = torch.randn(inputs["q"].shape)

    def evaluate(fn, tensors):
        o = fn(**tensors, **options)
        return {"o": o.detach()}, dict(zip(tensors, torch.autograd.grad(o, list(tensors.values()), seed.to(o.dtype))))

    want = evaluate(torch_way, leaves())
    truth = evaluate(aft_ref.aft, leaves(torch.float64))
    terms = magnitudes(inputs, seed, **options)
    for name in names:
        with testing.use(name) as impl:
            got = evaluate(lambda **tensors: aft(**tensors, impl=impl), leaves())
        for grad, (g, w, t) in enumerate(zip(got, want, truth)):
            for n in w:
                testing.assert_close_to_reference(
                    g[n], w[n], t[n], grad=bool(grad), terms=terms.get(n, 0.0), what=f"{name}: {n}"
                )


@pytest.mark.parametrize(
    ("dtype", "shape"), [(d, s) for d in DTYPES for s in (SHAPES if d == torch.float32 else SHAPES[1:3])], ids=str
)
@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64(kind, causal, shape, dtype):
    check(*make(kind, shape, dtype, causal))


@pytest.mark.parametrize(("T", "S"), [(70, 131), (200, 3), (1, 65)])
@pytest.mark.parametrize("kind", KINDS)
def test_cross_attention(kind, T, S):
    check(*make(kind, (2, 2, T, 12), S=S))


@pytest.mark.parametrize("spread", [10.0, 300.0])
@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_weights(kind, causal, spread):
    """Exponents of a thousand of either sign, where exp(k) exp(w) is 0 or infinite and their product isn't."""
    check(*make(kind, SMALL, causal=causal, spread=spread), torch_way=aft_ref.weighted_means)


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_falling_and_rising_keys(kind, causal):
    """Keys that grow by 400 over the sequence, or fall: a causal sum must not be relative to what comes later."""
    for sign in (1, -1):
        inputs, options = make(kind, (1, 1, 150, 12), causal=causal)
        inputs["k"] = inputs["k"] + sign * torch.linspace(-200, 200, 150)[:, None]
        check(inputs, options, torch_way=aft_ref.weighted_means)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_count_for_nothing(name, kind):
    """A key of -inf, NaN as its value; and pairs hidden by the bias."""
    inputs, options = make(kind, SMALL)
    hidden = torch.rand(SMALL[2]) < 0.3
    inputs["k"][:, :, hidden] = -torch.inf
    clean = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    dirty = dict(clean, v=inputs["v"].masked_fill(hidden[:, None], torch.nan).requires_grad_())
    with testing.use(name) as impl:
        got, want = (aft(**t, **options, impl=impl) for t in (dirty, clean))
        assert torch.equal(got, want) and want.isfinite().all()
        grads = [torch.autograd.grad(o.sum(), list(t.values())) for o, t in ((got, dirty), (want, clean))]
        assert all(torch.equal(a, b) for a, b in zip(*grads)) and (grads[1][2][:, :, hidden] == 0).all()
        torch.testing.assert_close(want, aft_ref.aft(*clean.values(), **options) if "bias" in clean else
                                   aft_ref.aft(*clean.values(), None, **options), rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_hidden_pairs_count_for_nothing(name):
    inputs, _ = make("full", SMALL)
    inputs["bias"][0, :, 7:60] = -torch.inf
    inputs["bias"][0, 33] = -torch.inf
    inputs["v"][:, :, 9] = torch.nan
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with testing.use(name) as impl:
        o = aft(**leaves, impl=impl)
        grads = torch.autograd.grad(o.sum(), list(leaves.values()))
    assert o.isfinite().all() and (o[:, :, 33] == 0).all()
    assert all(g.isfinite().all() for g in grads) and (grads[3][0, 33] == 0).all() and (grads[1][:, :, 9] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_no_earlier_token_and_no_other_head(kind, bad):
    inputs, options = make(kind, (1, 2, 150, 20), causal=True)
    want = aft(**inputs, **options)
    for n in ("k", "v"):
        changed = dict(inputs, **{n: inputs[n].clone()})
        changed[n][0, 1, 100] = bad
        got = aft(**changed, **options)
        torch.testing.assert_close(got[:, :, :100], want[:, :, :100], rtol=1e-5, atol=1e-6)
        assert torch.equal(got[:, 0], want[:, 0]) and not got[0, 1, 100:].isfinite().any()
        leaves = {m: t.detach().requires_grad_() for m, t in changed.items() if m != "bias"}
        o = aft(**leaves, **{m: changed[m] for m in ("bias",) if m in changed}, **options)
        grads = torch.autograd.grad(o[:, :, :100].sum(), list(leaves.values()))
        assert all(g[:, 0].isfinite().all() for g in grads)


def test_gradient_nan_stays_with_its_query():
    inputs, options = make("full", (1, 2, 150, 20), causal=True)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    d_o = torch.randn(1, 2, 150, 20)
    d_o[0, 0, 60] = torch.nan
    dq, dk, dv, dbias = torch.autograd.grad(aft(**leaves, **options), list(leaves.values()), d_o)
    assert dk[:, :, 61:].isfinite().all() and dv[0, 1].isfinite().all() and dv[0, 0, :61].isnan().all()
    assert dbias[0, 60, :61].isnan().all() and dbias[0, :60].isfinite().all() and dq[0, 0, 61:].isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads_and_in_any_batch(kind, causal):
    inputs, options = make(kind, (2, 2, 700, 24), causal=causal)

    def run(tensors):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        o = aft(**leaves, **options)
        return [o.detach(), *torch.autograd.grad(o.sin().sum(), list(leaves.values()))]

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(inputs))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    alone = run({n: t if n == "bias" else t[1:] for n, t in inputs.items()})
    assert all(torch.equal(a[1:], b) for a, b in zip(results[0][:4], alone))


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("kind", ["full", "local", "conv"])
def test_any_strides(kind, layout):
    check(*make(kind, SMALL, layout=layout, causal=True))


def test_key_of_one_feature():
    inputs, options = make("conv", SMALL)
    narrow = inputs["k"][..., :1].clone().requires_grad_()
    o = aft(**dict(inputs, k=narrow), **options)
    wide = narrow.detach().expand_as(inputs["v"]).clone().requires_grad_()
    want = aft(**dict(inputs, k=wide), **options)
    assert torch.equal(o, want)
    (got,), (parts,) = torch.autograd.grad(o.sum(), [narrow]), torch.autograd.grad(want.sum(), [wide])
    torch.testing.assert_close(got, parts.sum(3, keepdim=True))


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
def test_long_sequences(causal):
    """65 536 tokens, against convolutions and running sums in float64."""
    inputs, options = make("conv", (1, 1, 65536, 2), causal=causal)
    want = aft_ref.convolution(*(t.double() for t in inputs.values()), options["window"], causal)
    torch.testing.assert_close(aft(**inputs, **options).double(), want, rtol=1e-4, atol=1e-5)
    del inputs["bias"]
    want = aft_ref.products(*(t.double() for t in inputs.values()), causal=causal)
    torch.testing.assert_close(aft(**inputs, causal=causal).double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)], ids=str)
def test_empty(shape):
    for kind in ("simple", "full", "conv"):
        inputs, options = make(kind, shape)
        leaves = {n: t.requires_grad_() for n, t in inputs.items()}
        o = aft(**leaves, **options)
        assert o.shape == shape
        assert all(
            (g == 0).all() for g in torch.autograd.grad(o.sum(), list(leaves.values()), allow_unused=True) if g is not None
        )
    no_keys = torch.zeros(2, 2, 0, 4, requires_grad=True)
    o = aft(torch.ones(2, 2, 5, 4, requires_grad=True), no_keys, no_keys)
    assert (o == 0).all() and torch.autograd.grad(o.sum(), no_keys)[0].shape == no_keys.shape


@pytest.mark.graph
@pytest.mark.parametrize("kind", ["simple", "full", "local", "conv"])
def test_registered_ops(kind):
    inputs, options = make(kind, (2, 2, 20, 6))
    tensors = (inputs["q"], inputs["k"], inputs["v"], inputs.get("bias"), options["window"] or 0, options["causal"])
    testing.check_op(_fwd, (*tensors, True, "cpu"))
    o, *kept = _fwd(*tensors, True, "cpu")
    testing.check_op(_bwd, (*tensors, *kept, torch.randn_like(o), kind != "simple", "cpu"))


@pytest.mark.graph
@pytest.mark.parametrize("kind", ["simple", "full", "conv"])
def test_compiles_as_one_graph(kind):
    def leaves(shape):
        return [t.requires_grad_() for t in make(kind, shape)[0].values()]

    window = KINDS[kind][2]
    testing.check_public(lambda *t: aft(*t, window=window), leaves((2, 3, 70, 20)), leaves((3, 3, 131, 24)), export=False)


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", ["simple", "full", "local", "conv"])
def test_gradcheck(kind, causal):
    inputs, options = make(kind, (1, 2, 6, 2), causal=causal)
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *t: aft(*t, **options), leaves)


def test_second_derivatives():
    inputs, _ = make("full", (1, 2, 7, 3))

    def penalty(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs.values()]
        grads = torch.autograd.grad(aft(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, want in zip(penalty(torch.float32), penalty(torch.float64)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_torch_func_and_autocast():
    inputs, _ = make("full", (3, 2, 9, 4))
    want = aft(**inputs)
    got = torch.func.vmap(lambda q, k, v: aft(q[None], k[None], v[None], inputs["bias"])[0])(*list(inputs.values())[:3])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda q: aft(q[None], q[None], q[None], impl="cpu")[0])(inputs["q"])
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = aft(**leaves)
    assert o.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(o.float().sum(), list(leaves.values()))] == [torch.float32] * 4


def test_explicit_implementation_is_never_replaced():
    q = torch.zeros(1, 1, 2, 4)
    assert "cpu" in str(mlcore.explain("aft", q))
    with pytest.raises(ValueError, match="cuda"):
        aft(q, q, q, impl="cuda")
    with pytest.raises(ValueError, match="float64"):
        aft(q.double(), q.double(), q.double(), impl="cpu")


def arguments(**changes):
    q = torch.zeros(2, 3, 5, 4)
    return {"q": q, "k": q, "v": q} | changes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (arguments(q=torch.zeros(3, 5, 4)), "q must be"),
        (arguments(k=torch.zeros(2, 3, 5, 6)), "k must be"),
        (arguments(v=torch.zeros(2, 3, 5, 5)), "v must be"),
        (arguments(k=torch.zeros(2, 3, 6, 4), v=torch.zeros(2, 3, 6, 4), causal=True), "as many keys"),
        (arguments(v=torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)), "same floating dtype"),
        (arguments(window=3), "come with a bias"),
        (arguments(window=0, bias=torch.zeros(1, 3)), "at least 1"),
        (arguments(bias=torch.zeros(1, 5, 4)), "bias must be"),
        (arguments(bias=torch.zeros(2, 5, 5)), "bias must be"),
        (arguments(bias=torch.zeros(3, 4), window=3), "bias must be"),
        (arguments(bias=torch.zeros(3, 5), window=3, causal=True), "bias must be"),
        (arguments(bias=torch.zeros(1, 5, 5, dtype=torch.int64)), "bias must be floating"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=f"aft: .*{message}"):
        aft(**kwargs)


def test_native_functions_check_for_themselves():
    q, o = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match="window needs bias"):
        _C.aft_fwd(q, q, q, None, 3, 0, o, None, None, None, None)
    with pytest.raises(ValueError, match="y, den and peak go together"):
        _C.aft_fwd(q, q, q, None, 0, 0, o, o, None, None, None)
    with pytest.raises(ValueError, match="bias must be"):
        _C.aft_fwd(q, q, q, q[0], 0, 0, o, None, None, None, None)
