"""mlcore.nn.CausalConv1d against the torch.nn.Conv1d that models use, and the causal-conv1d package's signatures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlcore.compat import causal_conv1d as compat
from mlcore.nn import CausalConv1d


def test_is_the_conv1d_of_models():
    stock = torch.nn.Conv1d(6, 6, 4, padding=3, groups=6)
    layer = CausalConv1d(6, 4, activation="silu")
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(2, 6, 11)
    torch.testing.assert_close(layer(x), F.silu(stock(x)[..., :11]))
    _, final = layer(x, return_final_states=True)
    assert torch.equal(final, x[..., -3:])
    assert "activation='silu'" in repr(layer)


def test_steps_continue_the_prompt():
    layer = CausalConv1d(5, 3, bias=False)
    x = torch.randn(2, 5, 9)
    want = layer(x)
    state = layer.new_state(2)
    with torch.no_grad():
        got = [layer.step(x[..., :4], state), *(layer.step(x[..., t], state)[..., None] for t in range(4, 9))]
    torch.testing.assert_close(torch.cat(got, -1), want)


def test_compat_fn():
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    initial = torch.randn(2, 3, 6).transpose(1, 2)
    want = F.silu(F.conv1d(torch.cat([initial, x], -1), weight[:, None], bias, groups=6))
    out = compat.causal_conv1d_fn(x, weight, bias, None, initial, False, None, "swish")
    torch.testing.assert_close(out, want)
    given = torch.empty(2, 3, 6).transpose(1, 2)
    out, states = compat.causal_conv1d_fn(x, weight, bias, None, initial, True, given, "silu")
    assert states is given and torch.equal(given, x[..., -3:])
    ids = torch.tensor([[0] * 4 + [1] * 5] * 2, dtype=torch.int32)
    out = compat.causal_conv1d_fn(x, weight, bias, seq_idx=ids)
    torch.testing.assert_close(out[..., 4:], compat.causal_conv1d_fn(x[..., 4:], weight, bias))
    with pytest.raises(NotImplementedError, match='activation must be None, "silu" or "swish"; got \'gelu\''):
        compat.causal_conv1d_fn(x, weight, activation="gelu")


def test_compat_update_and_states():
    x, weight = torch.randn(3, 6, 5), torch.randn(6, 4)
    want = compat.causal_conv1d_fn(x, weight, activation="silu")
    state, ring = torch.zeros(3, 6, 3), torch.zeros(5, 6, 4)
    rows = torch.tensor([3, 0, 4], dtype=torch.int32)
    for t in range(5):
        torch.testing.assert_close(compat.causal_conv1d_update(x[..., t], state, weight, None, "silu"), want[..., t])
        seqlens = torch.full((3,), t, dtype=torch.int32)
        got = compat.causal_conv1d_update(x[..., t], ring, weight, None, "silu", seqlens, rows)
        torch.testing.assert_close(got, want[..., t])
    tokens, cu = torch.randn(7, 6), torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    states = compat.causal_conv1d_varlen_states(tokens, cu, 4)
    assert torch.equal(states[0], F.pad(tokens[:2].t(), (2, 0))) and states[1].eq(0).all()
    assert torch.equal(states[2], tokens[3:].t())
