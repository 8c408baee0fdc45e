"""mlcore.ops.linear_attention against the float64 recurrence, for every variant, on every implementation on this machine.
Sequences, states and steps: test_linear_attention_state.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_attention_suite import (
    KERNELS,
    SHAPES,
    SMALL,
    VARIANTS,
    check,
    check_against,
    evaluate,
    gradients,
    make,
    math_path,
    options,
)

import mlcore
from mlcore import _C, testing
from mlcore.kernels.linear_attention import linear_attention_ref
from mlcore.ops import linear_attention, linear_attention_step
from mlcore.ops.linear_attention import _bwd, _fwd, _step


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


@pytest.mark.parametrize("tokens", [1300, 2600])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_for_any_number_of_threads(variant, tokens):
    """1300 tokens are shared by chunks, 2600 by spans that hand the state on; one thread walks."""
    inputs = make(variant, (1, 1, tokens, 40, 72))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(inputs, impl="cpu", **options(variant)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_same_bits_of_decay_for_any_number_of_threads():
    """One head of 40 000 tokens: torch would cut so long a sum of one number by threads."""
    inputs = make("retention", (1, 1, 40_000, 4, 4))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(inputs, **options("retention"))[5])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_in_any_batch(variant):
    inputs = make(variant, (5, 2, 200, 24, 40))
    whole = linear_attention(**inputs, **options(variant))
    alone = {n: t if n == "decay" else t[3:4] for n, t in inputs.items()}
    assert torch.equal(whole[3:4], linear_attention(**alone, **options(variant)))


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("variant", ["normalized", "gate", "vector gated delta"])
def test_any_strides(variant, layout):
    check(KERNELS, make(variant, SMALL, layout=layout), **options(variant))


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


@pytest.mark.graph
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


@pytest.mark.graph
@pytest.mark.parametrize("variant", ["normalized", "vector gated delta"])
def test_compiles_as_one_graph(variant):
    def call(*tensors):
        return linear_attention(**dict(zip(names, tensors)), return_state=True, **options(variant))

    def leaves(shape):
        return [t.requires_grad_() for t in make(variant, shape).values()]

    names = list(make(variant, SMALL))
    testing.check_public(call, leaves((2, 3, 70, 20, 24)), leaves((3, 2, 131, 24, 20)), export=False)


@pytest.mark.graph
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
