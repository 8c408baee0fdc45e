"""mlcore.nn's layers of linear cost: each against its formula in plain torch, and as attention inside a Transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore.kernels.linear_attention import linear_attention_ref
from mlcore.nn import DeltaNet, GatedLinearAttention, LinearAttention, RandomFeatures, RetentionLayer

E, H, N, T = 24, 3, 2, 37
D = E // H


def layers(**kwargs):
    return [
        LinearAttention(E, H, **kwargs),
        RetentionLayer(E, H, **kwargs),
        GatedLinearAttention(E, H, **kwargs),
        DeltaNet(E, H, **kwargs),
        DeltaNet(E, H, gated=True, **kwargs),
    ]


LAYERS = range(5)


def expected(layer, x):
    """The layer's causal output for (N, T, E), by the token-by-token recurrence."""
    q, k, v = (
        t.unflatten(-1, (H, D)).transpose(1, 2) for t in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    gate = beta = None
    feature, normalize = None, False
    if type(layer) is LinearAttention:
        feature, normalize = "elu", True
    elif isinstance(layer, DeltaNet):
        q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        beta = layer.beta_proj(x).sigmoid().mT
        gate = None if layer.gate_proj is None else -F.softplus(layer.gate_proj(x)).mT
    else:
        q = q / D**0.5
        if isinstance(layer, RetentionLayer):
            gate = torch.log1p(-(2.0 ** (-5 - torch.arange(H)))).view(1, H, 1).expand(x.shape[0], H, x.shape[1])
        else:
            gate = (F.logsigmoid(layer.gate_proj(x)) / 16).unflatten(-1, (H, D)).transpose(1, 2)
    o, _ = linear_attention_ref.linear_attention(q, k, v, gate, beta, feature=feature, normalize=normalize)
    if not normalize:
        o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return layer.out_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("n", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_matches_the_formula(n, batch_first):
    layer = layers(batch_first=batch_first)[n]
    x = torch.randn(N, T, E)
    want = expected(layer, x)
    given = x if batch_first else x.transpose(0, 1)
    got, weights = layer(given, given, given, is_causal=True)
    assert weights is None
    torch.testing.assert_close(got if batch_first else got.transpose(0, 1), want, rtol=1e-4, atol=1e-5)
    alone, _ = layer(x[0], x[0], x[0], is_causal=True)
    torch.testing.assert_close(alone, want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", LAYERS)
def test_every_parameter_gets_a_gradient(n):
    layer = layers(batch_first=True)[n]
    x = torch.randn(N, T, E)
    layer(x, x, x, is_causal=True)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("n", LAYERS)
def test_hidden_keys_count_for_nothing(n):
    """Tokens hidden in the middle: the others get what they would get without these tokens."""
    layer = layers(batch_first=True)[n]
    x = torch.randn(N, T, E)
    hidden = torch.zeros(N, T, dtype=torch.bool)
    hidden[:, 10:17] = True
    got, _ = layer(x, x, x, key_padding_mask=hidden, is_causal=True)
    kept = x[:, ~hidden[0]]
    want, _ = layer(kept, kept, kept, is_causal=True)
    torch.testing.assert_close(got[:, ~hidden[0]], want, rtol=1e-4, atol=1e-5)


def test_cross_attention_reads_all_keys():
    layer = LinearAttention(E, H, kdim=10, vdim=12, batch_first=True)
    q, k, v = torch.randn(N, 5, E), torch.randn(N, T, 10), torch.randn(N, T, 12)
    got, _ = layer(q, k, v)
    torch.testing.assert_close(layer(q, k.flip(1), v.flip(1))[0], got, rtol=1e-4, atol=1e-5)
    hidden = torch.zeros(N, T, dtype=torch.bool)
    hidden[:, 20:] = True
    want, _ = layer(q, k[:, :20], v[:, :20])
    torch.testing.assert_close(layer(q, k, v, key_padding_mask=hidden)[0], want, rtol=1e-4, atol=1e-5)


def test_state_dict_is_multihead_attentions():
    stock = torch.nn.MultiheadAttention(E, H)
    LinearAttention(E, H).load_state_dict(stock.state_dict())
    RetentionLayer(E, H).load_state_dict(stock.state_dict())


def test_one_word_changes_a_transformer():
    block = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=True)
    block.self_attn = LinearAttention(E, H, batch_first=True)
    x = torch.randn(N, T, E, requires_grad=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(T)
    y = block(x, src_mask=mask, is_causal=True)
    (grad,) = torch.autograd.grad(y[:, 11].sum(), x)
    assert grad[:, 11].abs().sum() > 0 and (grad[:, 12:] == 0).all()


def test_what_needs_pairs_is_refused():
    x = torch.randn(N, T, E)
    layer = LinearAttention(E, H, batch_first=True)
    with pytest.raises(ValueError, match="need_weights must be False"):
        layer(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match="attn_mask must be the causal mask"):
        layer(x, x, x, attn_mask=torch.zeros(T, T))
    with pytest.raises(ValueError, match="key_padding_mask must be boolean"):
        layer(x, x, x, key_padding_mask=torch.zeros(N, T))
    with pytest.raises(ValueError, match="as many keys"):
        RetentionLayer(E, H, batch_first=True)(x, x[:, :5], x[:, :5])


def test_random_features_estimate_softmax_attention():
    """The error falls as the features grow, to a few per cent at 4096."""
    q, k, v = (0.4 * torch.randn(1, 2, 50, 8) for _ in range(3))
    want = mlcore.ops.attention(q, k, v, causal=True)
    errors = []
    for features in (64, 4096):
        o = mlcore.ops.linear_attention(q, k, v, feature_map=RandomFeatures(8, features))
        errors.append(((o - want).norm() / want.norm()).item())
    assert errors[1] < 0.05 and errors[1] < errors[0] / 3


def test_random_features_are_orthogonal():
    weight = RandomFeatures(16, 40).weight
    for rows in weight.split(16):
        products = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).mT
        torch.testing.assert_close(products, torch.eye(len(rows)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="must be positive"):
        RandomFeatures(0, 4)
