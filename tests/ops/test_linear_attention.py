"""mlcore.ops.linear_attention against the float64 recurrence, for every variant, on every implementation on this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore import _C, testing
from mlcore.kernels.linear_attention import linear_attention_ref
from mlcore.ops import linear_attention, linear_attention_step
from mlcore.ops.linear_attention import _bwd, _fwd, _step

CASES = [case for case in testing.cases("linear_attention", "cpu") if case[1] != torch.float64]  # that one is the truth itself
KERNELS = [name for name in testing.available("linear_attention", "cpu") if name != "reference"]
# (B, H, T, D, Dv)
SHAPES = [
    (2, 3, 1, 16, 16),
    (1, 2, 63, 33, 24),
    (1, 2, 64, 64, 64),
    (2, 1, 65, 100, 40),
    (1, 2, 127, 128, 33),
    (1, 1, 140, 256, 8),
]
SMALL = (2, 2, 70, 20, 24)
# name -> (the arguments it takes, the others)
VARIANTS = {
    "sum": ((), {}),
    "normalized": ((), {"feature_map": "elu", "normalize": True}),
    "retention": (("decay",), {}),
    "gate": (("gate",), {}),
    "gate normalized": (("gate",), {"feature_map": "elu", "normalize": True}),
    "vector gate": (("vector",), {}),
    "vector gate normalized": (("vector",), {"feature_map": "relu", "normalize": True}),
    "delta": (("beta",), {}),
    "gated delta": (("gate", "beta"), {}),
    "vector gated delta": (("vector", "decay", "beta"), {}),
}


def options(variant):
    return {"feature_map": None, "normalize": False} | VARIANTS[variant][1]


def make(variant, shape, dtype=torch.float32, layout="contiguous", state=True, sequences=None):
    """The inputs of a variant by name: standard normal, keys of length 1 with the delta rule, gates as a layer makes them."""
    B, H, T, D, Dv = shape
    names, _ = VARIANTS[variant]
    q, k, v = (testing.make_input(B, H, T, n, dtype=dtype, layout=layout) for n in (D, D, Dv))
    if "beta" in names:
        q, k = (F.normalize(t.float(), dim=-1).to(dtype) for t in (q, k))
    inputs = {"q": q, "k": k, "v": v}
    if "decay" in names:
        inputs["decay"] = torch.log1p(-(2.0 ** (-3 - torch.arange(H).float())))
    if "gate" in names:
        inputs["gate"] = F.logsigmoid(testing.make_input(B, H, T, layout=layout) + 2)
    if "vector" in names:
        inputs["gate"] = F.logsigmoid(testing.make_input(B, H, T, D, layout=layout) + 2)
    if "beta" in names:
        inputs["beta"] = torch.rand(B, H, T)
    if state:
        inputs["initial_state"] = torch.rand(sequences or B, H, D, Dv + options(variant)["normalize"])
    return inputs


def math_path(q, k, v, decay=None, gate=None, beta=None, initial_state=None, feature_map=None, normalize=False):
    """torch's chunked formula in the tensors' own dtype; the state in float32, as ours."""
    if decay is not None:
        decay = decay.view(1, -1, 1)
        gate = decay.expand(q.shape[:3]) if gate is None else gate + (decay if gate.dim() == 3 else decay[..., None])
    gate, beta, initial_state = (None if t is None else t.to(q.dtype) for t in (gate, beta, initial_state))
    chunk = 16 if gate is not None and gate.dim() == 4 else 64  # vector gates take chunk^2 D numbers a chunk
    o, state = linear_attention_ref.chunked(q, k, v, gate, beta, initial_state, feature_map, normalize, chunk)
    return o, state.to(torch.promote_types(q.dtype, torch.float32))


def evaluate(fn, inputs, seeds):
    """Outputs and gradients by name, for output gradients that the first call draws."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    outputs = fn(**leaves)
    if not seeds:
        seeds.extend(torch.randn(o.shape) for o in outputs)
    pairs = [(o, d.to(o.dtype)) for o, d in zip(outputs, seeds)]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [d for _, d in pairs])
    return dict(zip(("o", "state"), (o.detach() for o in outputs))), dict(zip(leaves, grads))


