"""Attention within gathered groups: the primitive and its layers against dense references with the same memberships."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore.nn import ReformerAttention, RoutingAttention, SinkhornAttention
from mlcore.ops import gathered_attention

E, H, N = 24, 3, 2
D = E // H


def dense(q, k, v, times, scale=None):
    """Attention where pair (i, j) counts times[..., i, j] times; rows that meet nothing give 0."""
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    w = torch.exp(s - s.amax(-1, keepdim=True).detach()) * times
    return w / w.sum(-1, keepdim=True).clamp(min=1e-30) @ v


def meetings(q_index, k_index, look_back, Tq, Tk, rule=None):
    """times[b, h, i, j] of gathered_attention's arguments, by loops."""
    times = torch.zeros(*q_index.shape[:2], Tq, Tk, dtype=torch.float64)
    B, heads, n, _ = q_index.shape
    for b in range(B):
        for h in range(heads):
            for g in range(n):
                for i in q_index[b, h, g].tolist():
                    for j in k_index[b, h, max(0, g - look_back) : g + 1].flatten().tolist():
                        if i >= 0 and j >= 0 and (rule is None or rule(i, j)):
                            times[b, h, i, j] += 1
    return times


def close_with_gradients(got, want, leaves, tol=1e-5):
    torch.testing.assert_close(got, want.to(got.dtype), atol=tol, rtol=10 * tol)
    seed = torch.randn_like(got)
    mine = torch.autograd.grad(got, leaves, seed, allow_unused=True)
    theirs = torch.autograd.grad(want, leaves, seed.to(want.dtype), allow_unused=True)
    for a, b in zip(mine, theirs):
        if b is not None:
            torch.testing.assert_close(a, b, atol=10 * tol, rtol=100 * tol)


