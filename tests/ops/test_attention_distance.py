"""Attention with what depends on the distance alone (relative, ALiBi, T5), with sinks, and merged from parts."""

from __future__ import annotations

import pytest
import torch
from attention_suite import qkv

from mlcore import testing
from mlcore.ops import alibi_slopes, attention, merge_attention, t5_relative
from mlcore.ops._attention_positions import t5_buckets
from mlcore.patterns import Causal, Dense, Documents, GlobalTokens, Window

KERNELS = [name for name in testing.available("attention") if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, H, HKV, TQ, TK = 2, 4, 2, 70, 131


def by_hand(q, k, v, *, seen=None, relative=None, sinks=None, scale=None, softcap=None):
    """torch's unfused formula with the T x T bias that relative stands for, in the tensors' own dtype: (o, lse)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    Tq, Tk = s.shape[-2:]
    if relative is not None:
        s = s + relative.to(s.dtype)[..., torch.arange(Tk)[None] - torch.arange(Tq)[:, None] + Tq - 1]
    if seen is not None:
        s = s.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return torch.softmax(s, -1)[..., :Tk] @ v, torch.logsumexp(s, -1)


def compare(name, inputs, ours, theirs):
    """Outputs and gradients against float64, by the tolerance rule."""

    def run(**tensors):
        with testing.use(name) as impl:
            return ours(impl=impl, **tensors)

    def torch_way(**tensors):
        o, _ = theirs(**tensors)
        wide = {n: t if t.dtype == torch.float64 else t.float() for n, t in tensors.items()}
        return o, theirs(**wide)[1]

    testing.check_numerics(
        run, theirs, torch_way, inputs, terms=dict.fromkeys(("1", "q", "k", "v", "relative", "table", "slopes", "sinks"), 16.0)
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (H,), (B, 1), (B, H)], ids=str)
def test_relative_and_its_gradient(name, dtype, lead):
    lead = lead or (1,)
    inputs = {**qkv((B, H, HKV, TQ, TK, 24, 16), dtype), "relative": torch.randn(*lead, TQ + TK - 1)}
    compare(name, inputs, lambda **t: attention(**t, return_lse=True), by_hand)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 200), (200, 1), (127, 127), (130, 65)], ids=str)
def test_relative_at_any_length_with_every_other_argument(lengths):
    Tq, Tk = lengths
    pattern = Causal("top_left") & (Window(50, 0, align="top_left") | GlobalTokens(2, align="top_left"))
    inputs = {**qkv((1, 2, 1, Tq, Tk, 16, 16)), "relative": torch.randn(2, Tq + Tk - 1), "sinks": torch.randn(2)}
    compare(
        KERNELS[-1],
        inputs,
        lambda **t: attention(**t, pattern=pattern, softcap=2.5, scale=0.4, return_lse=True),
        lambda **t: by_hand(**t, seen=pattern.to_dense(Tq, Tk), softcap=2.5, scale=0.4),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alibi_with_learned_slopes(dtype):
    inputs = {**qkv((B, H, HKV, TQ, TK, 24, 16), dtype), "slopes": alibi_slopes(H).repeat(B, 1)}
    distance = (torch.arange(TQ + TK - 1) - (TK - 1)).abs()

    def theirs(q, k, v, slopes):
        relative = -slopes[..., None] * distance
        return by_hand(q, k, v, seen=Causal().to_dense(TQ, TK), relative=relative)

    compare(KERNELS[-1], inputs, lambda slopes, **t: attention(**t, alibi_slopes=slopes, causal=True, return_lse=True), theirs)


def test_alibi_is_what_the_paper_says():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    q, k, v = qkv((1, 2, 2, 3, 5, 8, 8)).values()
    slopes = torch.tensor([0.5, 0.0])
    i, j = torch.arange(3)[:, None], torch.arange(5)[None]
    bias = -slopes[:, None, None] * (i + 2 - j).abs()
    torch.testing.assert_close(attention(q, k, v, alibi_slopes=slopes), attention(q, k, v, bias=bias))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_table_and_its_gradient(bidirectional):
    transformers = pytest.importorskip("transformers")
    t5 = transformers.models.t5.modeling_t5.T5Attention
    distance = torch.arange(-700, 700)
    assert torch.equal(t5_buckets(distance, 32, bidirectional), t5._relative_position_bucket(distance, bidirectional, 32, 128))
    inputs = {**qkv((B, H, HKV, TQ, TK, 24, 16)), "table": torch.randn(32, H)}

    def theirs(q, k, v, table):
        i, j = torch.arange(TQ)[:, None] + TK - TQ, torch.arange(TK)[None]
        bias = table[t5._relative_position_bucket(j - i, bidirectional, 32, 128)].permute(2, 0, 1)
        k, v = (t.repeat_interleave(H // HKV, 1) for t in (k, v))
        s = q @ k.mT * q.shape[-1] ** -0.5 + bias
        return s.softmax(-1) @ v, s.logsumexp(-1)

    def ours(table, **t):
        return attention(**t, relative=t5_relative(table, TQ, TK, bidirectional=bidirectional), return_lse=True)

    compare(KERNELS[-1], inputs, ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_and_their_gradient(name, dtype):
    seen = torch.rand(TQ, TK) > 0.5
    seen[5:9] = False  # these rows see their sink alone
    inputs = {**qkv((B, H, HKV, TQ, TK, 24, 16), dtype), "sinks": torch.randn(H)}
    compare(name, inputs, lambda **t: attention(**t, pattern=Dense(seen), return_lse=True), lambda **t: by_hand(**t, seen=seen))


def test_sinks_of_great_size():
    q, k, v = qkv((1, 2, 2, 9, 70, 8, 8)).values()
    o, lse = attention(q, k, v, sinks=torch.tensor([200.0, -200.0]), return_lse=True)
    assert (o[:, 0].abs() < 1e-30).all() and (lse[:, 0] == 200).all()
    torch.testing.assert_close(o[:, 1], attention(q, k, v)[:, 1])


def test_bits_do_not_depend_on_the_thread_count():
    inputs = {**qkv((B, H, HKV, 230, 230, 24, 16)), "relative": torch.randn(H, 459), "sinks": torch.randn(H)}

    def run(threads):
        torch.set_num_threads(threads)
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        o, lse = attention(**leaves, causal=True, return_lse=True)
        return o.detach(), lse.detach(), *torch.autograd.grad(o.sum() + lse.sum(), list(leaves.values()))

    first = run(1)
    for threads in (2, 2, 3):
        for got, want in zip(run(threads), first):
            assert torch.equal(got, want)


@pytest.mark.graph
def test_compiles_and_knows_autocast():
    def layer(q, k, v, table, slopes, sinks):
        relative = t5_relative(table, q.shape[2], k.shape[2])
        return attention(q * 2, k, v, relative=relative, alibi_slopes=slopes, sinks=sinks, causal=True)

    def arguments(Tq, Tk):
        tensors = [*qkv((2, 4, 2, Tq, Tk, 16, 24)).values(), torch.randn(8, 4), alibi_slopes(4), torch.randn(4)]
        return [t.requires_grad_() for t in tensors]

    testing.check_public(layer, arguments(33, 40), arguments(70, 131))
    tensors = arguments(33, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(*tensors).dtype == torch.bfloat16


def test_second_derivatives():
    q, k, v = (t.double().requires_grad_() for t in qkv((1, 2, 1, 3, 4, 3, 2)).values())
    relative, sinks = torch.randn(2, 6).double().requires_grad_(), torch.randn(2).double().requires_grad_()

    def fn(q, k, v, relative, sinks):
        return attention(q, k, v, relative=relative, sinks=sinks, causal=True)

    assert torch.autograd.gradcheck(fn, (q, k, v, relative, sinks))
    assert torch.autograd.gradgradcheck(fn, (q, k, v, relative, sinks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_parts_is_attention_over_their_union(dtype):
    inputs = qkv((B, H, HKV, TQ, TK, 24, 16), dtype)
    whole = Causal() & Documents([0, 30, 60, TQ], [0, 20, 100, TK])

    def ours(q, k, v):
        parts = [(slice(0, 50), 0), (slice(50, 90), 50), (slice(90, TK), 90)]
        seen = whole.to_dense(TQ, TK)
        results = [attention(q, k[:, :, s], v[:, :, s], pattern=seen[:, s], return_lse=True) for s, _ in parts]
        o, lse = merge_attention(results)
        return o, torch.where(lse == float("-inf"), lse.detach(), lse)

    def theirs(q, k, v):
        o, lse = attention(q, k, v, pattern=whole, return_lse=True, impl="reference")
        return o, torch.where(lse == float("-inf"), lse.detach(), lse)

    leaves = [t.double().requires_grad_() for t in inputs.values()]
    narrow = [t.clone().requires_grad_() for t in inputs.values()]
    results = []
    for fn, tensors in ((ours, narrow), (theirs, leaves)):
        o, lse = fn(*tensors)
        results.append((o, lse, *torch.autograd.grad(o.double().sin().sum() + lse[lse.isfinite()].double().sum(), tensors)))
    for got, want in zip(*results):
        loose = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=loose, atol=loose)
    assert torch.autograd.gradcheck(
        lambda *t: merge_attention([t[:2], t[2:]]),
        [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3), (2, 3, 4), (2, 3))],
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"relative": torch.randn(H, TQ + TK)}, r"relative must be .* got shape \(4, 201\)"),
        ({"relative": torch.randn(TQ + TK - 1)}, "relative must be"),
        ({"relative": torch.ones(1, TQ + TK - 1, dtype=torch.int64)}, "relative must be floating"),
        ({"alibi_slopes": torch.randn(3)}, r"alibi_slopes must be floating, \(H,\) or \(B, H\)"),
        ({"sinks": torch.randn(2)}, r"sinks must be floating, \(H,\) = \(4,\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_raise_one_clear_line(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        attention(**qkv((B, H, HKV, TQ, TK, 8, 8)), **change)
    assert "\n" not in str(caught.value)


def test_bad_parts_raise():
    with pytest.raises(ValueError, match="merge_attention: parts must be pairs"):
        merge_attention([])
    with pytest.raises(ValueError, match="merge_attention: parts must be pairs"):
        merge_attention([(torch.ones(2, 3), torch.ones(3))])
    with pytest.raises(ValueError, match=r"t5_relative: table must be \(buckets, H\)"):
        t5_relative(torch.ones(3), 4, 4)
    with pytest.raises(ValueError, match="alibi_slopes: heads must be at least 1; got 0"):
        alibi_slopes(0)
