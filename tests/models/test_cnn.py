"""mlcore.models.cnn: shapes, folded inference against torch's own layers, weights of other libraries, receptive fields."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcore.models import cnn
from mlcore.nn import DepthwiseSeparableConv2d, MinPool2d, PointwiseConv2d, pool2d

SMALL = cnn.MobileNetConfig(width=0.25, classes=7)


def randomised(model):
    """Weights and running moments away from their first values, as after a training."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def plain(model):
    """The same network without fused blocks, in float64: every layer called by itself."""
    model = copy.deepcopy(model).double()

    def forward(self, x, residual=None):
        h = x
        if isinstance(self, DepthwiseSeparableConv2d):
            conv = self.depthwise
            h = F.conv2d(h.contiguous(), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            h = self.depthwise_activation(self.depthwise_norm(h))
        return self._finish(self.pointwise(h), residual)

    for m in model.modules():
        if isinstance(m, (DepthwiseSeparableConv2d, PointwiseConv2d)):
            m.forward = forward.__get__(m)
    return model


@pytest.mark.parametrize("kind", [cnn.MobileNetV1, cnn.MobileNetV2])
def test_mobilenets_in_inference_and_training(kind):
    model = randomised(kind(SMALL))
    stock, x = plain(model), torch.randn(2, 3, 64, 48)
    want = stock(x.double())
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), model(x.contiguous(memory_format=torch.channels_last)))
        torch.testing.assert_close(model.probabilities(x).sum(1), torch.ones(2))
    torch.testing.assert_close(model(x).double(), want, rtol=1e-4, atol=1e-4)  # with gradients
    model.train(), stock.train()
    for m in (*model.modules(), *stock.modules()):
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    got, want = model(x), stock(x.double())
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
    got.square().sum().backward(), want.square().sum().backward()
    # Batch norms over as few as 8 values a channel amplify float32's rounding; a shift before a norm has a gradient of 0.
    for (name, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad.double() - b.grad).norm() < 0.02 * (b.grad.norm() + 0.1), name
    for (name, a), b in zip(model.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-3, msg=name)


def test_folded_weights_follow_the_parameters():
    block = randomised(PointwiseConv2d(6, 5))
    x = torch.randn(1, 6, 3, 3)
    with torch.no_grad():
        before = block(x)
        block.pointwise.weight.mul_(2)
        block.pointwise_norm.running_mean.zero_()
        got = block(x)
    assert not torch.equal(got, before)
    torch.testing.assert_close(got, block(x))  # with gradients: torch's layers
    loaded = PointwiseConv2d(6, 5).eval()
    loaded.load_state_dict(block.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), got)
        torch.testing.assert_close(copy.deepcopy(block)(x), got)


@pytest.mark.parametrize("pooling", ["max", "mean", "min"])
@pytest.mark.parametrize("separable", [False, True])
def test_lecture_cnn(pooling, separable):
    config = cnn.LectureCNNConfig((3, 20, 17), (8, 12), pooling=pooling, hidden=16, classes=5, separable=separable)
    model = cnn.LectureCNN(config).eval()
    x = torch.randn(4, 3, 20, 17)
    assert model(x).shape == (4, 5)
    torch.testing.assert_close(model.probabilities(x), model(x).softmax(1))
    with pytest.raises(ValueError, match="LectureCNN: 6 poolings by 2 leave nothing of"):
        cnn.LectureCNN(cnn.LectureCNNConfig(channels=(2,) * 6))


def test_pooling():
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(MinPool2d(3, 2, 1)(x), -F.max_pool2d(-x, 3, 2, 1))
    out, indices = MinPool2d(2, return_indices=True)(x)
    assert torch.equal(x.flatten(2).gather(2, indices.flatten(2)).view_as(out), out)
    assert torch.equal(pool2d("mean", 2)(x), F.avg_pool2d(x, 2))
    with pytest.raises(ValueError, match="pool2d: kind must be one of max, mean, min; got 'sum'"):
        pool2d("sum", 2)


def test_alphago_policy():
    model = cnn.AlphaGoPolicy()
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert [c.kernel_size[0] for c in convs] == [5, *[3] * 11] and convs[0].in_channels == 48
    assert all(c.out_channels == 192 for c in convs)
    small = cnn.AlphaGoPolicy(cnn.AlphaGoConfig(9, 4, 8, 3))
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        small.position_bias[40] = 50.0
    assert small(x).shape == (2, 81) and small.probabilities(x).argmax(1).eq(40).all()
    with pytest.raises(ValueError, match="AlphaGoPolicy: the board must be 9 x 9"):
        small(torch.randn(1, 4, 8, 9))


def test_vgg():
    model = cnn.VGG(cnn.VGGConfig(((4,), (6, 6)), 3, True, 16, 5))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    names = list(cnn.VGG(cnn.VGGConfig(hidden=8)).state_dict())
    assert names[:4] == ["features.0.weight", "features.0.bias", "features.3.weight", "features.3.bias"]
    assert [n for n in names if n.endswith("weight")][-3:] == [
        "classifier.0.weight",
        "classifier.3.weight",
        "classifier.6.weight",
    ]


def test_convnext_block():
    block = cnn.ConvNeXtBlock(12)
    nn.init.uniform_(block.layer_scale)
    x = torch.randn(2, 12, 10, 9)
    h = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=3, groups=12).permute(0, 2, 3, 1)
    h = F.layer_norm(h, (12,), block.norm.weight, block.norm.bias, 1e-6)
    want = x + (block.project(F.gelu(block.expand(h))) * block.layer_scale).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


