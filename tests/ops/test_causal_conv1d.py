"""mlcore.ops.causal_conv1d against float64 torch.nn.functional.conv1d, over every implementation, layout and argument."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mlcore
from mlcore import _C, testing
from mlcore.ops import causal_conv1d, causal_conv1d_update
from mlcore.ops.causal_conv1d import _bwd, _fwd, _update

CASES = [case for case in testing.cases("causal_conv1d", "cpu") if case[1] != torch.float64]
KERNELS = [name for name in testing.available("causal_conv1d", "cpu") if name != "reference"]
F32, BF16 = torch.float32, torch.bfloat16
# (B, C, T, width)
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 4), (3, 5, 2, 7), (2, 17, 33, 4), (1, 7, 2300, 3), (1, 300, 67, 5), (1, 2, 4500, 130)]
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "expanded", "transposed")
ACTIVATIONS = {None: lambda v: v, "silu": F.silu, "gelu": F.gelu}


def make_x(B, C, T, dtype=F32, layout="contiguous"):
    if layout == "channels_last":
        return testing.make_input(B, T, C, dtype=dtype).transpose(1, 2)
    return testing.make_input(B, C, T, dtype=dtype, layout=layout)


def make(shape, dtype=F32, layout="contiguous", bias=True, initial=False):
    B, C, T, width = shape
    return {
        "x": make_x(B, C, T, dtype, layout),
        "weight": testing.make_input(C, width, dtype=dtype, std=width**-0.5),
        "bias": testing.make_input(C, dtype=dtype) if bias else None,
        "initial_states": testing.make_input(B, width - 1, C, dtype=dtype).transpose(1, 2) if initial else None,
    }


def stock(x, weight, bias=None, initial_states=None, activation=None):
    """The formula in torch: (y, final states), rounded once to x's dtype (torch's grouped convolutions would take minutes)."""
    B, C, _ = x.shape
    back = weight.shape[1] - 1
    h = torch.cat([x.new_zeros(B, C, back) if initial_states is None else initial_states, x], -1)
    wide = torch.promote_types(x.dtype, F32)
    pre = torch.einsum("bctk,ck->bct", h.to(wide).unfold(-1, weight.shape[1], 1), weight.to(wide))
    pre = pre if bias is None else pre + bias.to(wide)[:, None]
    return ACTIVATIONS[activation](pre).to(x.dtype), h[..., h.shape[-1] - back :]


def test_the_formula_is_conv1d():
    x, weight, bias, _ = (None if t is None else t.double() for t in make((2, 5, 20, 4)).values())
    y, _ = stock(x, weight, bias)
    torch.testing.assert_close(y, F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=5))


def check(name, inputs, want=stock, terms=None, **kwargs):
    C = inputs["weight"].shape[0]
    count = inputs["x"].numel() / C
    # A weight's gradient is a sum of `count` numbers near 1 of either sign.
    terms = {"weight": 4 * count**0.5, "bias": 4 * count**0.5, "x": 2.0, "0": 2.0} | (terms or {})
    shared = {k: v for k, v in kwargs.items() if k == "activation"}
    with testing.use(name) as impl:
        testing.check_numerics(
            lambda **t: causal_conv1d(**t, **kwargs, return_final_states=True, impl=impl),
            lambda **t: want(**t, **shared),
            lambda **t: want(**t, **shared),
            inputs,
            terms=terms,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{str(c[1]).removeprefix('torch.')}")
def test_matches_conv1d(case, shape):
    name, dtype = case
    check(name, make(shape, dtype, "contiguous"))
    check(name, make(shape, dtype, "channels_last", initial=True), activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_layouts_and_activations(name, activation, layout):
    check(name, make((3, 21, 45, 4), F32, layout, bias=layout != "sliced", initial=layout != "expanded"), activation=activation)


@pytest.mark.parametrize("name", KERNELS)
def test_mixed_dtypes(name):
    """16-bit signals beside float32 parameters."""
    inputs = make((2, 9, 40, 4), BF16)
    inputs["weight"], inputs["bias"] = inputs["weight"].float(), inputs["bias"].float()
    check(name, inputs, activation="gelu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_y_lies_as_x(layout):
    x = make_x(2, 8, 9, layout=layout)
    y = causal_conv1d(x.requires_grad_(), torch.ones(8, 3))
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("name", testing.available("causal_conv1d", "cpu"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_packed_sequences_are_sequences(name, layout, width):
    """cu_seqlens, with empty sequences and ones shorter than the kernel, gives each sequence's own results."""
    lengths = [5, 0, 1, 70, 3, 0, 40]
    total, C = sum(lengths), 18
    cu = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make((1, C, total, width), layout=layout)
    inputs["initial_states"] = testing.make_input(len(lengths), C, width - 1)

    def alone(x, weight, bias, initial_states, activation):
        parts = [
            stock(part, weight, bias, state[None], activation)
            for part, state in zip(x.split(lengths, -1), initial_states)
            if part.shape[-1]
        ]
        states = iter([s for _, s in parts])
        finals = [next(states) if n else initial_states[i][None] for i, n in enumerate(lengths)]
        return torch.cat([y for y, _ in parts], -1), torch.cat(finals)

    check(name, inputs, want=alone, activation="silu", cu_seqlens=cu)