def check_against(names, inputs, torch_way, **kwargs):
    """Outputs and gradients of implementations by the tolerance rule; the truth is the recurrence in float64."""

    def ours(impl):
        return lambda **tensors: linear_attention(**tensors, return_state=True, impl=impl, **kwargs)

    seeds = []
    want = evaluate(torch_way, inputs, seeds)
    truth = evaluate(ours("reference"), {n: t.double() for n, t in inputs.items()}, seeds)
    # What cancels: a gate's gradient is the difference of sums of q dq and k dk over a chunk's tokens; with normalize dq is the
    # difference of its values' and its denominators' part; beta's is a sum over Dv of either sign.
    size = sum((truth[1][n] * inputs[n]).abs().sum(-1).max().item() for n in ("q", "k"))
    tokens = inputs["q"].shape[0] * inputs["q"].shape[2]
    state = truth[1]["initial_state"].abs().max().item() if "initial_state" in inputs else 0.0
    terms = {"initial_state": 4 * state, "gate": 8 * size, "decay": 8 * size * tokens**0.5, "q": 1.0, "k": 1.0, "beta": 1.0}
    for name in names:
        with testing.use(name) as impl:
            got = evaluate(ours(impl), inputs, seeds)
        for grad, (g, w, t) in enumerate(zip(got, want, truth)):
            for n in w:
                testing.assert_close_to_reference(
                    g[n], w[n], t[n], grad=bool(grad), terms=terms.get(n, 0.0) if grad else 0.0, what=f"{name}: {n}"
                )


def check(names, inputs, **kwargs):
    check_against(names, inputs, lambda **tensors: math_path(**tensors, **kwargs), **kwargs)


