"""Second derivatives and forward-mode AD of attention: every argument that has a gradient has these too, by the reference."""

from __future__ import annotations

import pytest
import torch
from attention_suite import qkv
from torch.autograd import forward_ad

from mlcore import nn
from mlcore.ops import attention, merge_attention
from mlcore.patterns import Causal, Documents, GlobalTokens, Strided, Window

H, TQ, TK = 2, 4, 5
PATTERN = Causal() & (Window(2, 0) | GlobalTokens(1))


def finite(lse):
    """Rows that see nothing have lse -inf and no derivative."""
    return torch.where(lse == float("-inf"), 0.0, lse)


def both(q, k, v, **options):
    o, lse = attention(q, k, v, return_lse=True, **options)
    return o, finite(lse)


FEATURES = {
    "plain": (both, ()),
    "pattern": (lambda *t: both(*t, pattern=PATTERN), ()),
    "empty documents": (lambda *t: both(*t, pattern=Documents([0, 1, 1, 3], [0, 0, 2, 5]) & ~Strided(3)), ()),
    "softcap": (lambda *t: both(*t, softcap=1.5, causal=True), ()),
    "bias": (lambda q, k, v, b: both(q, k, v, bias=b, causal=True), ((H, 1, TK),)),
    "relative": (lambda q, k, v, r: both(q, k, v, relative=r), ((H, TQ + TK - 1),)),
    "alibi": (lambda q, k, v, s: both(q, k, v, alibi_slopes=s, pattern=PATTERN), ((H,),)),
    "sinks": (lambda q, k, v, s: both(q, k, v, sinks=s, pattern=PATTERN), ((H,),)),
    "merged": (
        lambda q, k, v: merge_attention(
            [attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ((0, 2), (2, TK))]
        ),
        (),
    ),
}


def leaves_of(shapes, dtype=torch.float64):
    tensors = [*qkv((1, H, 1, TQ, TK, 3, 2)).values(), *(torch.rand(*s) for s in shapes)]
    return [t.to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("feature", FEATURES)
def test_backward_of_backward_and_forward_mode(feature):
    fn, shapes = FEATURES[feature]
    leaves = leaves_of(shapes)
    assert torch.autograd.gradcheck(fn, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_kernels_dtype(feature):
    """float32: a kernel goes forward, the reference from there; against float64."""
    fn, shapes = FEATURES[feature]
    narrow = leaves_of(shapes, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in narrow]
    tangents = [torch.randn_like(t) for t in narrow]

    def second(leaves):
        total = sum((o.float() if o.dtype == torch.float32 else o).square().sum() for o in fn(*leaves))
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, want in zip(second(narrow), second(wide)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)

    def forward(leaves):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.detach(), d.to(t.dtype)) for t, d in zip(leaves, tangents)]
            return [x for o in fn(*duals) for x in forward_ad.unpack_dual(o)]

    for got, want in zip(forward(narrow), forward(wide)):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


def test_hessian_vector_products_agree():
    """Forward over reverse and reverse over reverse."""
    q, k, v = (t.detach() for t in leaves_of(()))

    def loss(q):
        return attention(q, k, v, pattern=PATTERN).square().sum()

    direction = torch.randn_like(q)
    _, forward = torch.func.jvp(torch.func.grad(loss), (q,), (direction,))
    (reverse,) = torch.autograd.functional.vhp(loss, q, direction)[1:]
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("impl", ["cpu", "cuda", "triton"])
def test_an_explicit_kernel_is_not_replaced(impl):
    q, k, v = (t.detach().float() for t in leaves_of(()))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="the reference can"):
        attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v, impl=impl)


@pytest.mark.parametrize("layer", [nn.LocalAttention(8, 2, 2), nn.LocalAttention(8, 2, 2, alibi="learned", sinks=True)])
def test_layers(layer):
    layer = layer.double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)
