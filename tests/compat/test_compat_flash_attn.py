"""mlcore.compat.flash_attn: flash-attn's conventions, against torch's unfused formula written out here."""

from __future__ import annotations

import inspect

import pytest
import torch

from mlcore.compat import flash_attn
from mlcore.compat.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

B, TQ, TK, H, HKV, D = 2, 40, 90, 4, 2, 16


def by_hand(q, k, v, causal=False, window=(-1, -1), scale=None, softcap=0.0, slopes=None):
    """(out, lse) of (B, T, H, D) tensors; keys are counted from the end."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    Tq, Tk = s.shape[-2:]
    distance = torch.arange(Tk)[None] - torch.arange(Tq)[:, None] - (Tk - Tq)
    if slopes is not None:
        s = s - slopes.reshape(-1, s.shape[1], 1, 1) * distance.abs()
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    if causal or window[1] >= 0:
        seen &= distance <= (0 if causal else window[1])
    if window[0] >= 0:
        seen &= distance >= -window[0]
    s = s.masked_fill(~seen, float("-inf"))
    p = torch.where(seen.any(-1)[:, None], s, 0.0).softmax(-1) * seen.any(-1)[:, None]
    return (p @ v).transpose(1, 2), torch.logsumexp(s, -1)


def tensors(Tq=TQ, Tk=TK):
    return torch.randn(B, Tq, H, D), torch.randn(B, Tk, HKV, D), torch.randn(B, Tk, HKV, D)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (7, 3)},
        {"window_size": (-1, 3)},
        {"window_size": (9, -1)},
        {"causal": True, "window_size": (9, 5)},
        {"softmax_scale": 0.4, "softcap": 2.0, "causal": True},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
        {"alibi_slopes": torch.linspace(0.1, 1, B * H).view(B, H), "causal": True},
    ],
    ids=lambda options: "-".join(f"{n}={x}" for n, x in options.items() if not isinstance(x, torch.Tensor)) or "plain",
)
@pytest.mark.parametrize("lengths", [(TQ, TK), (TK, TQ), (1, TK)], ids=str)
def test_conventions_and_gradients(options, lengths):
    leaves = [t.requires_grad_() for t in tensors(*lengths)]
    words = {"window_size": "window", "softmax_scale": "scale", "alibi_slopes": "slopes"}
    out, lse, probabilities = flash_attn.flash_attn_func(*leaves, **options, return_attn_probs=True)
    want, want_lse = by_hand(*leaves, **{words.get(n, n): x for n, x in options.items()})
    assert out.shape == (B, lengths[0], H, D) and probabilities is None
    close(out, want)
    close(lse, want_lse)
    seed = torch.randn_like(out)
    for got, expected in zip(torch.autograd.grad(out, leaves, seed), torch.autograd.grad(want, leaves, seed)):
        close(got, expected)


def test_packed_arguments():
    q, k, v = (torch.randn(B, TQ, HKV, D) for _ in range(3))
    want = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True), want)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True), want)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_size": (6, 0)}, {"window_size": (3, 4)}], ids=str
)
def test_sequences_of_different_lengths(options):
    q_lengths, k_lengths = [5, 0, 30, 1, 12], [20, 7, 30, 0, 3]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (q_lengths, k_lengths))
    q, k, v = torch.randn(50, H, D), torch.randn(60, HKV, D), torch.randn(60, HKV, D)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(*leaves, cu_q, cu_k, 30, 30, **options, return_attn_probs=True)
    assert (out[48:] == 0).all() and (lse[:, 48:] == float("-inf")).all() and out.shape == (50, H, D)
    parts = []
    for n in range(5):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        part = [leaves[0][rows][None], leaves[1][keys][None], leaves[2][keys][None]]
        if part[0].numel() and part[1].numel():
            want, want_lse = by_hand(*part, options.get("causal", False), options.get("window_size", (-1, -1)))
            close(lse[:, rows], want_lse[0])
        else:
            want = torch.zeros_like(part[0])
        parts.append(want[0])
    want = torch.cat(parts)
    close(out[:48], want)
    for got, expected in zip(torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)):
        close(got, expected)


def test_packed_sequences_in_one_tensor():
    cu = torch.tensor([0, 10, 10, 40])
    qkv = torch.randn(40, 3, H, D)
    want = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 30, 30, causal=True)
    assert torch.equal(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 30, causal=True), want)
    assert torch.equal(
        flash_attn.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu.clone(), 30, 30, causal=True), want
    )
    slopes = torch.rand(H)
    got = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 30, 30, alibi_slopes=slopes)
    close(got[10:], by_hand(*(t[None, 10:] for t in qkv.unbind(1)), slopes=slopes)[0][0])


@pytest.mark.parametrize("paged", [False, True])
def test_cache(paged):
    q, k, v = torch.randn(B, TK, H, D), torch.randn(B, TK, HKV, D), torch.randn(B, TK, HKV, D)
    want, want_lse = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(50, 0), return_attn_probs=True)[:2]
    if paged:
        table = torch.randperm(2 * 6).view(B, 6).int()
        kc, vc = torch.zeros(12, 16, HKV, D), torch.zeros(12, 16, HKV, D)
    else:
        table, kc, vc = None, torch.zeros(B, TK + 5, HKV, D), torch.zeros(B, TK + 5, HKV, D)
    for a, b in ((0, 70), (70, 71), (71, TK)):
        got, lse = flash_attn.flash_attn_with_kvcache(
            q[:, a:b], kc, vc, k[:, a:b], v[:, a:b], cache_seqlens=torch.full((B,), a, dtype=torch.int32),
            block_table=table, causal=True, window_size=(50, 0), return_softmax_lse=True,
        )  # fmt: skip
        assert torch.equal(got, want[:, a:b]) and torch.equal(lse, want_lse[:, :, a:b])


@pytest.mark.parametrize("Tq", [1, 30])
def test_some_sequences_of_a_cache_padded_on_the_left(Tq):
    q, caches = torch.randn(B, Tq, H, D), [torch.randn(5, TK, HKV, D) for _ in range(2)]
    chosen, starts = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([0, 17], dtype=torch.int32)
    new = [torch.randn(B, Tq, HKV, D) for _ in range(2)]
    want = []
    for b in range(B):
        keys = [torch.cat([c[chosen[b], starts[b] : 50], x[b]])[None] for c, x in zip(caches, new)]
        want.append(by_hand(q[b : b + 1], *keys, causal=True)[0])
    before = [c[[1, 2, 4]].clone() for c in caches]
    got = flash_attn.flash_attn_with_kvcache(
        q, *caches, *new, cache_seqlens=50, cache_batch_idx=chosen, cache_leftpad=starts, causal=True, num_splits=7
    )  # fmt: skip
    close(got, torch.cat(want))
    for cache, x, others in zip(caches, new, before):
        assert torch.equal(cache[chosen.long(), 50 : 50 + Tq], x) and torch.equal(cache[[1, 2, 4]], others)


def test_packed_queries_over_pages():
    lengths, size = [20, 7, 30, 0, 3], 8
    cu_k = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    cu_q = torch.tensor([0, 5, 5, 35, 36, 39], dtype=torch.int32)
    q, k, v = torch.randn(39, H, D), torch.randn(60, HKV, D), torch.randn(60, HKV, D)
    table, pages = torch.randperm(20).view(5, 4).int(), [torch.full((20, size, HKV, D), float("nan")) for _ in range(2)]
    for n in range(5):
        for t in range(lengths[n]):
            for x, paged in zip((k, v), pages):
                paged[table[n, t // size], t % size] = x[cu_k[n] + t]
    want = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 30, 30, causal=True)
    leaves = [p.requires_grad_() for p in pages]
    got = flash_attn.flash_attn_varlen_func(q, *leaves, cu_q, cu_k, 30, 30, causal=True, block_table=table)
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got.sum(), leaves)
    assert all(g.isfinite().all() and (g != 0).any() for g in grads)


def test_padding_and_back():
    x = torch.randn(3, 7, 4, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([7, 0, 3])[:, None]
    packed, indices, cu, longest, used = unpad_input(x, mask)
    assert cu.tolist() == [0, 7, 7, 10] and cu.dtype == torch.int32 and longest == 7 and used.tolist() == [7, 0, 3]
    assert torch.equal(packed, x[mask]) and torch.equal(index_first_axis(x.flatten(0, 1), indices), packed)
    back = pad_input(packed, indices, 3, 7)
    assert torch.equal(back, torch.where(mask[..., None], x, 0.0))
    (g,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(g, mask[..., None].expand_as(x).float())
    more = unpad_input(x, mask.int(), (~mask).int())
    assert more[2].tolist() == [0, 7, 14, 21] and more[4].tolist() == [7, 0, 3]


def test_dropout_is_applied():
    q, k, v = tensors()
    torch.manual_seed(0)
    a = flash_attn.flash_attn_func(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(a, flash_attn.flash_attn_func(q, k, v, 0.5)) and not torch.equal(a, flash_attn.flash_attn_func(q, k, v))


def test_argument_names():
    """In the order in which flash-attn 2 takes them."""
    common = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
        "return_attn_probs",
    ]
    for name, first, last in (
        ("flash_attn_func", ["q", "k", "v"], []),
        ("flash_attn_qkvpacked_func", ["qkv"], []),
        (
            "flash_attn_varlen_func",
            ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
            ["block_table"],
        ),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen"], []),
        ("flash_attn_kvpacked_func", ["q", "kv"], []),
        (
            "flash_attn_varlen_kvpacked_func",
            ["q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
            [],
        ),
    ):
        assert list(inspect.signature(getattr(flash_attn, name)).parameters) == [*first, *common, *last]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: flash_attn.flash_attn_func(q, k, v, 0.1, return_attn_probs=True), "dropout_p must be 0"),
        (lambda q, k, v: flash_attn.flash_attn_with_kvcache(q, k, v, num_splits=-4), "num_splits must not be negative; got -4"),
        (
            lambda q, k, v: flash_attn.flash_attn_with_kvcache(
                q, k, v, cache_batch_idx=torch.zeros(B).int(), block_table=torch.zeros(B, 1).int()
            ),
            "cache_batch_idx can't be given with block_table",
        ),
        (
            lambda q, k, v: flash_attn.flash_attn_varlen_func(
                q[0], k, v, torch.tensor([0, 40]), torch.tensor([0, 91]), 40, 91, block_table=torch.zeros(1, 1).int()
            ),
            r"up to 91 keys in pages of 90; got \(1, 1\)",
        ),
        (
            lambda q, k, v: flash_attn.flash_attn_varlen_func(
                q[0], k[0], v[0], torch.tensor([0, 40]), torch.tensor([0, 90]), 30, 90
            ),
            "max_seqlen_q is 30, the longest sequence has 40",
        ),
        (
            lambda q, k, v: flash_attn.flash_attn_varlen_func(
                q[0], k[0], v[0], torch.tensor([0, 40]), torch.tensor([0, 90]), 40, 90, alibi_slopes=torch.rand(H)
            ),
            "alibi_slopes need cu_seqlens_q and cu_seqlens_k to be equal",
        ),
        (
            lambda q, k, v: flash_attn.flash_attn_with_kvcache(
                q, k, v, rotary_cos=torch.ones(90, 4), rotary_sin=torch.ones(90, 4)
            ),
            "rotary_cos needs k of q's length",
        ),
    ],
)
def test_what_can_not_be_honoured_raises(call, words):
    with pytest.raises(ValueError, match=words):
        call(*tensors())
