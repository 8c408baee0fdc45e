"""mlcore.nn's token mixers against their papers' formulas, written out."""

import cmath

import pytest
import torch
import torch.nn.functional as F

from mlcore.nn import FourierMixing, GatedMLP, MixerBlock, SpatialGatingUnit

N, L, E = 2, 13, 8


@pytest.mark.parametrize("norm", ["backward", "ortho"])
def test_fourier_mixing_is_the_double_sum(norm):
    x = torch.randn(N, L, E, dtype=torch.float64)
    rows, columns = (
        torch.tensor([[cmath.exp(-2j * cmath.pi * a * b / n) for b in range(n)] for a in range(n)], dtype=torch.complex128)
        for n in (L, E)
    )
    want = (rows @ x.to(rows.dtype) @ columns).real / ((L * E) ** 0.5 if norm == "ortho" else 1)
    torch.testing.assert_close(FourierMixing(norm)(x), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(FourierMixing(norm)(x.float()).double(), want, rtol=1e-4, atol=1e-4)
    half = FourierMixing(norm)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and FourierMixing().state_dict() == {}
    torch.testing.assert_close(half.double(), want, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("causal", [False, True])
def test_spatial_gating(causal):
    unit = SpatialGatingUnit(2 * E, 20, causal=causal)
    torch.nn.init.normal_(unit.weight)
    x = torch.randn(N, L, 2 * E)
    v = F.layer_norm(x[..., E:], (E,), unit.norm.weight, unit.norm.bias)
    want = torch.empty(N, L, E)
    for t in range(L):
        seen = range(t + 1 if causal else L)
        want[:, t] = x[:, t, :E] * (sum(unit.weight[t, j] * v[:, j] for j in seen) + unit.bias[t])
    torch.testing.assert_close(unit(x), want, rtol=1e-4, atol=1e-4)


def test_spatial_gating_begins_as_the_identity():
    x = torch.randn(N, L, 2 * E)
    torch.testing.assert_close(SpatialGatingUnit(2 * E, L)(x), x[..., :E], rtol=1e-2, atol=1e-2)


def test_gated_mlp_is_causal_where_asked():
    block = GatedMLP(E, 4 * E, L, causal=True)
    torch.nn.init.normal_(block.sgu.weight)
    x = torch.randn(N, L, E, requires_grad=True)
    y = block(x)
    (grad,) = torch.autograd.grad(y[:, 5].sum(), x, retain_graph=True)
    assert grad[:, 5].abs().sum() > 0 and (grad[:, 6:] == 0).all()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    inner = F.gelu(block.proj_in(F.layer_norm(x, (E,), block.norm.weight, block.norm.bias)))
    torch.testing.assert_close(y, x + block.proj_out(block.sgu(inner)), rtol=1e-4, atol=1e-4)


def test_mixer_block():
    block = MixerBlock(L, E, 16, 24)
    x = torch.randn(N, L, E)
    W1, W2 = block.token_mixing[0], block.token_mixing[3]
    W3, W4 = block.channel_mixing[0], block.channel_mixing[3]
    assert W1.weight.shape == (16, L) and W3.weight.shape == (24, E)
    u = x + torch.stack([W2(F.gelu(W1(F.layer_norm(x, (E,))[..., e]))) for e in range(E)], -1)
    want = u + W4(F.gelu(W3(F.layer_norm(u, (E,)))))
    y = block(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FourierMixing("none"), "norm must be"),
        (lambda: SpatialGatingUnit(5, 4), "d_ffn must be even"),
        (lambda: SpatialGatingUnit(4, 4)(torch.zeros(1, 5, 4)), "at most seq_len 4"),
        (lambda: MixerBlock(4, 4, 4, 4)(torch.zeros(1, 3, 4)), "seq_len 4 tokens; got 3"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