@pytest.mark.parametrize("name", testing.available("causal_conv1d", "cpu"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_seq_idx_cuts(name, layout):
    """Runs don't see each other; the first has the initial state, the last the final one, negative ones are padding."""
    B, C, T, width = 2, 18, 60, 4
    ids = torch.tensor([[0] * 7 + [1] * 2 + [2] * 40 + [5] * 11, [-1] * 3 + [0] * 50 + [0] * 5 + [-1] * 2])
    inputs = make((B, C, T, width), layout=layout, initial=True)

    def alone(x, weight, bias, initial_states, activation):
        ys, finals = [], []
        for b, cuts in enumerate(([0, 7, 9, 49, 60], [0, 3, 58, 60])):
            state, out = initial_states[b : b + 1], []
            for begin, end in itertools.pairwise(cuts):
                y, final = stock(x[b : b + 1, :, begin:end], weight, bias, state, activation)
                out.append(y if ids[b, begin] >= 0 else y * 0)
                state = torch.zeros_like(state)
            ys.append(torch.cat(out, -1))
            finals.append(final)
        return torch.cat(ys), torch.cat(finals)

    check(name, inputs, want=alone, activation="silu", seq_idx=ids)


def test_runs_do_not_leak():
    """NaN in one run, or in padding, stays there, forward and backward."""
    x = torch.randn(1, 4, 40)
    ids = torch.zeros(1, 40, dtype=torch.int32)
    ids[:, 10:20], ids[:, 20:] = -1, 1
    x[:, :, 10:20] = float("nan")
    x.requires_grad_()
    weight = torch.randn(4, 5, requires_grad=True)
    y = causal_conv1d(x, weight, seq_idx=ids, activation="silu")
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    for t in (y, dx, dweight):
        assert t.isfinite().all()
    assert y[:, :, 10:20].eq(0).all() and dx[:, :, 10:20].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunks_are_the_whole(data):
    """States carried from chunk to chunk, in any cut, give the whole sequence's bits."""
    B, C, T, width = (data.draw(st.integers(1, n)) for n in (2, 19, 50, 9))
    x = make_x(B, C, T, layout=data.draw(st.sampled_from(["contiguous", "channels_last"])))
    weight, bias = torch.randn(C, width), torch.randn(C)
    want, last = causal_conv1d(x, weight, bias, activation="silu", return_final_states=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    state, parts = None, []
    for begin, end in zip([0, *cuts], [*cuts, T]):
        part = x[:, :, begin:end]
        y, state = causal_conv1d(part, weight, bias, activation="silu", initial_states=state, return_final_states=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -1), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, last)


@pytest.mark.parametrize("name", testing.available("causal_conv1d", "cpu"))
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_update_continues(name, ring, T):
    B, C, width, S = 3, 21, 4, 5
    x = torch.randn(B, C, 4 * T)
    weight, bias = torch.randn(C, width), torch.randn(C)
    want = causal_conv1d(x, weight, bias, activation="silu")
    state = torch.zeros(B, S, C).transpose(1, 2)
    with testing.use(name) as impl:
        for step in range(4):
            position = torch.full((B,), step * T) if ring else None
            part = x[:, :, step * T : (step + 1) * T]
            got = causal_conv1d_update(part, state, weight, bias, activation="silu", position=position, impl=impl)
            torch.testing.assert_close(got, want[:, :, step * T : (step + 1) * T], rtol=1e-5, atol=1e-5)
    if ring:
        state = state[:, :, (torch.arange(4 * T - S, 4 * T)) % S]
    assert torch.equal(state, F.pad(x, (S, 0))[:, :, -S:])


@pytest.mark.parametrize("name", testing.available("causal_conv1d", "cpu"))
def test_update_of_slots(name):
    state = torch.randn(6, 4, 3)
    before, slots = state.clone(), torch.tensor([4, -1, 0])
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    with testing.use(name) as impl:
        y = causal_conv1d_update(x, state, weight, slots=slots, impl=impl)
    assert y[1].eq(0).all()
    for row, slot in ((0, 4), (2, 0)):
        h = torch.cat([before[slot], x[row][:, None]], -1)
        torch.testing.assert_close(y[row], (h * weight).sum(-1))
        assert torch.equal(state[slot], h[:, 1:])
    assert torch.equal(state[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[1], 4, requires_grad=True)
    initial = torch.randn(shape[0], shape[1], 3)
    y, final = causal_conv1d(x, weight, initial_states=initial, return_final_states=True)
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape and dweight.eq(0).all()
    if shape[2] == 0:
        assert torch.equal(final, initial)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_threads_or_batch(layout):
    x = make_x(3, 130, 700, layout=layout)
    weight, bias = torch.randn(130, 4, requires_grad=True), torch.randn(130, requires_grad=True)

    def run(x):
        x = x.detach().requires_grad_()
        y = causal_conv1d(x, weight, bias, activation="silu")
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, bias))

    want = run(x)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for got, w in zip(run(x), want):
            assert torch.equal(got, w)
    for got, w in zip(run(x[1:2])[:2], want):
        assert torch.equal(got, w[1:2])


@pytest.mark.graph
def test_registered_ops():
    inputs = make((2, 6, 10, 4), layout="channels_last", initial=True).values()
    ids, cu = torch.zeros(2, 10, dtype=torch.int32), torch.tensor([0, 4, 20], dtype=torch.int32)
    testing.check_op(_fwd, (*inputs, ids, None, 1, True, "cpu"))
    x, weight, bias, initial = make((1, 6, 20, 4), initial=True).values()
    testing.check_op(_fwd, (x, weight, None, None, None, cu, 0, False, "cpu"))
    testing.check_op(_bwd, (x, None, x, weight, bias, initial, None, None, 2, True, "cpu"))
    testing.check_op(_bwd, (x, None, x, weight, bias, None, None, cu, 0, False, "cpu"))
    torch.library.opcheck(_update, (x, torch.zeros(1, 6, 3), weight, bias, None, None, 1, "cpu"))


@pytest.mark.graph
def test_compile_and_export():
    def fn(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu", return_final_states=True)

    def args(B, C, T):
        return torch.randn(B, C, T, requires_grad=True), torch.randn(C, 4, requires_grad=True), torch.randn(C)

    testing.check_public(fn, args(2, 6, 10), args(3, 5, 33))


def test_gradcheck():
    x, weight, bias, initial = (t.double().requires_grad_() for t in make((2, 3, 6, 3), initial=True).values())

    def fn(x, weight, bias, initial):
        return causal_conv1d(x, weight, bias, activation="silu", initial_states=initial, return_final_states=True)

    assert torch.autograd.gradcheck(fn, (x, weight, bias, initial))
    assert torch.autograd.gradgradcheck(fn, (x, weight, bias, initial))


def test_second_derivatives():
    x, weight, bias, initial = (t.requires_grad_() for t in make((2, 3, 6, 3), initial=True).values())

    def penalty(impl):
        y = causal_conv1d(x, weight, bias, activation="gelu", initial_states=initial, impl=impl)
        grads = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight, bias, initial))

    for got, want in zip(penalty("cpu"), penalty("reference")):
        torch.testing.assert_close(got, want)