# The 16-bit types differ in loading and storing alone.
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(d, s) for d in (torch.float32, torch.bfloat16, torch.float16) for s in (SHAPES if d == torch.float32 else SHAPES[1:4:2])],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(dtype, shape, variant):
    check(KERNELS, make(variant, shape, dtype), **options(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_chunks(variant):
    check(KERNELS, make(variant, (1, 1, 1000, 64, 32)), **options(variant))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_agrees_with_the_chunked_form(variant, dtype):
    """Two forms of one definition, written independently: the recurrence over tokens and the products over chunks."""
    inputs = make(variant, SMALL, dtype)
    if dtype != torch.float64:
        return check(["reference"], inputs, **options(variant))
    seeds = []
    inputs = {n: t.double() for n, t in inputs.items()}
    recurrence = evaluate(lambda **t: linear_attention(**t, return_state=True, **options(variant)), inputs, seeds)
    for got, want in zip(recurrence, evaluate(lambda **t: math_path(**t, **options(variant)), inputs, seeds)):
        for n in want:
            torch.testing.assert_close(got[n], want[n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("causal", [True, False])
def test_feature_maps(dtype, feature_map, causal):
    inputs = make("normalized", SMALL, dtype)
    if causal:
        check(KERNELS, inputs, feature_map=feature_map, normalize=True)
    else:
        check_whole(inputs, feature_map, True)


def check_whole(inputs, feature_map, normalize):
    """Not causal: against the two products that it is."""

    def torch_way(q, k, v, initial_state=None):
        q, k = linear_attention_ref.feature_map(q, feature_map), linear_attention_ref.feature_map(k, feature_map)
        if normalize:
            v = F.pad(v, (0, 1), value=1.0)
        state = k.mT @ v
        if initial_state is not None:
            state = state + initial_state.to(state.dtype)
        o = q @ state
        return linear_attention_ref.divided(o) if normalize else o, state.to(torch.promote_types(q.dtype, torch.float32))

    check_against(KERNELS, inputs, torch_way, feature_map=feature_map, normalize=normalize, causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("Tq", "Tk"), [(70, 131), (200, 1), (1, 65)])
def test_cross_attention(dtype, Tq, Tk):
    inputs = {n: testing.make_input(2, 2, t, 20, dtype=dtype) for n, t in (("q", Tq), ("k", Tk), ("v", Tk))}
    check_whole(inputs, None, False)
    check_whole(inputs, "elu", True)


def test_feature_map_may_be_a_function():
    inputs = make("sum", SMALL, state=False)

    def cosines(x):
        return torch.cat([x.cos(), x.sin()], -1)

    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    got = linear_attention(**leaves, feature_map=cosines, normalize=False)
    want = linear_attention(cosines(inputs["q"]), cosines(inputs["k"]), inputs["v"], feature_map=None, normalize=False)
    assert torch.equal(got, want)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), list(leaves.values())))


def gradients(inputs, seeds=None, **kwargs):
    """(o, state, gradients) with fixed output gradients."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    o, state = linear_attention(**leaves, return_state=True, **kwargs)
    generator = torch.Generator().manual_seed(1)
    d_o, d_state = seeds or [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (o, state)]
    return [o.detach(), state.detach(), *torch.autograd.grad([o, state], list(leaves.values()), [d_o, d_state])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_for_any_number_of_threads(variant):
    inputs = make(variant, (1, 1, 1300, 40, 72))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(inputs, impl="cpu", **options(variant)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_in_any_batch(variant):
    inputs = make(variant, (5, 2, 200, 24, 40))
    whole = linear_attention(**inputs, **options(variant))
    alone = {n: t if n == "decay" else t[3:4] for n, t in inputs.items()}
    assert torch.equal(whole[3:4], linear_attention(**alone, **options(variant)))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("variant", ["normalized", "gate", "vector gate", "vector gated delta"])
def test_packed_sequences_are_separate_ones(name, variant):
    bounds = [0, 0, 70, 71, 71, 600, 600]
    inputs = make(variant, (1, 2, 600, 24, 40), sequences=6)
    per_sequence = {"decay", "initial_state"}
    with testing.use(name) as impl:
        got = gradients(inputs, cu_seqlens=torch.tensor(bounds), impl=impl, **options(variant))
        generator = torch.Generator().manual_seed(1)
        d_o, d_state = (torch.randn(t.shape, generator=generator) for t in got[:2])
        names = ["o", "state", *inputs]
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            part = {m: t if m in per_sequence else t[:, :, begin:end] for m, t in inputs.items()}
            part["initial_state"] = inputs["initial_state"][n : n + 1]
            seeds = d_o[:, :, begin:end], d_state[n : n + 1]
            want = gradients(part, seeds, impl=impl, **options(variant))
            for m, g, w in zip(names, got, want):
                if m == "decay":
                    continue  # a sum over all sequences
                g = g[n : n + 1] if m in ("state", "initial_state") else g[:, :, begin:end]
                assert torch.equal(g, w), (m, n)


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("variant", ["normalized", "gate", "vector gated delta"])
def test_any_strides(variant, layout):
    check(KERNELS, make(variant, SMALL, layout=layout), **options(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_steps_is_one_run(variant, tmp_path):
    T, prefill = 150, 93
    inputs = make(variant, (2, 3, T, 33, 20))
    start = inputs.pop("initial_state")
    want, want_state = linear_attention(**inputs, initial_state=start, return_state=True, **options(variant))
    tokens = {n: t for n, t in inputs.items() if n != "decay"}
    shared = {n: t for n, t in inputs.items() if n == "decay"}
    first = {n: t[:, :, :prefill] for n, t in tokens.items()}
    o, state = linear_attention(**first, **shared, initial_state=start, return_state=True, **options(variant))
    outputs = [o]
    for t in range(prefill, T):
        if t == 120:  # a state can be saved and resumed
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt")
        o, state = linear_attention_step(
            state=state, **{n: x[:, :, t] for n, x in tokens.items()}, **shared, **options(variant)
        )
        outputs.append(o.unsqueeze(2))
    torch.testing.assert_close(torch.cat(outputs, 2), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_matches_one_token(name, dtype, variant):
    inputs = make(variant, (2, 3, 1, 33, 20), dtype)
    state = inputs.pop("initial_state")
    want, want_state = linear_attention(**inputs, initial_state=state, return_state=True, impl="reference", **options(variant))
    with testing.use(name) as impl:
        one = {n: t if n == "decay" else t[:, :, 0] for n, t in inputs.items()}
        before = state.clone()
        o, after = linear_attention_step(state=state, **one, impl=impl, **options(variant))
    assert o.dtype == dtype and torch.equal(state, before)
    rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(o, want[:, :, 0], rtol=rounding, atol=rounding)
    torch.testing.assert_close(after, want_state, rtol=1e-5, atol=1e-5)


def test_step_records_gradients():
    inputs = make("gate", (2, 3, 1, 8, 6))
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    state = leaves.pop("initial_state")
    o, after = linear_attention_step(state=state, **{n: t[:, :, 0] for n, t in leaves.items()}, **options("gate"))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(o.sum() + after.sum(), [state, *leaves.values()]))


@pytest.mark.parametrize("variant", ["gate", "vector gate", "gated delta", "vector gated delta", "gate normalized"])
@pytest.mark.parametrize("name", KERNELS)
def test_extreme_gates(name, variant):
    """Gates that forget everything, at once or little by little, beside gates that forget nothing: finite, and right behind."""
    inputs = make(variant, (1, 2, 200, 16, 8))
    gate = inputs["gate"]
    gate[:, :, 1::7] = -1e4
    gate[:, :, 5::11] = -1e-7
    gate[:, :, 100] = -1e30
    gate[:, :, 130] = -float("inf")
    with testing.use(name) as impl:
        got = gradients(inputs, impl=impl, **options(variant))
    wide = {n: t.double() for n, t in inputs.items()}
    seeds = [torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).double() for t in got[:2]]
    with testing.use(name) as impl:
        got = gradients(inputs, [s.float() for s in seeds], impl=impl, **options(variant))
    seeds = [s.float().double() for s in seeds]
    for n, g, w in zip(["o", "state", *inputs], got, gradients(wide, seeds, impl="reference", **options(variant))):
        assert g.isfinite().all(), n
        if w.isfinite().all():
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["normalized", "retention", "vector gate"])
def test_long_sequences(variant):
    inputs = make(variant, (1, 1, 65536, 8, 8))
    got, state = linear_attention(**inputs, return_state=True, **options(variant))
    want, want_state = math_path(**{n: t.double() for n, t in inputs.items()}, **options(variant))
    for g, w in ((got, want), (state, want_state)):
        assert (g.double() - w).norm() < 1e-5 * w.norm()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(0, 2, 5, 4, 3), (2, 0, 5, 4, 3), (2, 2, 0, 4, 3)], ids=str)
def test_empty(shape, causal):
    B, H, _, D, Dv = shape
    inputs = make("normalized", shape)
    o, state, *grads = gradients(inputs, causal=causal)
    assert o.shape == (B, H, shape[2], Dv)
    assert state.shape == (B, H, D, Dv + 1)
    if shape[2] == 0:
        assert torch.equal(state, inputs["initial_state"])
    assert [g.shape for g in grads] == [t.shape for t in inputs.values()]


def test_no_sequences():
    q = torch.zeros(1, 2, 0, 4)
    o, state = linear_attention(q, q, q, cu_seqlens=torch.zeros(1, dtype=torch.int64), return_state=True)
    assert o.shape == (1, 2, 0, 4) and state.shape == (0, 2, 4, 5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", KERNELS)
def test_nan_reaches_no_token_before_it(name, variant):
    inputs = make(variant, (1, 2, 100, 12, 20))
    with testing.use(name) as impl:
        want = linear_attention(**inputs, impl=impl, **options(variant))
        inputs["v"][0, 0, 37] = float("nan")
        inputs["k"][0, 0, 41] = float("inf")
        got = linear_attention(**inputs, impl=impl, **options(variant))
    assert torch.equal(got[:, 1], want[:, 1])
    assert torch.equal(got[:, 0, :37], want[:, 0, :37])
    assert got[:, 0, 37:].isnan().any()


@pytest.mark.parametrize("name", KERNELS)
def test_a_zero_denominator_gives_zero(name):
    inputs = make("normalized", (1, 1, 70, 8, 8), state=False)
    inputs["q"][:, :, 10:20] = -1.0
    with testing.use(name) as impl:
        o, _, *grads = gradients(inputs, feature_map="relu", impl=impl)
    assert (o[:, :, 10:20] == 0).all() and all(g.isfinite().all() for g in grads)


def test_registered_ops():
    for variant in ("normalized", "vector gated delta"):
        inputs = make(variant, SMALL)
        decay = inputs.pop("decay", None)
        gate, beta = inputs.get("gate"), inputs.get("beta")
        if decay is not None:
            gate = gate + decay.view(1, -1, 1, 1)
        tensors = (inputs["q"], inputs["k"], inputs["v"], gate, beta, inputs["initial_state"], None)
        normalize = options(variant)["normalize"]
        numbers = (1 if normalize else 0, normalize, True)
        testing.check_op(_fwd, (*tensors, *numbers, True, "cpu"))
        o, den, state, states = _fwd(*tensors, *numbers, True, "cpu")
        testing.check_op(_bwd, (*tensors, *numbers, o, den, states, torch.randn_like(o), torch.randn_like(state), "cpu"))
        one = [None if t is None else t[:, :, 0] for t in tensors[:5]]
        testing.check_op(_step, (*one, inputs["initial_state"], *numbers[:2], "cpu"))


@pytest.mark.parametrize("variant", ["normalized", "vector gated delta"])
def test_compiles_as_one_graph(variant):
    def call(*tensors):
        return linear_attention(**dict(zip(names, tensors)), return_state=True, **options(variant))

    def leaves(shape):
        return [t.requires_grad_() for t in make(variant, shape).values()]

    names = list(make(variant, SMALL))
    testing.check_public(call, leaves((2, 3, 70, 20, 24)), leaves((3, 2, 131, 24, 20)), export=False)


def test_compiled_step():
    inputs = make("gate", (2, 3, 1, 8, 6))
    state = inputs.pop("initial_state")
    one = [t[:, :, 0] for t in inputs.values()]

    def call(q, k, v, gate, state):
        return linear_attention_step(q, k, v, state, gate=gate)

    state = torch.rand(2, 3, 8, 7)
    testing.check_public(call, [*one, state], export=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    inputs = make(variant, (1, 2, 5, 3, 2))
    leaves = [t.double().requires_grad_() for t in inputs.values()]

    def call(*tensors):
        return linear_attention(**dict(zip(inputs, tensors)), return_state=True, **options(variant))

    assert torch.autograd.gradcheck(call, leaves)


def test_second_derivatives():
    inputs = {n: t.requires_grad_() for n, t in make("gate", (1, 2, 9, 4, 3)).items()}

    def penalty(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs.values()]
        o = linear_attention(**dict(zip(inputs, leaves)), **options("gate"))
        grads = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, want in zip(penalty(torch.float32), penalty(torch.float64)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_torch_func():
    inputs = make("sum", (3, 2, 9, 4, 3), state=False)
    want = linear_attention(*inputs.values())
    got = torch.func.vmap(lambda q, k, v: linear_attention(q[None], k[None], v[None])[0])(*inputs.values())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda q: linear_attention(q[None], q[None], q[None], impl="cpu")[0])(inputs["q"])


def test_autocast():
    inputs = {n: t.requires_grad_() for n, t in make("gate", SMALL).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = linear_attention(**inputs, return_state=True, **options("gate"))
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    grads = torch.autograd.grad(o.float().sum() + state.sum(), list(inputs.values()))
    assert [g.dtype for g in grads] == [torch.float32] * 5


def test_explicit_implementation_is_never_replaced():
    q = torch.zeros(1, 1, 2, 4)
    assert "cpu" in str(mlcore.explain("linear_attention", q))
    with pytest.raises(ValueError, match="cuda"):
        linear_attention(q, q, q, impl="cuda")
    with pytest.raises(ValueError, match="float64"):
        linear_attention(q.double(), q.double(), q.double(), impl="cpu")


def arguments(**changes):
    q = torch.zeros(2, 3, 5, 4)
    return {"q": q, "k": q, "v": q} | changes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (arguments(q=torch.zeros(3, 5, 4)), "q must be"),
        (arguments(k=torch.zeros(2, 3, 5, 6)), "k must be"),
        (arguments(v=torch.zeros(2, 3, 6, 4)), "v must be"),
        (arguments(k=torch.zeros(2, 3, 6, 4), v=torch.zeros(2, 3, 6, 4)), "as many keys"),
        (arguments(v=torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)), "same floating dtype"),
        (arguments(feature_map="gelu"), "feature_map must be"),
        (arguments(decay=torch.zeros(2)), "decay must have shape"),
        (arguments(gate=torch.zeros(2, 3, 4)), "gate must be"),
        (arguments(beta=torch.zeros(2, 3, 5, 4)), "beta must be"),
        (arguments(gate=torch.zeros(2, 3, 5), causal=False), "gate needs causal"),
        (arguments(initial_state=torch.zeros(2, 3, 4, 4)), "the state must be"),
        (arguments(initial_state=torch.zeros(2, 3, 4, 5, dtype=torch.int64)), "the state must be"),
        (arguments(cu_seqlens=torch.tensor([0, 5])), "batch of 1"),
        (arguments(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)), "int64"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=f"linear_attention: .*{message}"):
        linear_attention(**kwargs)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 6], [0, 3, 2, 5]], ids=str)
def test_bad_sequences_are_named(bounds):
    q = torch.zeros(1, 2, 5, 4)
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            linear_attention(q, q, q, cu_seqlens=torch.tensor(bounds), impl=impl)


def test_native_functions_check_for_themselves():
    q, o = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match="span must be"):
        _C.linear_attention_fwd(q, q, q, None, None, None, None, 0, 0, 1, 100, o, None, None, None)
    with pytest.raises(ValueError, match="den goes with normalize"):
        _C.linear_attention_fwd(q, q, q, None, None, None, None, 0, 1, 1, 64, o, None, None, None)
    with pytest.raises(ValueError, match="feature_map must be"):
        _C.linear_attention_fwd(q, q, q, None, None, None, None, 7, 0, 1, 64, o, None, None, None)
    with pytest.raises(ValueError, match="beta needs"):
        _C.linear_attention_fwd(q, q, q, None, q[..., 0], None, None, 0, 1, 1, 64, o, q[..., 0], None, None)
