"""mlcore.nn.DepthwiseConv*d and DepthwiseSeparableConv2d against torch.nn, and mlcore.accelerate."""

from __future__ import annotations

import copy

import pytest
import torch

import mlcore
from mlcore.nn import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d, DepthwiseSeparableConv2d

LAYERS = {1: (DepthwiseConv1d, torch.nn.Conv1d), 2: (DepthwiseConv2d, torch.nn.Conv2d), 3: (DepthwiseConv3d, torch.nn.Conv3d)}


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("dims", LAYERS)
def test_is_torchs_layer(dims, padding, mode):
    ours, stock = LAYERS[dims]
    args = (6, 12, 4, 1 if padding == "same" else 2, padding, 1, 6, True, mode)
    torch.manual_seed(3)
    layer = ours(*args)
    torch.manual_seed(3)
    want = stock(*args)
    assert layer.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), want.parameters(), strict=True))
    x = torch.randn(2, 6, *(9, 8, 7)[:dims])
    torch.testing.assert_close(layer(x), want(x))


def test_defaults_and_errors():
    layer = DepthwiseConv2d(5)
    assert layer.weight.shape == (5, 1, 3, 3) and layer.groups == 5
    with pytest.raises(ValueError, match="DepthwiseConv2d: groups must be in_channels = 5, or left out; got 1"):
        DepthwiseConv2d(5, 5, 3, groups=1)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_separable_block(format):
    block = DepthwiseSeparableConv2d(6, 6, residual=True).to(memory_format=format)
    stock = torch.nn.Sequential(
        torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Conv2d(6, 6, 1, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
    )
    for mine, theirs in zip(block.parameters(), stock.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    x = torch.randn(2, 6, 9, 8).to(memory_format=format)
    mine, theirs = (t.detach().clone().requires_grad_() for t in (x, x))
    got, want = block(mine), theirs + stock(theirs)
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got.square().sum(), [mine, *block.parameters()]),
        torch.autograd.grad(want.square().sum(), [theirs, *stock.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    assert DepthwiseSeparableConv2d(4, 8, 5, 2, dilation=2, multiplier=2, norm=None, activation=None)(
        torch.randn(1, 4, 20, 20)
    ).shape == (1, 8, 10, 10)
    with pytest.raises(ValueError, match="residual needs in_channels = out_channels and stride 1; got 4, 8 and 1"):
        DepthwiseSeparableConv2d(4, 8, residual=True)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = torch.nn.LayerNorm(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = torch.nn.RMSNorm(8)
        self.double = torch.nn.LayerNorm(8, dtype=torch.float64)

    def forward(self, x):
        h = self.depthwise(self.stem(x)).flatten(2).transpose(1, 2)
        h = self.norm(h)
        return self.last(h + self.attention(h, h, h, need_weights=False)[0])


def test_accelerate():
    model = Net()
    stock = copy.deepcopy(model)
    state, calls = model.state_dict(), []
    depthwise, parameter = model.depthwise, model.depthwise.weight
    depthwise.register_forward_hook(lambda *_: calls.append(1))
    report = mlcore.accelerate(model)
    assert report.swapped == {
        "depthwise": "mlcore.nn.DepthwiseConv2d",
        "norm": "mlcore.nn.LayerNorm",
        "attention": "mlcore.nn.MultiheadAttention",
        "last": "mlcore.nn.RMSNorm",
    }
    assert report.left == {
        "stem": "not depthwise: 1 groups of 3 channels",
        "double": "weight is torch.float64, which the kernels don't take",
    }
    assert "depthwise: now mlcore.nn.DepthwiseConv2d" in str(report) and "stem: left, not depthwise" in str(report)
    assert model.depthwise is depthwise and depthwise.weight is parameter and type(depthwise) is DepthwiseConv2d
    assert list(model.state_dict()) == list(state)
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)
    assert calls == [1]
    assert not mlcore.accelerate(model).swapped


def test_accelerate_leaves_what_torch_serves_better():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, groups=4), torch.nn.Conv2d(8, 8, 1, groups=8), torch.nn.Conv2d(8, 8, 5, groups=8)
    )
    report = mlcore.accelerate(model)
    assert report.swapped == {"2": "mlcore.nn.DepthwiseConv2d"}
    assert report.left["0"].startswith("2 filters a channel") and report.left["1"].startswith("a kernel of one tap")
    assert [type(m) for m in model] == [torch.nn.Conv2d, torch.nn.Conv2d, DepthwiseConv2d]
    single = torch.nn.Conv2d(8, 8, 5, groups=8).eval()
    assert mlcore.accelerate(single).left["(model)"].startswith("in inference torch is faster")
    assert not mlcore.accelerate(torch.nn.Conv2d(8, 8, 3, groups=8).eval()).left


def test_accelerate_leaves_what_it_does_not_know():
    class Mine(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(Mine(2, 2, 3, groups=2), torch.nn.LayerNorm(4))
    model[1].forward = lambda x: x
    report = mlcore.accelerate(model)
    assert not report.swapped
    assert report.left == {
        "0": "Mine is a subclass of Conv2d and may compute something else",
        "1": "its forward was replaced",
    }
    single = torch.nn.Conv1d(4, 4, 3, groups=4)
    assert mlcore.accelerate(single).swapped == {"(model)": "mlcore.nn.DepthwiseConv1d"}
    with pytest.raises(ValueError, match=r"accelerate: model must be a torch\.nn\.Module; got int"):
        mlcore.accelerate(3)
