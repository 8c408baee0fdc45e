"""mlcore.ops.attention_with_kvcache: what a cache holds, and that decoding gives the bits of a prefill."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlcore.ops import attention, attention_with_kvcache, rotate
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache_seqlens": torch.tensor([1, 2])}, r"cache_seqlens must be \(B,\) = \(3,\) integers"),
        ({"cache_seqlens": T}, "the cache has room for 150 keys"),
        ({"v": None}, "k and v must be given together"),
        ({"k": torch.randn(B, 1, 2, D)}, "new keys and values must fit B = 3 and the cache"),
        ({"rotary_cos": torch.randn(T, 4)}, "rotary_cos and rotary_sin must be given together"),
        ({"rotary_cos": torch.randn(9, 4), "rotary_sin": torch.randn(9, 4)}, "rotary_cos must hold 12 positions; got 9"),
        ({"page_table": torch.zeros(2, 2).long()}, r"page_table must be \(B, n\) with B = 3"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_raise_one_clear_line(change, words):
    q, k, v = tensors()
    arguments = {"q": q[:, :, :2], "k_cache": k, "v_cache": v, "k": k[:, :, :2], "v": v[:, :, :2], "cache_seqlens": 10} | change
    with pytest.raises(ValueError, match=words) as caught:
        attention_with_kvcache(**arguments)
    assert "\n" not in str(caught.value)
