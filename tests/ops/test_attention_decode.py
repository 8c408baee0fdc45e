"""mlcore.ops.attention_with_kvcache: what a cache holds, and that decoding gives the bits of a prefill."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from mlcore import _C, testing
from mlcore.ops import _attention_decode, attention, attention_with_kvcache, rotate
from mlcore.patterns import Causal, Window

B, H, HKV, T, D, DV = 3, 4, 2, 150, 24, 16


def tensors(dtype=torch.float32, H=H):
    return [torch.randn(B, h, T, d).to(dtype) for h, d in ((H, D), (HKV, D), (HKV, DV))]


def pages_of(k, v, size):
    """Paged caches with the pages of all sequences shuffled, and their table."""
    n = -(-T // size)
    table = torch.randperm(B * n).view(B, n)
    caches = [torch.full((B * n, t.shape[1], size, t.shape[3]), float("nan"), dtype=t.dtype) for t in (k, v)]
    return *caches, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, (40, None)], ids=str)
@pytest.mark.parametrize("page", [None, 1, 16, 128])
def test_token_by_token_is_bitwise_the_prefill(dtype, window, page):
    q, k, v = tensors(dtype)
    want = attention(q, k, v, pattern=Causal() & Window(*(window or (None, None))))
    if page is None:
        kc, vc, table = torch.full_like(k, float("nan")), torch.full_like(v, float("nan")), None
    else:
        kc, vc, table = pages_of(k, v, page)
    cuts, got = [0, 100, 101, 102, 130, 149, T], []
    for a, b in itertools.pairwise(cuts):
        got.append(
            attention_with_kvcache(
                q[:, :, a:b], kc, vc, k[:, :, a:b], v[:, :, a:b], cache_seqlens=a, page_table=table, window=window
            )
        )
    assert torch.equal(torch.cat(got, 2), want)


def test_lengths_of_their_own():
    q, k, v = tensors()
    lengths = torch.tensor([0, 31, 149])
    kc, vc = k.clone(), v.clone()
    for b, n in enumerate(lengths.tolist()):
        kc[b, :, n:] = vc[b, :, n:] = float("nan")
    new = [t[:, :, :1] for t in (k, v)]
    for heads in (q[:, :, :1], q[:, :HKV, :1]):
        o, lse = attention_with_kvcache(heads, kc, vc, *new, cache_seqlens=lengths, return_lse=True)
        for b, n in enumerate(lengths.tolist()):
            keys, values = (torch.cat([c[b : b + 1, :, :n], x[b : b + 1]], 2) for c, x in zip((k, v), new))
            alone = attention(heads[b : b + 1], keys, values, return_lse=True)
            assert torch.equal(o[b : b + 1], alone[0]) and torch.equal(lse[b : b + 1], alone[1])
    assert torch.equal(kc[1, :, 31], k[1, :, 0]) and kc[1, :, 32:].isnan().all() and torch.equal(kc[2, :, :149], k[2, :, :149])


def test_queries_of_short_sequences_see_nothing_before_their_start():
    q, k, v = tensors()
    o, lse = attention_with_kvcache(q[:, :, :5], k, v, cache_seqlens=torch.tensor([0, 2, 150]), return_lse=True)
    assert (o[0] == 0).all() and (lse[0] == float("-inf")).all() and (o[1, :, :3] == 0).all() and (lse[1, :, 3:] > -100).all()
    want = attention(q[1:2, :, 3:5], k[1:2, :, :2], v[1:2, :, :2], causal=True)
    assert torch.equal(o[1:2, :, 3:5], want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_at_each_position(interleaved):
    q, k, v = tensors()
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    cos, sin = angle.cos(), angle.sin()
    turned = [rotate(t, cos, sin, interleaved) for t in (q, k)]
    pairs = q[..., :16].unflatten(-1, (8, 2)) if interleaved else q[..., :16].unflatten(-1, (2, 8)).transpose(-1, -2)
    by_hand = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    got = (
        turned[0][..., :16].unflatten(-1, (8, 2))
        if interleaved
        else turned[0][..., :16].unflatten(-1, (2, 8)).transpose(-1, -2)
    )
    torch.testing.assert_close(got, torch.view_as_real(by_hand))
    assert torch.equal(turned[0][..., 16:], q[..., 16:])
    want = attention(*turned, v, causal=True)
    kc, vc = torch.zeros_like(k), torch.zeros_like(v)
    got = []
    for a, b in ((0, 99), (99, 100), (100, T)):
        got.append(
            attention_with_kvcache(
                q[:, :, a:b], kc, vc, k[:, :, a:b], v[:, :, a:b], cache_seqlens=a,
                rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved,
            )
        )  # fmt: skip
    assert torch.equal(torch.cat(got, 2), want)


def test_with_alibi_sinks_and_softcap():
    q, k, v = tensors()
    slopes, sinks = torch.rand(H), torch.randn(H)
    options = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 3.0, "scale": 0.4}
    want = attention(q, k, v, causal=True, **options)
    for n in (1, 40):
        got = attention_with_kvcache(q[:, :, -n:], k, v, cache_seqlens=T, **options)
        torch.testing.assert_close(got, want[:, :, -n:], rtol=1e-5, atol=1e-6)


def test_every_key_without_causality():
    q, k, v = tensors()
    got = attention_with_kvcache(q[:, :, :7], k, v, cache_seqlens=100, causal=False)
    assert torch.equal(got, attention(q[:, :, :7], k[:, :, :100], v[:, :, :100]))


LEVELS = [name[4:-1] for name in testing.available("attention") if name.startswith("cpu")]
SHAPES = [  # H, Hkv, Tq, D, Dv, T
    (4, 4, 1, 64, 64, 1000),
    (8, 1, 1, 59, 111, 700),
    (4, 2, 5, 128, 80, 239),
    (2, 2, 16, 8, 8, 65),
    (15, 1, 1, 256, 32, 130),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_few_queries_have_the_bits_of_many(level, dtype, monkeypatch):
    """The decoding kernel, its keys split over threads or not, against the kernels of a prefill."""
    options = [{}, {"softcap": 3.0, "sinks": True}, {"alibi_slopes": True}, {"window": (70, None)}, {"causal": False}]
    for (H, HKV, Tq, D, DV, T), given in zip(SHAPES, options):
        given = {n: torch.rand(H) if x is True else x for n, x in given.items()}
        q, k, v = (torch.randn(2, *s).to(dtype) for s in ((H, Tq, D), (HKV, T, D), (HKV, T, DV)))
        call = {"cache_seqlens": torch.tensor([T, T - 7]), "return_lse": True, **given}
        with testing.isa(level):
            monkeypatch.setattr(_attention_decode, "_FEW", 0)
            want = attention_with_kvcache(q, k, v, **call)
            monkeypatch.setattr(_attention_decode, "_FEW", 16)
            for threads in (1, 2):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                got = attention_with_kvcache(q, k, v, **call)
                torch.set_num_threads(before)
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_unseen_keys_are_not_read():
    """NaN before and behind the window, and pages that the window left behind."""
    q, k, v = tensors()
    kc, vc, table = pages_of(k, v, 16)
    kc[table], vc[table] = (torch.nn.functional.pad(t, (0, 0, 0, 10)).unflatten(2, (-1, 16)).transpose(1, 2) for t in (k, v))
    want = attention_with_kvcache(q[:, :, -2:], k, v, cache_seqlens=T, window=(20, 0))
    kc[table[:, :8]] = vc[table[:, :8]] = float("nan")
    table[:, :8] = -5
    assert torch.equal(attention_with_kvcache(q[:, :, -2:], kc, vc, cache_seqlens=T, window=(20, 0), page_table=table), want)
    with pytest.raises(ValueError, match=r"page_table must name pages below 30; got -5 at \(0, 7\)"):
        attention_with_kvcache(q[:, :, -2:], kc, vc, cache_seqlens=T, window=(21, 0), page_table=table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_int8_cache(dtype, page, impl):
    """Rows are quantised as they are appended; what is attended to are int8 times scale, bit for bit."""
    q, k, v = tensors(dtype)
    k[1, 0, 3] = 0
    shape = (B, HKV, T + 10) if page is None else (B * 10, HKV, 16)
    table = None if page is None else torch.randperm(B * 10).view(B, 10)
    kc, vc = torch.zeros(*shape, D, dtype=torch.int8), torch.zeros(*shape, DV, dtype=torch.int8)
    scales = [torch.full(shape, float("nan")) for _ in range(2)]
    options = {"page_table": table, "k_scale": scales[0], "v_scale": scales[1], "impl": impl}
    got = [
        attention_with_kvcache(q[:, :, a:b], kc, vc, k[:, :, a:b], v[:, :, a:b], cache_seqlens=a, **options)
        for a, b in itertools.pairwise([0, 100, 101, 103, T])
    ]
    whole = []
    for x, cache, scale in zip((k, v), (kc, vc), scales):
        if page is not None:
            cache, scale = (t[table].transpose(1, 2).flatten(2, 3) for t in (cache, scale))
        cache, scale = cache[:, :, :T], scale[:, :, :T]
        assert torch.equal(scale, x.float().abs().amax(-1) / 127)
        whole.append(cache.float() * scale[..., None])
        assert ((whole[-1] - x.float()).abs() <= scale[..., None] * 0.5001).all()
    want = attention(q.float(), *whole, causal=True, impl=impl).to(dtype)
    if impl is None:
        assert torch.equal(torch.cat(got, 2), want)
    torch.testing.assert_close(torch.cat(got, 2), want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("Tq", [1, 20])
def test_padding_on_the_left(Tq):
    q, k, v = tensors()
    starts = torch.tensor([0, 40, 149])
    got = attention_with_kvcache(q[:, :, -Tq:], k, v, cache_seqlens=T, cache_starts=starts)
    seen = (torch.arange(T) >= starts[:, None, None, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    want = attention(q[:, :, -Tq:], k, v, pattern=seen[:, :, -Tq:])
    assert torch.equal(got, want)


@pytest.mark.graph
def test_registered_ops():
    q, k, v = tensors()
    lengths = torch.full((B,), T)
    testing.check_op(
        torch.ops.mlcore.attention_decode.default,
        (q[:, :, :1], k, v, None, None, None, lengths, None, None, None, -1, 0, 0.3, 0.0, 1, "cpu"),
    )
    torch.library.opcheck(
        torch.ops.mlcore.attention_append.default, (k[:, :, :1], v[:, :, :1], None, lengths, k, v, None, None, "cpu")
    )
    with pytest.raises(ValueError, match=r"lengths must include the 150 new keys; got 3"):
        _C.attention_append(k, v, None, torch.full((B,), 3), k.clone(), v.clone(), None, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(B, H, 2, D + 1)}, "k_cache must be .* with q's D = 25"),
        ({"q": torch.randn(B, 3, 2, D)}, "Hkv dividing q's H = 3"),
        ({"q": torch.randn(B, H, 2, D).bfloat16()}, "k_cache must be torch.bfloat16 as q, or torch.int8; got torch.float32"),
        ({"sinks": torch.zeros(3)}, r"sinks must be floating, \(H,\) = \(4,\); got torch.float32, \(3,\)"),
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must be \(H,\) or \(B, H\) = \(3, 4\); got \(3,\)"),
        ({"scale": float("nan")}, "scale must be a finite number; got nan"),
        ({"softcap": 0.0}, "softcap must be a positive number or None; got 0.0"),
        ({"window": (-1, 0)}, r"window must hold counts from 0, or None for no limit; got \(-1, 0\)"),
        ({"k_scale": torch.ones(B, HKV, T)}, "k_scale must be given with an int8 k_cache, and only then"),
        ({"cache_starts": torch.tensor([0, -1, 0])}, r"cache_starts must be \(B,\) = \(3,\) integers from 0"),
        ({"cache_seqlens": torch.tensor([1, 2])}, r"cache_seqlens must be \(B,\) = \(3,\) integers"),
        ({"cache_seqlens": T}, "the cache has room for 150 keys"),
        ({"v": None}, "k and v must be given together"),
        ({"k": torch.randn(B, 1, 2, D)}, "new keys and values must fit B = 3 and the cache"),
        ({"rotary_cos": torch.randn(T, 4)}, "rotary_cos and rotary_sin must be given together"),
        ({"rotary_cos": torch.randn(9, 4), "rotary_sin": torch.randn(9, 4)}, "rotary_cos must hold 12 positions; got 9"),
        ({"page_table": torch.zeros(2, 2).long()}, r"page_table must be \(B, n\) integers with B = 3"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_raise_one_clear_line(change, words):
    q, k, v = tensors()
    arguments = {"q": q[:, :, :2], "k_cache": k, "v_cache": v, "k": k[:, :, :2], "v": v[:, :, :2], "cache_seqlens": 10} | change
    before = k.clone(), v.clone()
    with pytest.raises(ValueError, match=words) as caught:
        attention_with_kvcache(**arguments)
    assert "\n" not in str(caught.value)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("impl", ["cpu", "reference", None])
def test_long_heads_are_the_reference_s_alone(impl):
    """An explicit kernel refuses them before it writes."""
    q, k = torch.randn(1, 1, 1, 300), torch.zeros(1, 1, 5, 300)
    call = functools.partial(attention_with_kvcache, q, k, k.clone(), q, q, cache_seqlens=2, impl=impl)
    if impl == "cpu":
        with pytest.raises(ValueError, match="impl='cpu' can't serve this call: head dims must be 1 to 256; got D 300, Dv 300"):
            call()
        assert not k.any()
    else:
        call()
        assert torch.equal(k[:, :, 2], q[:, :, 0])