class TorchvisionResidual(nn.Module):
    """The layout of torchvision's InvertedResidual, for its names and its arithmetic."""

    def __init__(self, before, after, stride, expand):
        super().__init__()
        inner = before * expand

        def triple(i, o, k, s, g):
            return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU6())

        layers = [triple(before, inner, 1, 1, 1)] if expand != 1 else []
        layers += [triple(inner, inner, 3, stride, inner), nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.conv, self.residual = nn.Sequential(*layers), stride == 1 and before == after

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class TorchvisionV2(nn.Module):
    def __init__(self, model):
        super().__init__()
        stem, last = model.stem, model.blocks[-1]

        def triple(i, o, k, s):
            return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU6())

        layers = [triple(3, stem[0].out_channels, 3, 2)]
        for b in model.blocks[:-1]:
            d = b.separable.depthwise
            before = b.expand.pointwise.in_channels if b.expand is not None else d.in_channels
            layers.append(TorchvisionResidual(before, b.separable.pointwise.out_channels, d.stride[0], d.in_channels // before))
        layers.append(triple(last.pointwise.in_channels, last.pointwise.out_channels, 1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(last.pointwise.out_channels, model.classifier.out_features))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def test_weights_of_torchvision():
    ours = cnn.MobileNetV2(SMALL).eval()
    theirs = randomised(TorchvisionV2(ours))
    cnn.load_weights(ours, theirs.state_dict(), "torchvision")
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    block = cnn.ConvNeXtBlock(4)
    names = {"depthwise.": "block.0.", "norm.": "block.2.", "expand.": "block.3.", "project.": "block.5."}
    state = {}
    for name, t in block.state_dict().items():
        for mine, other in names.items():
            name = name.replace(mine, other)
        state[name] = t.view(-1, 1, 1) if name == "layer_scale" else t
    cnn.load_weights(cnn.ConvNeXtBlock(4), state, "torchvision")
    with pytest.raises(
        ValueError, match="rename_weights: no mapping for LectureCNN from 'timm'; there are VGG from torchvision"
    ):
        cnn.load_weights(cnn.LectureCNN(), {}, "timm")


def timm_names(stages, layers, first):
    for stage, count in enumerate(stages):
        for i in range(count):
            for layer in first if stage == 0 else layers:
                yield f"blocks.{stage}.{i}.{layer}"


@pytest.mark.parametrize(
    "kind, stages, layers, first, head",
    [
        (cnn.MobileNetV1, (1, 2, 2, 6, 2), ("conv_dw", "bn1", "conv_pw", "bn2"), ("conv_dw", "bn1", "conv_pw", "bn2"), ()),
        (
            cnn.MobileNetV2,
            (1, 2, 3, 4, 3, 3, 1),
            ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"),
            ("conv_dw", "bn1", "conv_pw", "bn2"),
            ("conv_head", "bn2"),
        ),
    ],
)
def test_weights_of_timm(kind, stages, layers, first, head):
    """timm registers layers in the order in which they run, as ours do: names must map onto ours one to one, in order."""
    model = kind(SMALL)
    names = []
    for layer in ("conv_stem", "bn1", *timm_names(stages, layers, first), *head):
        tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        names += [f"{layer}.{t}" for t in (tensors if layer.split(".")[-1].startswith("bn") else ("weight",))]
    names += ["classifier.weight", "classifier.bias"]
    state = dict(zip(names, randomised(kind(SMALL)).state_dict().values(), strict=True))
    assert list(cnn.rename_weights(model, state, "timm")) == list(model.state_dict())
    cnn.load_weights(model, state, "timm")


def seen(features, image, at):
    """The rectangle of pixels that unit `at` of the last layer depends on, by gradients in float64."""
    x = torch.rand(1, *image, dtype=torch.float64, requires_grad=True)
    y = features(x)
    (grad,) = torch.autograd.grad(y[0, :, at[0], at[1]].sum(), x)
    rows, cols = grad.abs().sum((0, 1)).nonzero().T
    return int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1


def test_receptive_field():
    fields = cnn.receptive_field(cnn.LectureCNN())
    assert [f.size for f in fields.values()] == [(3, 3), (4, 4), (8, 8), (10, 10)]
    assert [f.stride for f in fields.values()] == [(1, 1), (2, 2), (2, 2), (4, 4)]
    assert list(cnn.receptive_field(cnn.AlphaGoPolicy(cnn.AlphaGoConfig(9, 4, 8, 12))).values())[-1].size == (27, 27)
    mobile = cnn.receptive_field(cnn.MobileNetV1(SMALL))
    assert list(mobile)[-1] == "blocks.12.pointwise" and mobile["blocks.12.pointwise"] == cnn.Field((315, 315), (32, 32))
    assert cnn.receptive_field(cnn.MobileNetV2(SMALL))["blocks.17.pointwise"] == cnn.Field((491, 491), (32, 32))
    with pytest.raises(ValueError, match=r"receptive_field: Linear has no torch\.nn\.Conv2d"):
        cnn.receptive_field(nn.Linear(2, 2))


class Branches(nn.Module):
    """A wide branch and a narrow one that meet, then a dilated convolution with a rectangular window."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(2, 2, 5, padding=2, stride=2), nn.Conv2d(2, 2, 1, stride=2)
        self.after = nn.Conv2d(2, 2, (3, 2), dilation=(2, 1))

    def forward(self, x):
        return self.after(torch.tanh(self.wide(x) + self.narrow(x)))


def test_receptive_field_is_what_gradients_reach():
    model = Branches().double()
    found = cnn.receptive_field(model, (2, 40, 40))["after"]
    assert seen(model, (2, 40, 40), (8, 8)) == found.size == (13, 7) and found.stride == (2, 2)
