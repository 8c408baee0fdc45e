"""Positional encodings: their formulas, layouts, offsets, and that rotated scores depend on distance alone."""

from __future__ import annotations

import math

import pytest
import torch

from mlcore.nn import LearnedEncoding, RotaryEncoding, SinusoidalEncoding


@pytest.mark.parametrize("E", [1, 7, 8])
def test_sinusoidal_formula(E):
    layer = SinusoidalEncoding(E, batch_first=True)
    x = torch.randn(2, 5, E)
    got = layer(x, offset=1000) - x
    for t in range(5):
        for c in range(E):
            angle = (1000 + t) / 10000 ** (2 * (c // 2) / E)
            assert abs(got[0, t, c].item() - (math.cos if c % 2 else math.sin)(angle)) < 2e-6
    assert torch.equal(got[0], (layer(x, offset=1000) - x)[0])


@pytest.mark.parametrize("make", [lambda **k: SinusoidalEncoding(8, **k), lambda **k: LearnedEncoding(30, 8, **k)])
def test_layouts_dtypes_and_offsets(make):
    layer = make(batch_first=True)
    x = torch.randn(3, 10, 8)
    want = layer(x)
    assert torch.equal(layer(x[0]), want[0])
    assert torch.equal(torch.cat([layer(x[:, :4]), layer(x[:, 4:], offset=4)], 1), want)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:, :0]).shape == (3, 0, 8) and layer(x[:0]).shape == (0, 10, 8)
    layer.batch_first = False
    assert torch.equal(layer(x.transpose(0, 1)), want.transpose(0, 1))
    layer.dropout = 1.0
    assert (layer(x) == 0).all()
    layer.eval()
    assert (layer(x) != 0).any()


def test_learned_encoding_learns():
    layer = LearnedEncoding(6, 4, batch_first=True)
    layer(torch.zeros(2, 3, 4), offset=2).sum().backward()
    assert layer.weight.grad.tolist() == [[0.0] * 4] * 2 + [[2.0] * 4] * 3 + [[0.0] * 4]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_distance(interleaved):
    layer = RotaryEncoding(8, interleaved=interleaved)
    q, k = torch.randn(1, 12).expand(20, 12), torch.randn(1, 12).expand(20, 12)
    scores = layer(q) @ layer(k, offset=100).T
    for d in range(-5, 6):
        assert scores.diagonal(d).std() < 1e-4
    assert torch.equal(layer(q[3:], offset=3), layer(q)[3:]) and torch.equal(layer(q)[:, 8:], q[:, 8:])
    assert torch.allclose(layer(q).norm(dim=-1), q.norm(dim=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SinusoidalEncoding(0), "embed_dim must be a positive integer; got 0"),
        (lambda: SinusoidalEncoding(4, base=0.0), "base must be positive; got 0.0"),
        (lambda: LearnedEncoding(0, 4), "max_length must be a positive integer; got 0"),
        (lambda: LearnedEncoding(4, 4, dropout=2.0), r"dropout must be in \[0, 1\]; got 2.0"),
        (lambda: LearnedEncoding(4, 4)(torch.zeros(5, 4)), "there are 4 positions; got 5 tokens from 0 on"),
        (lambda: LearnedEncoding(4, 4)(torch.zeros(5)), r"x must be 2-D or 3-D with 4 features; got shape \(5,\)"),
        (lambda: SinusoidalEncoding(4)(torch.zeros(5, 4), -1), "offset must not be negative; got -1"),
        (lambda: RotaryEncoding(3), "rotary_dim must be even and at least 2; got 3"),
        (lambda: RotaryEncoding(8)(torch.zeros(2, 4)), "x must have at least 8 channels"),
    ],
)
def test_bad_arguments_raise(call, words):
    with pytest.raises(ValueError, match=words):
        call()
