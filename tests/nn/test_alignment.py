"""Additive, location-aware and monotonic attention, guided attention: each against its formula, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch

from mlcore.nn import AdditiveAttention, LocationAwareAttention, MonotonicAttention, guided_attention_loss

B, L, S, Q, K, A = 2, 5, 7, 6, 4, 8


def inputs():
    hidden = torch.arange(S).expand(B, S) >= torch.tensor([[S], [S - 3]])
    return torch.randn(B, L, Q), torch.randn(B, S, K), torch.randn(B, S, 3), hidden


def energy(layer, q, k, extra=0.0):
    """The score of one pair."""
    inside = layer.query_proj.weight @ q + layer.key_proj.weight @ k + layer.key_proj.bias + extra
    return (layer.score.weight @ torch.tanh(inside)).squeeze()


@pytest.mark.parametrize("padded", [False, True])
def test_additive(padded):
    layer = AdditiveAttention(Q, K, A)
    query, key, value, hidden = inputs()
    context, weights = layer(query, key, value, hidden if padded else None)
    for b in range(B):
        real = [j for j in range(S) if not (padded and hidden[b, j])]
        for i in range(L):
            w = torch.stack([energy(layer, query[b, i], key[b, j]) for j in real]).softmax(0)
            torch.testing.assert_close(weights[b, i, real], w)
            torch.testing.assert_close(context[b, i], w @ value[b, real])
    assert not padded or not weights[hidden.unsqueeze(1).expand_as(weights)].any()
    assert layer(query, key)[0].shape == (B, L, K)


def test_all_hidden_gives_zero_and_finite_gradients():
    layer = AdditiveAttention(Q, K, A)
    query, key, value, _ = inputs()
    context, weights = layer(query, key, value, torch.ones(B, S, dtype=torch.bool))
    assert not context.any() and not weights.any()
    context.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_location_aware():
    layer = LocationAwareAttention(Q, K, A, filters=3, kernel_size=5)
    query, key, value, hidden = inputs()
    previous = torch.rand(B, 1, S).softmax(-1)
    _, weights = layer(query[:, :1], key, value, hidden, previous)
    padded = torch.nn.functional.pad(previous[:, 0], (2, 2))
    for b in range(B):
        real = [j for j in range(S) if not hidden[b, j]]
        e = []
        for j in real:
            f = layer.location.weight[:, 0] @ padded[b, j : j + 5]
            e.append(energy(layer, query[b, 0], key[b, j], layer.location_proj.weight @ f))
        torch.testing.assert_close(weights[b, 0, real], torch.stack(e).softmax(0))
    first = layer(query[:, :1], key, value, hidden)[1]
    torch.testing.assert_close(first, layer(query[:, :1], key, value, hidden, torch.zeros(B, 1, S))[1])


def expected_monotonic(stop, previous):
    """The sum over paths: reach key j from key k <= j without stopping between."""
    out = torch.zeros_like(previous)
    for j in range(len(out)):
        for k in range(j + 1):
            out[j] += stop[j] * previous[k] * math.prod(1 - float(stop[n]) for n in range(k, j))
    return out


def test_monotonic_training_is_the_expected_alignment():
    layer = MonotonicAttention(Q, K, A, noise=0.0)
    query, key, value, hidden = inputs()
    context, weights = layer(query, key, value, hidden)
    for b in range(B):
        last = torch.eye(S)[0]
        for i in range(L):
            stop = torch.tensor([torch.sigmoid(energy(layer, query[b, i], key[b, j]) + layer.offset).item() for j in range(S)])
            stop[hidden[b]] = 0
            last = expected_monotonic(stop, last)
            torch.testing.assert_close(weights[b, i], last, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(context, weights @ value)
    first = layer(query[:, :2], key, value, hidden)[1]
    rest = layer(query[:, 2:], key, value, hidden, first[:, -1:])[1]
    torch.testing.assert_close(torch.cat([first, rest], 1), weights)
    weights[..., 1].sum().backward()
    assert layer.offset.grad.isfinite() and layer.offset.grad != 0


def test_monotonic_evaluation_is_hard_and_never_goes_back():
    layer = MonotonicAttention(Q, K, A, initial_offset=0.0).eval()
    query, key, value, _ = inputs()
    weights = layer(query, key, value)[1]
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    for b in range(B):
        at = 0
        for i in range(L):
            e = [float(energy(layer, query[b, i], key[b, j]) + layer.offset) for j in range(S)]
            at = next((j for j in range(at, S) if e[j] > 0), None) if at is not None else None
            assert weights[b, i].nonzero().flatten().tolist() == ([] if at is None else [at])


def test_monotonic_survives_certain_stops():
    layer = MonotonicAttention(Q, K, A, noise=0.0, initial_offset=200.0)
    query, key, value, _ = inputs()
    weights = layer(query, key, value)[1]
    torch.testing.assert_close(weights[:, :, 0], torch.ones(B, L))
    weights[..., 0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_guided_attention_loss():
    weights = torch.rand(B, L, S)
    rows, columns = torch.tensor([L, 3]), torch.tensor([S, 4])
    total, count = 0.0, 0
    for b in range(B):
        for i in range(int(rows[b])):
            for j in range(int(columns[b])):
                gap = i / int(rows[b]) - j / int(columns[b])
                total += float(weights[b, i, j]) * (1 - math.exp(-(gap**2) / (2 * 0.3**2)))
                count += 1
    got = guided_attention_loss(weights, rows, columns, sigma=0.3)
    torch.testing.assert_close(got, torch.tensor(total / count))
    assert guided_attention_loss(torch.eye(6).unsqueeze(0)) == 0


def test_errors():
    query, key, value, hidden = inputs()
    layer = AdditiveAttention(Q, K, A)
    with pytest.raises(ValueError, match=r"AdditiveAttention: query must be \(B, L, 6\); got \(2, 5, 4\)"):
        layer(query[..., :4], key)
    with pytest.raises(ValueError, match=r"key must be \(2, S, 4\); got \(1, 7, 4\)"):
        layer(query, key[:1])
    with pytest.raises(ValueError, match=r"value must be \(B, S, V\)"):
        layer(query, key, value[:, :3])
    with pytest.raises(ValueError, match=r"key_padding_mask must be boolean, \(B, S\) = \(2, 7\); got torch.float32"):
        layer(query, key, value, hidden.float())
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        LocationAwareAttention(Q, K, A, kernel_size=4)
    with pytest.raises(ValueError, match=r"previous must be \(B, 1, S\) = \(2, 1, 7\)"):
        LocationAwareAttention(Q, K, A)(query[:, :1], key, previous=torch.zeros(2, 7))
    with pytest.raises(ValueError, match="sigma must be positive; got 0"):
        guided_attention_loss(torch.rand(1, 2, 2), sigma=0)
