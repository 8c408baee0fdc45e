"""Linformer and Synthesizer layers: against their formulas in plain torch, masks, and as attention inside a Transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore.nn import LinformerAttention, SynthesizerAttention

E, H, N, L, S, LONGEST = 24, 3, 2, 11, 17, 20
D = E // H
KINDS = ["dense", "factorized_dense", "random", "factorized_random"]


def heads(layer, x, part):
    rows = slice(part * E, (part + 1) * E)
    return F.linear(x, layer.in_proj_weight[rows], layer.in_proj_bias[rows]).unflatten(-1, (H, D)).transpose(1, 2)


def output(layer, scores, v, hidden=None):
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def linformer_expected(layer, query, key, hidden=None):
    q, k, v = heads(layer, query, 0), heads(layer, key, 1), heads(layer, key, 2)
    if hidden is not None:
        k, v = (t.masked_fill(hidden[:, None, :, None], 0.0) for t in (k, v))

    def mixed(x, weight):
        weight = weight.expand(H, *weight.shape[1:])
        if layer.projection == "matrix":
            return torch.stack([weight[h, :, :S] @ x[:, h] for h in range(H)], 1)
        x = F.pad(x, (0, 0, 0, -S % layer.stride)).flatten(0, 1).mT  # (N * H, D, S)
        out = [F.conv1d(x[i].unsqueeze(1), weight[i % H].view(1, 1, -1), stride=layer.stride).squeeze(1) for i in range(len(x))]
        return torch.stack(out).mT.unflatten(0, (-1, H))

    k = mixed(k, layer.key_mix)
    v = mixed(v, layer.key_mix if layer.value_mix is None else layer.value_mix)
    return output(layer, q @ k.mT / D**0.5, v)


@pytest.mark.parametrize("projection", ["matrix", "convolution"])
@pytest.mark.parametrize("per_head, share_kv", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("padded", [False, True])
def test_linformer_matches_its_formula(projection, per_head, share_kv, padded):
    layer = LinformerAttention(E, H, LONGEST, 6, projection=projection, per_head=per_head, share_kv=share_kv, batch_first=True)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    hidden = torch.arange(S).expand(N, S) >= torch.tensor([[S], [S - 5]]) if padded else None
    got, weights = layer(query, key, key, key_padding_mask=hidden, need_weights=False)
    assert weights is None
    want = linformer_expected(layer, query, key, hidden)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    params = list(layer.parameters())
    dy = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, params, dy), torch.autograd.grad(want, params, dy)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def synthesizer_scores(layer, query, keys):
    if layer.kind == "random":
        return layer.row_scores[:, : query.shape[1], :keys]
    if layer.kind == "factorized_random":
        return layer.row_scores[:, : query.shape[1]] @ layer.column_scores[:, :keys].mT
    hidden = torch.relu(heads(layer, query, 0) @ layer.hidden_weight + layer.hidden_bias)
    parts = [hidden @ w + b for w, b in zip(layer.score_weight, layer.score_bias)]
    if layer.kind == "dense":
        return parts[0][..., :keys]
    return torch.einsum("nhla,nhlb->nhlab", *parts).flatten(-2)[..., :keys]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [None, "causal", "padding"])
def test_synthesizer_matches_its_formula(kind, masked):
    layer = SynthesizerAttention(E, H, LONGEST, kind, batch_first=True)
    x = torch.randn(N, S, E)
    hidden, kwargs = None, {}
    if masked == "causal":
        mask = torch.ones(S, S, dtype=torch.bool).triu(1)
        hidden, kwargs = mask, {"attn_mask": mask, "is_causal": True}
    if masked == "padding":
        mask = torch.arange(S).expand(N, S) >= torch.tensor([[S], [S - 5]])
        hidden, kwargs = mask[:, None, None, :], {"key_padding_mask": mask}
    got, _ = layer(x, x, x, **kwargs)
    want = output(layer, synthesizer_scores(layer, x, S), heads(layer, x, 2), hidden)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    params = list(layer.parameters())
    dy = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, params, dy), torch.autograd.grad(want, params, dy)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


LAYERS = [
    lambda **k: LinformerAttention(E, H, LONGEST, 5, **k),
    lambda **k: LinformerAttention(E, H, LONGEST, 5, projection="convolution", **k),
    *(lambda kind=kind, **k: SynthesizerAttention(E, H, LONGEST, kind, **k) for kind in KINDS),
]


@pytest.mark.parametrize("make", LAYERS)
def test_layouts_agree(make):
    layer = make(batch_first=True)
    other = make(batch_first=False)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(N, S, E)
    want, _ = layer(x, x, x, need_weights=False)
    torch.testing.assert_close(
        other(x.mT.mT.transpose(0, 1), *2 * [x.transpose(0, 1)], need_weights=False)[0], want.transpose(0, 1)
    )
    torch.testing.assert_close(layer(x[0], x[0], x[0], need_weights=False)[0], want[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", LAYERS)
def test_inside_a_transformer_layer(make):
    block = mlcore.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    block.self_attn = make(batch_first=True)
    x = torch.randn(N, S, E)
    y = block(x)
    assert y.shape == x.shape and y.isfinite().all()
    y.sum().backward()
    assert all(p.grad is not None for p in block.linear1.parameters())


def test_errors():
    x = torch.randn(1, LONGEST + 1, E)
    with pytest.raises(ValueError, match=r"LinformerAttention: key must have at most max_length 20 tokens; got 21"):
        LAYERS[0](batch_first=True)(x, x, x)
    with pytest.raises(ValueError, match=r"LinformerAttention: is_causal must be False"):
        short = x[:, :4]
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        LAYERS[0](batch_first=True)(short, short, short, attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match=r"num_keys must be 1 to max_length 20; got 0"):
        LinformerAttention(E, H, LONGEST, 0)
    with pytest.raises(ValueError, match=r"projection must be 'matrix' or 'convolution'; got 'mean'"):
        LinformerAttention(E, H, LONGEST, 4, projection="mean")
    with pytest.raises(ValueError, match=r"SynthesizerAttention: sequences must have at most max_length 20 tokens; got 21"):
        LAYERS[2](batch_first=True)(x, x, x)
    with pytest.raises(ValueError, match=r"kind must be one of dense, .*; got 'other'"):
        SynthesizerAttention(E, H, LONGEST, "other")
    with pytest.raises(ValueError, match=r"need_weights must be False; got True"):
        LAYERS[2](batch_first=True)(x[:, :4], x[:, :4], x[:, :4], need_weights=True)