@pytest.mark.parametrize("look_back", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_primitive_counts_every_meeting(look_back, causal):
    """Tokens in several groups, in none, and empty slots."""
    Tq, Tk, n, c, m = 37, 41, 6, 5, 9
    q, k, v = (torch.randn(2, 2, T, D, requires_grad=True) for T in (Tq, Tk, Tk))
    q_index, k_index = torch.randint(-1, Tq - 3, (2, 2, n, c)), torch.randint(-1, Tk, (2, 2, n, m))
    q_index[0, 0] = -1
    times = meetings(q_index, k_index, look_back, Tq, Tk, (lambda i, j: j <= i) if causal else None)
    rule = (lambda i, j: j <= i) if causal else None
    o, lse = gathered_attention(q, k, v, q_index, k_index, look_back=look_back, rule=rule, return_lse=True)
    want = dense(q, k, v, times.float())
    close_with_gradients(o, want, (q, k, v))
    none = times.sum(-1) == 0
    assert (o[none] == 0).all() and (lse[none] == float("-inf")).all() and none[0, 0].all() and none.float().mean() < 0.9
    s = (q @ k.mT * D**-0.5).exp() * times
    torch.testing.assert_close(lse[~none], s.sum(-1).log()[~none].float(), atol=1e-5, rtol=1e-5)


def test_gradient_of_the_merge():
    """float64, through o and lse."""
    q, k, v = (torch.randn(1, 1, 8, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    index = torch.tensor([[[[0, 3, 5], [3, 4, -1], [7, 0, 2]]]])

    def both(q, k, v):
        o, lse = gathered_attention(q, k, v, index, look_back=1, return_lse=True)
        return o, torch.where(lse == float("-inf"), 0.0, lse)

    assert torch.autograd.gradcheck(both, (q, k, v))


def heads(layer, x, part):
    rows = slice(part * E, (part + 1) * E)
    return F.linear(x, layer.in_proj_weight[rows], layer.in_proj_bias[rows]).unflatten(-1, (H, D)).transpose(1, 2)


def padding_of(T, padded):
    return torch.arange(T).expand(N, T) >= torch.tensor([[T], [T - 7]]) if padded else None


def arguments(T, causal, padded):
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    return {"attn_mask": mask, "is_causal": True} if causal else {}, padding_of(T, padded)


CASES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("causal", "padded"), CASES)
@pytest.mark.parametrize(("T", "rounds"), [(53, 1), (53, 3), (8, 2), (1, 2)])
def test_reformer(T, rounds, causal, padded):
    if padded and T < 8:
        return
    layer = ReformerAttention(E, H, chunk=8, rounds=rounds, buckets=6, batch_first=True)
    x = torch.randn(N, T, E)
    options, hidden = arguments(T, causal, padded)
    got, _ = layer(x, x, x, key_padding_mask=hidden, **options)
    q, v = heads(layer, x, 0), heads(layer, x, 2)
    bucket = layer.hashes(q)
    if hidden is not None:
        bucket = bucket.masked_fill(hidden[:, None, None], 99)
    rank = torch.argsort(torch.argsort(bucket, dim=-1, stable=True), dim=-1)
    behind = (rank // 8)[..., :, None] - (rank // 8)[..., None, :]
    times = (bucket[..., :, None] == bucket[..., None, :]) & (behind >= 0) & (behind <= 1) & ~torch.eye(T, dtype=torch.bool)
    if causal:
        times &= torch.ones(T, T, dtype=torch.bool).tril()
    if hidden is not None:
        times &= ~hidden[:, None, None, None, :]
    times = times.sum(2)
    o = dense(q, F.normalize(q, dim=-1), v, times)
    o = torch.where(
        (times.sum(-1, keepdim=True) == 0), v if hidden is None else v.masked_fill(hidden[:, None, :, None], 0.0), o
    )
    want = layer.out_proj(o.transpose(1, 2).flatten(2))
    close_with_gradients(got, want, [layer.in_proj_weight, layer.out_proj.weight], tol=1e-5)


def test_hashes_are_the_largest_of_both_directions_and_fill_many_buckets():
    layer = ReformerAttention(E, H, chunk=8, buckets=6)
    q = torch.randn(N, H, 50, D)
    turned = q.unsqueeze(2) @ torch.randn(H, 2, D, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.hashes(q), torch.cat([turned, -turned], -1).argmax(-1))
    many = ReformerAttention(E, H, chunk=8).hashes(torch.randn(1, H, 2000, D))
    assert many.min() >= 0 and many.max() < 550 and len(many.unique()) > 200


@pytest.mark.parametrize(("causal", "padded"), CASES)
@pytest.mark.parametrize(("T", "window"), [(53, 16), (9, 64)])
def test_routing(T, window, causal, padded):
    layer = RoutingAttention(E, H, clusters=4, window=window, batch_first=True).eval()
    x = torch.randn(N, T, E)
    options, hidden = arguments(T, causal, padded)
    got, _ = layer(x, x, x, key_padding_mask=hidden, **options)
    q, k, v = (heads(layer, x, part) for part in range(3))
    taken = []
    for t, hide in ((q, None), (k, hidden)):
        near = layer.centroids @ F.normalize(t, dim=-1).mT
        if hide is not None:
            near = near.masked_fill(hide[:, None, None], float("-inf"))
        least = near.topk(min(window, T), -1).values[..., -1:]
        taken.append((near >= least) & (near > float("-inf")))
    times = torch.einsum("nhci,nhcj->nhij", *(t.float() for t in taken))
    if causal:
        times = times.tril()
    want = layer.out_proj(dense(q, k, v, times).transpose(1, 2).flatten(2))
    close_with_gradients(got, want, [layer.in_proj_weight, layer.out_proj.weight])


def test_routing_of_another_sequence():
    layer = RoutingAttention(E, H, clusters=2, window=100, kdim=10, vdim=6, batch_first=True).eval()
    query, key, value = torch.randn(N, 11, E), torch.randn(N, 17, 10), torch.randn(N, 17, 6)
    got, _ = layer(query, key, value)
    q, k, v = layer._project(query, key, value)
    want = F.scaled_dot_product_attention(q, k, v)  # every cluster takes everything
    torch.testing.assert_close(got, layer.out_proj(want.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)


def test_centroids_move_to_their_tokens():
    """Two bundles of directions: after training steps each has a centroid of its own."""
    layer = RoutingAttention(8, 1, clusters=2, window=8, decay=0.5, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        layer.in_proj_bias.zero_()
        layer.centroids.copy_(torch.eye(8)[None, :2])
    a, b = F.normalize(torch.eye(8)[0] + 0.7 * torch.eye(8)[2], dim=0), F.normalize(torch.eye(8)[1] - torch.eye(8)[5], dim=0)
    x = torch.stack([a, b]).repeat(4, 1)[None] * 3
    for _ in range(30):
        layer(x, x, x)
    torch.testing.assert_close(layer.centroids[0], torch.stack([a, b]), atol=1e-4, rtol=0)
    before = layer.centroids.clone()
    layer.eval()(x.flip(-1), x.flip(-1), x.flip(-1))
    assert torch.equal(layer.centroids, before) and "centroids" in layer.state_dict()


@pytest.mark.parametrize(("causal", "padded"), CASES)
@pytest.mark.parametrize(("T", "mixed"), [(53, 1), (53, 2), (53, None), (48, 1), (5, 1)])
def test_sinkhorn(T, mixed, causal, padded):
    if padded and T < 8:
        return
    layer, b = SinkhornAttention(E, H, block=8, mixed=mixed, iterations=5, batch_first=True).eval(), 8
    x = torch.randn(N, T, E)
    options, hidden = arguments(T, causal, padded)
    got, _ = layer(x, x, x, key_padding_mask=hidden, **options)
    gone = torch.zeros(N, T, dtype=torch.bool) if hidden is None else hidden
    gone = F.pad(gone, (0, -T % b), value=True).view(N, 1, -1, b)
    q, k, v = (F.pad(heads(layer, x, part), (0, 0, 0, -T % b)).unflatten(2, (-1, b)) for part in range(3))
    k, v = (t.masked_fill(gone[..., None], 0.0) for t in (k, v))
    n = q.shape[2]
    P = layer.sorting(q, k, gone[..., None] if gone.any() else None, causal)
    if mixed is not None and mixed < n:
        P = P * (P.topk(mixed, -1).values[..., -1:] <= P)
    outs = []
    for i in range(n):  # each block: mixtures and its own
        keys = torch.cat([torch.einsum("zhm,zhmbd->zhbd", P[:, :, i], k), k[:, :, i]], 2)
        values = torch.cat([torch.einsum("zhm,zhmbd->zhbd", P[:, :, i], v), v[:, :, i]], 2)
        there = torch.einsum("zhm,zmb->zhb", (P[:, :, i] > 0).float(), (~gone[:, 0]).float()) > 0
        seen = torch.cat([there, ~gone[:, :, i].expand(N, H, b)], -1)[:, :, None].expand(N, H, b, 2 * b)
        if causal:
            seen = seen & torch.cat([torch.ones(b, b), torch.ones(b, b).tril()], -1).bool()
        outs.append(dense(q[:, :, i], keys, values, seen.float()))
    want = layer.out_proj(torch.cat(outs, 2)[:, :, :T].transpose(1, 2).flatten(2))
    close_with_gradients(got, want, list(layer.parameters()))


def test_sinkhorn_sorting_is_doubly_stochastic_and_causal():
    layer = SinkhornAttention(E, H, block=4, iterations=60).eval()
    q, k = torch.randn(2, N, H, 6, 4, D)
    P = layer.sorting(q, k)
    torch.testing.assert_close(P.sum(-1), torch.ones(N, H, 6), atol=1e-3, rtol=0)
    torch.testing.assert_close(P.sum(-2), torch.ones(N, H, 6), atol=1e-3, rtol=0)
    causal = layer.sorting(q, k, causal=True)
    assert (causal.triu() == 0).all() and torch.allclose(causal.sum(-1)[..., 1:], torch.ones(()))
    layer.train()
    assert not torch.equal(layer.sorting(q, k), layer.sorting(q, k))


LAYERS = [
    lambda **o: ReformerAttention(E, H, chunk=8, **o),
    lambda **o: RoutingAttention(E, H, clusters=3, window=16, **o),
    lambda **o: SinkhornAttention(E, H, block=8, **o),
]


@pytest.mark.parametrize("make", LAYERS)
def test_options_that_have_no_effect_are_refused(make):
    with pytest.raises(TypeError, match=r"options are dropout, .* got add_zero_attn"):
        make(add_zero_attn=True)


@pytest.mark.parametrize("make", LAYERS)
def test_no_later_token_is_seen(make):
    layer = make(batch_first=True).eval()
    x = torch.randn(1, 40, E)
    mask = torch.ones(40, 40, dtype=torch.bool).triu(1)
    y = x.clone()
    y[:, 25:] = torch.randn(1, 15, E)
    a, b = (layer(t, t, t, attn_mask=mask, is_causal=True)[0][:, :25] for t in (x, y))
    if isinstance(layer, SinkhornAttention):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    else:  # which tokens share a chunk or a cluster's window depends on all of them, but what flows does not
        g = torch.autograd.grad(layer(*3 * [x.requires_grad_()], attn_mask=mask, is_causal=True)[0][:, :25].sum(), x)[0]
        assert (g[:, 25:] == 0).all() and (g[:, :25] != 0).any()


@pytest.mark.parametrize("make", LAYERS)
def test_layouts_agree_and_layers_fit_a_transformer(make):
    layer = make(batch_first=True).eval()
    other = make(batch_first=False).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(N, 29, E)
    want, weights = layer(x, x, x, need_weights=False)
    t = x.transpose(0, 1)
    assert weights is None
    torch.testing.assert_close(other(t, t, t)[0], want.transpose(0, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer(x[0], x[0], x[0])[0], want[0], atol=1e-5, rtol=1e-4)
    assert layer(x[:0], x[:0], x[:0])[0].shape == (0, 29, E)
    block = mlcore.nn.TransformerEncoderLayer(E, H, 32, dropout=0.1, batch_first=True)
    block.self_attn = make(batch_first=True, dropout=0.1)
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.linear1.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ReformerAttention(E, H, 0), "chunk must be a positive integer; got 0"),
        (lambda x: ReformerAttention(E, H, buckets=3), "buckets must be even; got 3"),
        (lambda x: ReformerAttention(E, H, kdim=4), "kdim must be None: queries are keys too; got 4"),
        (lambda x: RoutingAttention(E, H, 2, decay=1.5), r"decay must be in \[0, 1\]; got 1.5"),
        (lambda x: SinkhornAttention(E, H, temperature=0.0), "temperature must be positive; got 0.0"),
        (lambda x: LAYERS[0](batch_first=True)(x, x[:, :3], x[:, :3]), "must be one sequence; got lengths 5 and 3"),
        (lambda x: LAYERS[1]()(x, x, x, need_weights=True), "need_weights must be False"),
        (
            lambda x: gathered_attention(*3 * [x[None]], torch.zeros(1, 2, 1, 5)),
            r"q_index must be integers \(B, H, n, slots\)",
        ),
        (
            lambda x: gathered_attention(*3 * [x[None]], torch.zeros(1, 2, 1, 5).long(), torch.zeros(1, 2, 2, 5).long()),
            "k_index must have q_index's 1 groups; got 2",
        ),
    ],
)
def test_bad_arguments_raise(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(2, 5, E))