def test_transforms_and_autocast():
    x, weight = torch.randn(4, 2, 3, 9), torch.randn(3, 4)
    want = torch.stack([causal_conv1d(part, weight) for part in x])
    torch.testing.assert_close(torch.func.vmap(lambda x: causal_conv1d(x, weight))(x), want)
    with torch.autocast("cpu", dtype=BF16):
        y = causal_conv1d(x[0], weight)
    assert y.dtype == BF16 and torch.equal(y, causal_conv1d(x[0].bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 9)}, "x must be (B, C, T); got shape (3, 9)"),
        ({"x": torch.ones(2, 3, 9, dtype=torch.int64)}, "x must be a floating-point tensor; got torch.int64"),
        ({"weight": torch.ones(4, 4)}, "weight must be (C, width) with C = 3, width >= 1; got (4, 4)"),
        ({"weight": torch.ones(3, 0)}, "weight must be (C, width) with C = 3, width >= 1; got (3, 0)"),
        ({"bias": torch.ones(4)}, "bias must have shape (3,); got (4,)"),
        (
            {"weight": torch.ones(3, 4, dtype=BF16)},
            "weight must be torch.float32 as x, or torch.float32, on cpu; got torch.bfloat16 on cpu",
        ),
        ({"activation": "relu"}, 'activation must be None, "silu" or "gelu"; got \'relu\''),
        (
            {"initial_states": torch.ones(2, 3, 4)},
            "initial_states must be (2, 3, 3), torch.float32 on cpu; got (2, 3, 4), torch.float32 on cpu",
        ),
        (
            {"seq_idx": torch.zeros(2, 8, dtype=torch.int32)},
            "seq_idx must be int32 or int64 of shape (2, 9) on cpu; got torch.int32 of (2, 8) on cpu",
        ),
        ({"cu_seqlens": torch.tensor([0, 18])}, "cu_seqlens must be (N+1) for x with B = 1; got (2,) for B = 2"),
        ({"x": torch.ones(1, 3, 9), "cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens must rise from 0 to T = 9"),
        ({"impl": "fast"}, "impl must be one of cpu, cuda, triton, reference or None; got 'fast'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError) as error:
        causal_conv1d(**{"x": torch.ones(2, 3, 9), "weight": torch.ones(3, 4), **change})
    assert str(error.value) == f"causal_conv1d: {message}"


def test_bad_updates():
    x, weight = torch.ones(2, 3), torch.ones(3, 4)
    for state, kwargs, message in [
        (torch.zeros(2, 3, 2), {}, "state must be (slots, C, S) with S >= 3 and 2 slots; got (2, 3, 2)"),
        (torch.zeros(3, 3, 3), {}, "state must be (slots, C, S) with S >= 3 and 2 slots; got (3, 3, 3)"),
        (torch.zeros(4, 3, 3), {"slots": torch.tensor([1, 1])}, "slots must differ, or be negative; got 1 twice"),
        (torch.zeros(4, 3, 3), {"slots": torch.tensor([1, 4])}, "slots must be below 4, the slots of state; got 4"),
        (
            torch.zeros(2, 3, 3).requires_grad_(),
            {},
            "causal_conv1d_update has no gradients; use torch.no_grad() or causal_conv1d",
        ),
    ]:
        before = state.clone()
        with pytest.raises(ValueError) as error:
            causal_conv1d_update(x, state, weight, **kwargs)
        assert str(error.value) == f"causal_conv1d: {message}"
        assert torch.equal(state, before)


def test_raw_binding_refuses_before_it_writes():
    x, weight, y = torch.ones(2, 3, 9), torch.ones(3, 4), torch.full((2, 3, 9), 7.0)
    for args, message in [
        (
            (x.transpose(1, 2).contiguous().transpose(1, 2), weight, None, None, None, None, 0, y, None),
            "y must be contiguous in C",
        ),
        ((x, weight.bfloat16(), None, None, None, None, 0, y, None), "weight must be float32"),
        ((x, weight, None, None, None, None, 3, y, None), "activation must be 0, 1 or 2; got 3"),
        ((x, weight, None, x, None, None, 0, y, None), "initial must be (N, C, w-1)"),
    ]:
        with pytest.raises(ValueError, match="causal_conv1d: ") as error:
            _C.causal_conv1d_fwd(*args)
        assert message in str(error.value)
        assert y.eq(7).all()


def test_explain():
    assert mlcore.explain("causal_conv1d", torch.ones(1, 1, 1)).chosen == "cpu"
