"""mlcore.nn.AttentionFree: every kind against its formula, and as attention inside a Transformer."""

import pytest
import torch
import torch.nn.functional as F

from mlcore.kernels.aft import aft_ref
from mlcore.nn import AttentionFree

E, H, N, T = 24, 3, 2, 37
KINDS = {"full": {}, "factorised": {"kind": "full", "rank": 4}, "local": {"window": 5}, "simple": {}, "conv": {"window": 6}}


def make(name, **kwargs):
    layer = AttentionFree(E, H, 40, **({"kind": name} | KINDS[name] | {"batch_first": True} | kwargs))
    for parameter in layer.position_bias:
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_matches_the_formula(name, causal):
    layer = make(name)
    x = torch.randn(N, T, E)
    q, k, v = (
        t.unflatten(-1, (H, -1)).transpose(1, 2) for t in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    w = torch.zeros(H, T, T)
    for h in range(H):
        for t in range(T):
            for j in range(T):
                near = abs(t - j) < layer.window
                if name == "full":
                    w[h, t, j] = layer.position_bias[0][0, t, j]
                elif name == "factorised":
                    w[h, t, j] = layer.position_bias[0][0, t] @ layer.position_bias[1][0, :, j]
                elif near and name != "simple":
                    band = layer.position_bias[0]
                    w[h, t, j] = (band[0, t] if name == "local" else band[h])[j - t + layer.window - 1]
    want = layer.out_proj(aft_ref.aft(q, k, v, w.detach(), causal=causal).transpose(1, 2).flatten(2))
    got, weights = layer(x, x, x, is_causal=causal)
    assert weights is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    alone, _ = layer(x[0], x[0], x[0], is_causal=causal)
    torch.testing.assert_close(alone, want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_gets_a_gradient(name):
    layer = make(name)
    x = torch.randn(N, 40, E)
    layer(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_hidden_keys_count_for_nothing(name):
    layer = make(name)
    x, other = torch.randn(2, N, T, E)
    hidden = torch.zeros(N, T, dtype=torch.bool)
    hidden[:, 10:17] = True
    other = torch.where(hidden[..., None], other, x)
    got, want = (layer(x, kv, kv, key_padding_mask=hidden)[0] for kv in (other, x))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_one_word_changes_a_transformer():
    block = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=True)
    block.self_attn = make("conv")
    x = torch.randn(N, T, E, requires_grad=True)
    y = block(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(T), is_causal=True)
    (grad,) = torch.autograd.grad(y[:, 11].sum(), x)
    assert grad[:, 11].abs().sum() > 0 and (grad[:, 12:] == 0).all()


def test_bad_arguments_are_named():
    for kwargs, message in [
        ({"kind": "none"}, "kind must be"),
        ({"kind": "conv", "window": 0}, "at least 1"),
        ({"kind": "conv", "rank": 2}, "rank is of kind 'full'"),
        ({}, "needs max_length"),
    ]:
        with pytest.raises(ValueError, match=message):
            AttentionFree(E, H, **kwargs)
    x = torch.randn(N, 41, E)
    with pytest.raises(ValueError, match="at most max_length 40"):
        make("full")(x, x, x)
