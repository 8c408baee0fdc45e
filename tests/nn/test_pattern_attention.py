"""mlcore.nn's layers over patterns, against torch's own layer with the dense mask and the same parameters."""

from __future__ import annotations

import pytest
import torch

from mlcore import nn
from mlcore.patterns import Causal, Documents, Full, Graph, Lengths, Window

B, T, E, H = 2, 90, 32, 4


def torch_twin(layer):
    """torch.nn.MultiheadAttention with the layer's parameters."""
    twin = torch.nn.MultiheadAttention(E, H, batch_first=True)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(getattr(layer, f"{x}_proj"), name) for x in "qkv"]
            getattr(twin, f"in_proj_{name}").copy_(torch.cat(parts))
            getattr(twin.out_proj, name).copy_(getattr(layer.out_proj, name))
    return twin


def compare(layer, seen, x, *arguments, context=None):
    got = layer(x, *arguments)
    want = torch_twin(layer)(
        x, x if context is None else context, x if context is None else context, attn_mask=~seen, need_weights=False
    )[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (g,) = torch.autograd.grad(got.square().sum(), x)
    (w,) = torch.autograd.grad(want.square().sum(), x)
    torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def tokens(length=T):
    return torch.randn(B, length, E, requires_grad=True)


I, J = torch.arange(T)[:, None], torch.arange(T)[None]  # queries, keys


@pytest.mark.parametrize(
    ("layer", "seen"),
    [
        (lambda: nn.LocalAttention(E, H, 5), (I - J).abs() <= 5),
        (lambda: nn.LocalAttention(E, H, 5, causal=True, dilation=3), ((I - J) % 3 == 0) & (I - J >= 0) & (I - J <= 15)),
        (lambda: nn.StridedAttention(E, H, 7), ((I - J) % 7 == 0) | ((I - J).abs() < 7)),
        (lambda: nn.StridedAttention(E, H, 7, causal=True), (((I - J) % 7 == 0) | ((I - J).abs() < 7)) & (J <= I)),
        (lambda: nn.GlobalLocalAttention(E, H, 4, 3), ((I - J).abs() <= 4) | (I < 3) | (J < 3)),
        (
            lambda: nn.GlobalLocalAttention(E, H, 4, [8, 50], causal=True),
            ((I - J <= 4) | (I == 8) | (I == 50) | (J == 8) | (J == 50)) & (J <= I),
        ),
        (lambda: nn.PatternAttention(E, H), torch.ones(T, T, dtype=torch.bool)),
    ],
    ids=["local", "dilated", "strided", "causal strided", "global", "causal global", "full"],
)
def test_layers_see_what_they_say(layer, seen):
    compare(layer(), seen, tokens())


def test_what_must_hold_besides():
    cu = torch.tensor([0, 30, T])
    compare(nn.LocalAttention(E, H, 5), Window(5, 5).to_dense(T) & Documents(cu).to_dense(T), tokens(), Documents(cu))


@pytest.mark.parametrize("sparse", [False, True])
def test_graph(sparse):
    edges = (torch.rand(T, T) < 0.1) | torch.eye(T, dtype=torch.bool)
    given = edges.float().to_sparse() if sparse else edges
    compare(nn.GraphAttention(E, H, self_loops=False), edges, tokens(), given)
    loose = edges & ~torch.eye(T, dtype=torch.bool)
    compare(nn.GraphAttention(E, H), edges, tokens(), Graph(loose))


def test_cross_attention():
    x, context = tokens(20), torch.randn(B, T, E)
    layer = nn.CrossAttention(E, H)
    compare(layer, torch.ones(20, T, dtype=torch.bool), x, context, context=context)
    lengths = torch.tensor([T, 13])
    spoilt = context.clone()
    spoilt[1, 13:] = 7.0
    assert torch.equal(layer(x, context, Lengths(lengths)), layer(x, spoilt, Lengths(lengths)))
    assert nn.CrossAttention(E, H, kdim=12)(x, torch.randn(B, 9, 12)).shape == (B, 20, E)


def test_grouped_heads_alibi_sinks_and_dropout():
    x = tokens()
    layer = nn.LocalAttention(E, H, 8, causal=True, num_kv_heads=2, alibi="learned", sinks=True, dropout=0.5)
    out = layer(x)
    grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    assert (
        all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
        and {"alibi_slopes", "sinks"} <= dict(layer.named_parameters()).keys()
    )
    assert not torch.equal(out, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    again = nn.LocalAttention(E, H, 8, causal=True, num_kv_heads=2, alibi="learned", sinks=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert "alibi_slopes" not in nn.PatternAttention(E, H, Causal(), alibi="fixed").state_dict()


def test_compiles():
    layer = nn.GlobalLocalAttention(E, H, 4, 3, sinks=True, alibi="fixed")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (33, 70):
        x = tokens(length)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim 32; got 5"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads 4; got 3"),
        ({"alibi": "some"}, "alibi must be 'fixed', 'learned' or None"),
        ({"dropout": 2.0}, r"dropout must be in \[0, 1\]; got 2.0"),
    ],
)
def test_bad_arguments_raise(options, words):
    with pytest.raises(ValueError, match=words):
        nn.PatternAttention(**{"embed_dim": E, "num_heads": H, "pattern": Full()} | options)
