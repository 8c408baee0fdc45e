"""mlcore.patterns: what they mean, that the lowering to tiles says the same, and attention over them against float64."""

from __future__ import annotations

import time

import pytest
import torch
from attention_suite import check, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import mlcore
from mlcore import _C, testing
from mlcore.ops import _attention_schedule as schedules
from mlcore.ops import attention
from mlcore.patterns import (
    Blocks,
    Causal,
    Clusters,
    Dense,
    Documents,
    Full,
    GlobalTokens,
    Graph,
    Lengths,
    Pattern,
    PerHead,
    Strided,
    Window,
)

KERNELS = [name for name in testing.available("attention") if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, H, TQ, TK = 2, 3, 190, 210
CU, CU_K = torch.tensor([0, 10, 10, 100, 180]), torch.tensor([0, 30, 60, 60, 201])


def random(*shape, density=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < density


def ids(*shape):
    return torch.randint(-1, 5, shape, generator=torch.Generator().manual_seed(sum(shape)))


PATTERNS = {
    "full": Full(),
    "causal": Causal(),
    "causal top left": Causal("top_left"),
    "window": Window(10, 5),
    "one side": Window(None, 3),
    "dilated": Window(3, 4, dilation=7),
    "causal window": Causal() & Window(20, 5, align="top_left"),
    "nobody": Window(0, 0) & Window(0, 0, align="top_left"),
    "strided": Strided(5),
    "far strided": Strided(100),
    "columns": Strided(9, phase=3),
    "far columns": Strided(70, phase=69),
    "first tokens": GlobalTokens(4),
    "some tokens": GlobalTokens([3, 4, 90, 150]),
    "no token": GlobalTokens([]),
    "documents": Documents(CU),
    "documents of two lengths": Documents(CU, CU_K),
    "aligned documents": Documents(CU, CU_K, inside=Causal() & Window(20, 0)),
    "strange documents": Documents(CU, CU_K, inside=~Window(2, 3) | GlobalTokens(2) | Blocks(random(2, 2), 30)),
    "no documents": Documents(torch.tensor([0])),
    "lengths": Lengths(torch.tensor([100, 201]), torch.tensor([190, 3]), inside=Causal()),
    "no lengths": Lengths(torch.tensor([0, 7])),
    "blocks": Blocks(random(13, 15), 15),
    "blocks by sequence": Blocks(random(2, 1, 4, 5), (50, 64)),
    "graph": Graph(random(TQ, TK, density=0.01)),
    "sparse graph": Graph(random(TQ, TK, density=0.01).float().to_sparse()),
    "csr graph": Graph(random(TQ, TK, density=0.01).float().to_sparse_csr()),
    "clusters": Clusters(ids(TQ), ids(TK)),
    "sorted clusters": Clusters(ids(TQ).sort().values, ids(TK).sort().values),
    "clusters by head": Clusters(ids(2, 1, TQ), ids(1, 3, TK)),
    "dense": Dense(random(3, TQ, TK)),
    "keys": Dense(random(2, 1, 1, TK)),
    "heads": PerHead([Causal(), Window(10, 10), Full()]),
    "not a graph": ~Graph(random(TQ, TK)),
    "mask in a window": Causal() & Dense(random(TQ, TK)) & Window(50, 50),
    "all together": (Causal() | GlobalTokens(7)) & ~Strided(3) & PerHead([Full(), Documents(CU, CU_K), Causal("top_left")]),
}


def as_dense(s, Tq, Tk):
    """The matrix that a schedule means, as attention.h defines it. One thread: waiting for more costs more."""
    torch.set_num_threads(1)
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)[None]
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    if s.left >= 0:
        seen &= j >= i + s.offset - s.left
    if s.right >= 0:
        seen &= j <= i + s.offset + s.right
    if s.row_ptr is None:
        return seen[None, None]
    q_tiles, k_tiles = -(-Tq // 64), -(-Tk // 64)
    if len(s.row_ptr) == s.set_b * s.set_h + 1:  # the same for all queries
        q_tiles, Tq = 1, 64
    rows = s.set_b * s.set_h * q_tiles
    listed = torch.zeros(rows, k_tiles, 64, 64, dtype=torch.bool)  # key, query
    row = torch.repeat_interleave(torch.arange(rows), s.row_ptr.diff())
    words = s.bits[s.ids.clamp(min=0).long()] if len(s.bits) else torch.zeros(len(s.ids), 64, dtype=torch.int64)
    words = torch.where((s.ids < 0)[:, None], -1, words)
    listed[row, s.cols.long()] = ((words[..., None] >> torch.arange(64)) & 1).bool()
    full = listed.view(s.set_b, s.set_h, q_tiles, k_tiles, 64, 64).permute(0, 1, 2, 5, 3, 4)
    full = full.reshape(s.set_b, s.set_h, q_tiles * 64, k_tiles * 64)[:, :, :Tq, :Tk]
    return full[:, :, :1] & seen if q_tiles == 1 and Tq == 64 else full & seen


def lowered(pattern, Tq, Tk):
    return schedules.schedule(pattern.spec, pattern.tensors, B, H, Tq, Tk)


def assert_same(pattern, Tq, Tk):
    s = lowered(pattern, Tq, Tk)
    got = as_dense(s, Tq, Tk).expand(B, H, Tq, Tk)
    assert torch.equal(got, pattern.to_dense(Tq, Tk).expand(B, H, Tq, Tk)), pattern
    if s.bits is not None and len(s.bits):
        assert len(torch.unique(s.bits, dim=0)) == len(s.bits) or pattern.spec.endswith("('dense',)")
    return s


# What patterns mean, pair by pair.


def brute(Tq, Tk, rule):
    return torch.tensor([[bool(rule(i, j)) for j in range(Tk)] for i in range(Tq)])


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (Causal(), lambda i, j: j <= i + 4),
        (Causal("top_left"), lambda i, j: j <= i),
        (Window(2, 1), lambda i, j: i + 4 - 2 <= j <= i + 4 + 1),
        (Window(2, None, align="top_left"), lambda i, j: j >= i - 2),
        (Window(2, 1, dilation=3), lambda i, j: j - (i + 4) in (-6, -3, 0, 3)),
        (Strided(3), lambda i, j: (i + 4 - j) % 3 == 0),
        (Strided(3, align="top_left"), lambda i, j: (i - j) % 3 == 0),
        (Strided(3, phase=2), lambda i, j: j % 3 == 2),
        (GlobalTokens(6), lambda i, j: i + 4 < 6 or j < 6),
        (GlobalTokens(2, align="top_left"), lambda i, j: i < 2 or j < 2),
        (GlobalTokens([5, 1]), lambda i, j: i + 4 in (1, 5) or j in (1, 5)),
        (Documents([0, 2, 2, 5], [0, 3, 5, 9]), lambda i, j: (i < 2 and j < 3) or (2 <= i < 5 and 5 <= j < 9)),
        (
            Documents([0, 2, 2, 5], [0, 3, 5, 9], inside=Causal()),
            lambda i, j: (i < 2 and j < 3 and j <= i + 1) or (2 <= i < 5 and 5 <= j < 9 and j - 5 <= i - 2 + 1),
        ),
        (Blocks(torch.tensor([[True, False], [False, True]]), (4, 6)), lambda i, j: i // 4 == j // 6),
        (Clusters(torch.tensor([0, 1, -1, 1, 0, 2, 2]), torch.arange(11) % 3 - 1), None),
        (~Causal() | Strided(2), lambda i, j: j > i + 4 or (i + 4 - j) % 2 == 0),
        (
            Graph.from_edges(torch.tensor([[0, 6, 6, 6], [10, 0, 1, 1]]), 7, 11),
            lambda i, j: (i, j) in ((0, 10), (6, 0), (6, 1)),
        ),
    ],
    ids=lambda x: repr(x) if isinstance(x, Pattern) else "",
)
def test_meaning(pattern, rule):
    if rule is None:
        q, k = pattern.tensors
        rule = lambda i, j: q[i] == k[j] and q[i] >= 0  # noqa: E731
    assert torch.equal(pattern.to_dense(7, 11), brute(7, 11, rule))


def test_lengths_meet_their_own_diagonal():
    seen = Lengths([3, 0, 5], [2, 2, 1], inside=Causal()).to_dense(2, 5)
    want = [brute(2, 5, lambda i, j, q=q, k=k: i < q and j < k and j <= i + k - q) for k, q in ((3, 2), (0, 2), (5, 1))]
    assert torch.equal(seen, torch.stack(want)[:, None])


def test_text():
    assert repr(Causal() & Window(255, 0)) == "Causal() & Window(255, 0)"
    assert repr(~(Causal() | GlobalTokens(3)) & Strided(2, phase=1)) == "~(Causal() | GlobalTokens(3)) & Strided(2, phase=1)"
    assert repr(Documents([0, 4, 9], inside=Causal("top_left"))) == "Documents(<2 documents>, inside=Causal(align='top_left'))"
    assert repr(PerHead([Full(), Window(1, None, dilation=2)])) == "PerHead([Full(), Window(1, None, dilation=2)])"


# The lowering.


@pytest.mark.parametrize("name", PATTERNS)
def test_lowering_says_what_the_pattern_means(name):
    assert_same(PATTERNS[name], TQ, TK)


def test_bands_are_computed_and_not_stored():
    for pattern in (Causal(), Window(3, 4) & Causal("top_left"), Window(None, 4) & Causal()):
        for lengths in ((TQ, TK), (TK, TQ), (1, 239), (239, 1)):
            assert assert_same(pattern, *lengths).row_ptr is None


LEAVES = st.one_of(
    st.just(Full()),
    st.builds(Causal, st.sampled_from(["bottom_right", "top_left"])),
    st.builds(Window, st.none() | st.integers(0, 150), st.none() | st.integers(0, 150), st.integers(1, 5)),
    st.builds(Strided, st.integers(1, 140)),
    st.builds(lambda s, p: Strided(s, phase=p % s), st.integers(1, 140), st.integers(0, 139)),
    st.builds(GlobalTokens, st.integers(0, 80) | st.lists(st.integers(0, 220), max_size=4)),
    st.builds(
        lambda cuts, inside: Documents([0, *sorted(cuts)], inside=inside),
        st.lists(st.integers(0, 150), max_size=6),
        st.none() | st.sampled_from([Causal(), ~Window(3, 70), Strided(3) | GlobalTokens(1)]),
    ),
    st.builds(lambda n, inside: Lengths([n, 150], [150, n], inside), st.integers(0, 150), st.none() | st.just(Causal())),
    st.builds(
        lambda seed, bk: Blocks(random(30, 230 // bk + 1, density=seed / 3), (8, bk)), st.integers(0, 3), st.integers(1, 70)
    ),
)
ALGEBRA = st.recursive(
    LEAVES,
    lambda p: st.one_of(st.builds(lambda a, b: a & b, p, p), st.builds(lambda a, b: a | b, p, p), st.builds(lambda a: ~a, p)),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(ALGEBRA, st.integers(150, 230), st.integers(150, 230))
def test_algebra_is_lowered_to_what_it_means(pattern, Tq, Tk):
    assert_same(pattern, Tq, Tk)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(ALGEBRA.filter(lambda p: "lengths" not in p.spec), min_size=3, max_size=3), st.integers(0, 2**32))
def test_heads_and_masks_in_the_algebra(heads, seed):
    mask = torch.rand(2, 1, 160, 150, generator=torch.Generator().manual_seed(seed)) < 0.9
    assert_same(PerHead(heads) & Dense(mask), 160, 150)
    assert_same(PerHead(heads) | Graph((~mask[1, 0]).float().to_sparse()), 160, 150)


def test_schedules_are_kept_while_their_tensors_stay_what_they_are():
    schedules.clear_cache()
    cu = torch.tensor([0, 60, 150])
    pattern = Documents(cu) & Causal()
    first = lowered(pattern, TQ, TK)
    assert lowered(Documents(cu) & Causal(), TQ, TK) is first
    assert lowered(pattern, TQ, TK + 1) is not first
    cu[1] = 100
    assert_same(pattern, TQ, TK)
    assert len(schedules._cache) == 2
    del cu, pattern
    assert len(schedules._cache) == 0
    with torch.inference_mode():
        cu = torch.tensor([0, 60, 150])
        for end in (60, 100):
            cu[1] = end
            assert_same(Documents(cu), TQ, TK)
    assert len(schedules._cache) == 0


def test_a_long_window_is_cheap():
    T = 1 << 20
    start = time.perf_counter()
    s = lowered(Window(256, 0), T, T)
    assert s.row_ptr is None and time.perf_counter() - start < 0.05
    s = lowered(Causal() & (Window(256, 0) | GlobalTokens(16)), T, T)
    assert sum(t.numel() * t.element_size() for t in s[3:7]) < 10e6 and len(s.bits) < 10


# Attention over patterns.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_float64(pattern, dtype):
    check(KERNELS[-1], qkv((B, H, H, TQ, TK, 16, 8), dtype), pattern=PATTERNS[pattern])


@pytest.mark.parametrize("name", KERNELS[:-1])
@pytest.mark.parametrize("pattern", ["dilated", "aligned documents", "clusters by head", "all together"])
def test_lower_levels_match_float64(name, pattern):
    check(name, qkv((B, H, H, TQ, TK, 16, 8)), pattern=PATTERNS[pattern])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["window", "all together", "aligned documents", "lengths"])
def test_with_every_other_argument(pattern, dtype):
    inputs = {**qkv((B, H, H, TQ, TK, 16, 24), dtype), "bias": testing.make_input(1, H, TQ, TK, dtype=dtype)}
    check(KERNELS[-1], inputs, pattern=PATTERNS[pattern], causal=True, softcap=2.5, scale=0.3)


@pytest.mark.parametrize("pattern", ["dilated", "all together", "documents of two lengths"])
def test_dropout_with_a_pattern(pattern):
    inputs = qkv((B, H, H, TQ, TK, 16, 24))

    def run(impl):
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        o = attention(*leaves, pattern=PATTERNS[pattern], dropout_p=0.2, impl=impl)
        return o.detach(), *torch.autograd.grad(o.square().sum(), leaves)

    for got, want in zip(run("cpu"), run("reference")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["dilated", "all together", "aligned documents", "graph"])
def test_bits_do_not_depend_on_the_thread_count(pattern):
    inputs = qkv((B, H, H, TQ, TK, 16, 24), torch.bfloat16)

    def run(threads):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        o, lse = attention(*leaves, pattern=PATTERNS[pattern], return_lse=True)
        return o.detach(), lse.detach(), *torch.autograd.grad(o.float().sum() + lse[lse.isfinite()].sum(), leaves)

    first = run(1)
    for threads in (2, 2, 3):
        for got, want in zip(run(threads), first):
            assert torch.equal(got, want)


def test_a_rows_bits_do_not_depend_on_what_stands_around_it():
    """A sequence alone, in a batch, and with other tiles in its row of the schedule."""
    inputs = qkv((3, 4, 2, 230, 230, 40, 40))
    pattern = Causal() & Window(70, 0)
    whole = attention(*inputs.values(), pattern=pattern)
    assert torch.equal(whole[1:2], attention(*(t[1:2] for t in inputs.values()), pattern=pattern))
    assert torch.equal(whole, attention(*inputs.values(), pattern=Dense(pattern.to_dense(230, 230))))
    assert torch.equal(whole, attention(*inputs.values(), pattern=pattern & (Documents([0, 230]) | Strided(3))))
    step = attention(inputs["q"][:, :, -1:], inputs["k"], inputs["v"], pattern=pattern)
    assert torch.equal(whole[:, :, -1:], step)
    packed = attention(*inputs.values(), pattern=Documents([0, 64, 192, 230], inside=pattern))
    alone = attention(*(t[:, :, 64:192] for t in inputs.values()), pattern=pattern)
    assert torch.equal(packed[:, :, 64:192], alone)


def test_unseen_keys_may_hold_anything():
    inputs = qkv((1, 2, 2, TQ, TQ, 24, 24))
    pattern = Window(10, 0) & Documents([0, 70, 100, TQ])
    dirty = {n: t.clone() for n, t in inputs.items()}
    for n in ("k", "v"):
        dirty[n][:, :, 80] = float("nan")
    rows = (~pattern.to_dense(TQ)[:, 80]).nonzero().squeeze(1)

    def run(tensors):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        o = attention(*leaves, pattern=pattern)
        return o.detach()[:, :, rows], torch.autograd.grad(o[:, :, rows].sum(), leaves[0])[0][:, :, rows]

    for got, want in zip(run(dirty), run(inputs)):
        assert torch.equal(got, want)


@pytest.mark.graph
def test_compiles_and_exports():
    local = Causal() & (Window(20, 0) | GlobalTokens(3))

    def layer(q, k, v, cu):
        return attention(q * 2, k, v, pattern=(local | Window(2, 0)) & Documents(cu))

    def arguments(T):
        return [*(t.requires_grad_() for t in qkv((2, 4, 2, T, T, 16, 24)).values()), torch.tensor([0, 10, T])]

    testing.check_public(layer, arguments(33), arguments(70))


@pytest.mark.graph
def test_one_tensor_as_several_arguments_compiles():
    torch._dynamo.reset()

    def gradient(fn):
        x = qkv((1, 2, 2, 9, 9, 8, 8))["q"].requires_grad_()
        return torch.autograd.grad(fn(x).square().sum(), x)[0]

    torch.manual_seed(3)
    want = gradient(lambda x: attention(x, x, x, causal=True))
    torch.manual_seed(3)
    got = gradient(torch.compile(lambda x: attention(x, x, x, causal=True), fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want)  # the three parts are added in another order


@pytest.mark.graph
def test_one_tensor_twice_in_a_pattern_compiles():
    def layer(q, k, v, cu):
        return attention(
            q * 2, k, v, pattern=(Documents(cu) & Causal()) | Documents(cu, inside=Window(1, 1)) | Documents(cu, cu)
        )

    def arguments(T):
        return [*(t.requires_grad_() for t in qkv((2, 4, 2, T, T, 16, 24)).values()), torch.tensor([0, 10, T])]

    testing.check_public(layer, arguments(33), arguments(70))


def test_second_derivatives_and_transforms():
    leaves = [t.double().requires_grad_() for t in qkv((1, 2, 1, 5, 6, 3, 2)).values()]
    pattern = Causal() & (Window(2, 0) | GlobalTokens(1))
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, pattern=pattern), leaves)
    q, k, v = (t.detach().float().requires_grad_() for t in leaves)
    (g,) = torch.autograd.grad(attention(q, k, v, pattern=pattern).square().sum(), q, create_graph=True)
    wide = [t.detach().requires_grad_() for t in leaves]
    (w,) = torch.autograd.grad(attention(*wide, pattern=pattern).square().sum(), wide[0], create_graph=True)
    got, want = torch.autograd.grad(g.square().sum(), k)[0], torch.autograd.grad(w.square().sum(), wide[1])[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(
        lambda x: attention(x, k.detach(), v.detach(), pattern=pattern), (q.detach(),), (torch.ones_like(q),)
    )
    assert tangent.isfinite().all()


def test_explains_what_a_pattern_costs():
    q, k, v = qkv((1, 2, 2, 256, 256, 8, 8)).values()
    text = str(mlcore.explain("attention", q, k, v, pattern=Causal() & Window(63, 0)))
    assert "7 of 16 tiles" in text and "7 masked" in text, text
    assert "11 of 32 tiles" in str(
        mlcore.explain("attention", q, k, v, pattern=PerHead([Causal() & Window(63, 0), Window(0, 0)]))
    )


def test_plot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = PATTERNS["heads"].plot(16)
    assert ax.images[0].get_array().shape == (16, 16)
    pyplot.close("all")


# What is refused.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(-1, 0), "Window: left must be an integer of at least 0; got -1"),
        (lambda: Window(1, 0, dilation=0), "dilation must be an integer of at least 1"),
        (lambda: Causal("middle"), "align must be 'bottom_right' or 'top_left'; got 'middle'"),
        (lambda: Strided(3, phase=3), "phase must be below stride 3; got 3"),
        (lambda: Documents(torch.zeros(2, 2).long()), r"must be \(N \+ 1,\) both"),
        (lambda: Documents(torch.zeros(2)), "must be an integer tensor; got torch.float32"),
        (lambda: Documents([0, 3], inside=Graph(torch.ones(3, 3))), "inside must be a pattern of positions alone"),
        (lambda: Blocks(torch.ones(2, 2), 3), "mask must be a boolean tensor; got torch.float32"),
        (lambda: Clusters(torch.zeros(1, 1, 1, 1).long()), "q_ids and k_ids must be"),
        (lambda: PerHead([]), "patterns must be a sequence of patterns"),
        (lambda: PerHead([PerHead([Full()])]), "must not be PerHead themselves"),
    ],
)
def test_bad_patterns_raise_one_clear_line(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_python_logic_is_refused():
    with pytest.raises(TypeError, match="combine by &"):
        Causal() and Window(1, 1)
    with pytest.raises(TypeError, match="combines two patterns"):
        Causal() & torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Documents([0, 191]), "cu_seqlens must rise from 0 to at most 190"),
        (Documents([1, 19]), "cu_seqlens must rise from 0"),
        (Documents([0, 19, 3]), "cu_seqlens must rise from 0"),
        (Lengths([1, 211]), "k_lengths must be 0 to 210; got 1 to 211"),
        (Lengths([1, 2, 3]), "lengths of 3 sequences, q has 2"),
        (Blocks(random(3, 4), 60), "must cover all 190 queries and 210 keys; they cover 180, 240"),
        (Graph(torch.ones(190, 211).to_sparse()), "the adjacency is 190 x 211, the call has 190 queries and 210 keys"),
        (Graph.from_edges(torch.tensor([[0], [300]]), 190, 210), "edges must be within 190 x 210"),
        (Graph(torch.ones(190, 211)), r"must broadcast to .* \(..., 190, 210\)"),
        (Clusters(ids(191), ids(210)), "ids must be given for 190 queries and 210 keys; got 191, 210"),
        (PerHead([Full(), Full()]), "pattern has 2 heads, q has 3"),
        (Dense(random(2, TQ, TK)) & Strided(2), "pattern is for 2 heads, q has 3"),
        (GlobalTokens([-1, 3]), "positions must not be negative; got -1"),
    ],
    ids=lambda x: repr(x) if isinstance(x, Pattern) else "",
)
def test_patterns_that_do_not_fit_the_call(pattern, words):
    with pytest.raises(ValueError, match=words) as caught:
        attention(*qkv((B, H, H, TQ, TK, 8, 8)).values(), pattern=pattern)
    assert "\n" not in str(caught.value)


def test_raw_lowering_checks_its_program():
    row_ptr, counts = torch.empty(5, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    room = [torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32), torch.empty(4, 64, dtype=torch.int64)]

    def lower(*program):
        _C.attention_lower(torch.tensor(program), 256, 256, row_ptr, *room, counts)

    for program, words in (
        ((0,), "number of sets"),
        ((1, 9), "no set 0"),
        ((1, 2, 99), "no pattern of kind 99"),
        ((1, 2, 0, 1), "cut short"),
        ((1, 2, 1, 0, 0), "positive size"),
        ((1, 2, 4, 1, 0, 300, 0, 3, 0), "cu_seqlens must end at 256"),
        ((1, 2, 4, 1, 0, 3, 0, 3, 1, 6), "can't stand inside"),
        ((1, 2, 8, 1 << 40), "must have a length"),
        ((1, 2, *[10] * 70), "nest less than 64"),
    ):
        with pytest.raises(ValueError, match=words):
            lower(*program)
    lower(1, 2, 0, 3, 3, 0)  # a window touches 10 tiles: no room, nothing written but the counts
    assert counts.tolist() == [10, 3]
