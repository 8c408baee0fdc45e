"""mlcore.nn's binary and ternary layers: what they compute, their gradients, and that the packed layer computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlcore import ops
from mlcore.nn import (
    BinaryConv2d,
    BinaryLinear,
    PackedBinaryConv2d,
    PackedBinaryLinear,
    QuantLinear,
    TernaryLinear,
)
from mlcore.quant import pack


def signs(x):
    return torch.where(x < 0, -1.0, 1.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", [{}, {"activation_scale": True}, {"binary_input": False}, {"estimator": "swish"}], ids=str)
def test_linear(how, bias):
    layer, x = BinaryLinear(70, 30, bias, **how), torch.randn(2, 5, 70)
    alpha = layer.weight.abs().mean(1)
    want = F.linear(signs(x) if how.get("binary_input", True) else x, signs(layer.weight)) * alpha
    want = want * x.abs().mean(-1, keepdim=True) if how.get("activation_scale") else want
    want = want if layer.bias is None else want + layer.bias
    torch.testing.assert_close(layer(x), want)
    packed = layer.eval().pack()
    assert isinstance(packed, PackedBinaryLinear if how.get("binary_input", True) else QuantLinear) and not packed.training
    if how in ({}, {"estimator": "swish"}):
        assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(packed(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "geometry", [{"padding": 1}, {"stride": 2, "padding": (2, 0)}, {"padding": "same", "dilation": 2}], ids=str
)
def test_conv(geometry, scaled, bias):
    layer, x = BinaryConv2d(37, 20, 3, bias=bias, activation_scale=scaled, **geometry), torch.randn(2, 37, 11, 9)
    alpha = layer.weight.abs().mean((1, 2, 3))
    want = F.conv2d(signs(x), signs(layer.weight), **geometry) * alpha[:, None, None]
    if scaled:
        want = want * F.conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9), **geometry)
    want = want if layer.bias is None else want + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), want)
    packed = layer.pack()
    assert isinstance(packed, PackedBinaryConv2d)
    if not scaled:
        assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(packed(x), layer(x))
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(packed(last), layer(x))


def test_ternary():
    layer, x = TernaryLinear(70, 30), torch.randn(2, 5, 70)
    kept = layer.weight.abs() > 0.7 * layer.weight.abs().mean(1, keepdim=True)
    scale = (layer.weight.abs() * kept).sum(1) / kept.sum(1)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight.sign() * kept) * scale + layer.bias)
    packed = layer.pack()
    assert packed.packed.format == "ternary" and packed.packed.bits == 2
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.packed.dequantize(), pack(layer.weight, "ternary").dequantize())
    rounded = layer.pack(dynamic_int8=True)
    assert (rounded(x) - layer(x)).norm() < 0.02 * layer(x).norm()


@pytest.mark.parametrize(
    "layer", [BinaryLinear(16, 4), TernaryLinear(16, 4), BinaryConv2d(4, 4, (2, 2))], ids=lambda m: type(m).__name__
)
def test_trains(layer):
    """Gradients reach every parameter and lower the loss."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, 2, 2) if isinstance(layer, BinaryConv2d) else torch.randn(64, 16)
    target = signs(x).flatten(1)[:, :4]
    optimizer, losses = torch.optim.Adam(layer.parameters(), 0.02), []
    for _ in range(60):
        loss = F.mse_loss(layer(x).flatten(1), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_state_dicts():
    stock, layer = torch.nn.Conv2d(3, 4, 3), BinaryConv2d(3, 4, 3)
    layer.load_state_dict(stock.state_dict())
    assert torch.equal(layer.weight, stock.weight)
    x = torch.randn(1, 3, 5, 5)
    for trained, other in ((layer, BinaryConv2d(3, 4, 3)), (BinaryLinear(5, 4), BinaryLinear(5, 4))):
        packed, fresh = trained.pack(), other.pack()
        fresh.load_state_dict(packed.state_dict())
        assert torch.equal(fresh(x), packed(x)) and "estimator=clipped" in repr(packed) and "estimator=clipped" in repr(trained)


def test_layers_stay_packed():
    first, second = BinaryConv2d(37, 40, 3, padding=1).pack(), BinaryConv2d(40, 5, 1, stride=2).pack()
    flat, x = BinaryLinear(37, 6).pack(), torch.randn(2, 37, 8, 8)
    with torch.no_grad():
        bits = first(ops.pack_pixels(x), packed_output=True)
        assert torch.equal(second(bits), second(first(x)))
        assert torch.equal(flat(ops.pack_signs(x[0, :, 0].T)), flat(x[0, :, 0].T))


def test_compiles():
    net = torch.nn.Sequential(
        BinaryConv2d(8, 16, 3, padding=1).pack(), torch.nn.BatchNorm2d(16), BinaryConv2d(16, 4, 1).pack()
    ).eval()
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: BinaryLinear(3, 4, estimator="best"), "BinaryLinear: estimator must be identity"),
        (lambda: BinaryLinear(3, 4, binary_input=False, activation_scale=True), "activation_scale needs binary_input"),
        (lambda: PackedBinaryLinear(pack(torch.randn(3, 4), "int4")), "format 'binary'; got 'int'"),
        (lambda: PackedBinaryLinear(pack(torch.randn(3, 4), "binary"), torch.ones(4)), r"bias must be \(3,\); got \(4,\)"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ESTIMATED = {
    "identity": lambda x: torch.ones_like(x),
    "clipped": lambda x: (x.abs() <= 1).double(),
    "approx": lambda x: (2 - 2 * x.abs()).clamp(min=0),
}


@pytest.mark.parametrize("estimator", ["identity", "clipped", "approx", "swish"])
def test_estimators(estimator):
    x = torch.linspace(-3, 3, 241, dtype=torch.float64, requires_grad=True)
    y = ops.binarize(x, estimator)
    assert torch.equal(y, torch.where(x < 0, -1.0, 1.0).double())
    (dx,) = torch.autograd.grad(y.sum(), x)
    if estimator == "swish":  # the derivative of BNN+'s SS_5, by autograd

        def smooth(t):
            s = (5 * t).sigmoid()
            return 2 * s * (1 + 5 * t * (1 - s)) - 1

        (want,) = torch.autograd.grad(smooth(x).sum(), x)
    else:
        want = ESTIMATED[estimator](x.detach())
    torch.testing.assert_close(dx, want)
    far = torch.tensor([1e30, -1e30, 50.0], requires_grad=True)
    assert torch.autograd.grad(ops.binarize(far, estimator).sum(), far)[0].isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dorefa(bits):
    steps, x = 2**bits - 1, torch.linspace(-0.5, 1.5, 101, requires_grad=True)
    y = ops.dorefa_activations(x, bits)
    assert torch.equal(y, (x.detach().clamp(0, 1) * steps).round() / steps)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], ((x >= 0) & (x <= 1)).float())
    w = torch.randn(40, dtype=torch.float64, requires_grad=True)
    q = ops.dorefa_weights(w, bits)
    codes = (q.detach() + 1) / 2 * steps
    torch.testing.assert_close(codes, codes.round())
    assert q.max() == 1 or q.min() == -1
    smooth = w.tanh() / w.tanh().abs().max()
    torch.testing.assert_close(
        torch.autograd.grad((q * x[:40]).sum(), w)[0], torch.autograd.grad((smooth * x[:40]).sum(), w)[0]
    )
    assert ops.dorefa_weights(torch.zeros(3), bits).isfinite().all()


def test_ternarize():
    x = torch.tensor([[-3.0, -0.1, 0.2, 2.0], [0.1, -0.1, 0.05, 0.02]], requires_grad=True)
    assert torch.equal(ops.ternarize(x), torch.tensor([[-1.0, 0, 0, 1], [0, 0, 0, 0]]))
    by_row = ops.ternarize(x, 1)
    assert torch.equal(by_row, torch.tensor([[-1.0, 0, 0, 1], [1, -1, 1, 0]]))
    assert torch.equal(torch.autograd.grad(by_row.sum(), x)[0], (x.abs() <= 1).float())


def test_bad_estimates():
    for call, message in [
        (lambda: ops.binarize(torch.ones(3), "best"), "binarize: estimator must be"),
        (lambda: ops.binarize(torch.ones(3).int()), "binarize: x must be floating"),
        (lambda: ops.ternarize(torch.ones(3).int()), "ternarize: x must be floating"),
        (lambda: ops.dorefa_activations(torch.ones(3), 0), "dorefa_activations: bits must be 1 to 16; got 0"),
        (lambda: ops.dorefa_weights(torch.ones(3), 17), "dorefa_weights: bits must be 1 to 16; got 17"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
