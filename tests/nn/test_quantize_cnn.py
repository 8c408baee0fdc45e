"""mlcore.quantize, prepare_qat and convert on convolutional networks."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlcore
from mlcore import QuantConfig
from mlcore.models import cnn
from mlcore.nn import ConvNorm2d, DepthwiseSeparableConv2d, FakeQuantConv2d, PointwiseConv2d, QuantConv2d, QuantLinear

INT8 = QuantConfig("int8", None)
ALL = QuantConfig("int8", None, convolutions=True)


def settled(model):
    """The model in inference, its norms with moments that do something."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            (
                m.running_mean.normal_(0, 0.3),
                m.running_var.uniform_(0.5, 2),
                m.weight.data.uniform_(0.5, 1.5),
                m.bias.data.normal_(0, 0.3),
            )
    return model.eval()


def sqnr(got, want):
    return 10 * torch.log10(want.square().sum() / (got - want).square().sum()).item()


@pytest.mark.parametrize("kind", [cnn.MobileNetV1, cnn.MobileNetV2])
def test_mobilenets(kind):
    model = settled(kind(cnn.MobileNetConfig(width=0.5, classes=10)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        report = mlcore.quantize(model, ALL)
        got = model(x)
    assert sqnr(got, want) > 17
    why = {r.name: r.skipped for r in report.layers}
    assert why.pop("stem.0").startswith("a 3 x 3 convolution of 1 groups") and set(why.values()) == {None}
    layers = [m for m in model.modules() if isinstance(m, QuantConv2d)]
    assert len(layers) == len(why) - 1  # and the classifier
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 1  # every other one went into its convolution
    assert min(r.sqnr_db for r in report.quantized) > 35
    assert {m.activation for m in layers} == ({"relu6"} if kind is cnn.MobileNetV1 else {"relu6", None})
    model(x).sum().backward()  # what isn't quantized can still be trained
    assert model.stem[0].weight.grad is not None


@pytest.mark.parametrize("kind", [cnn.MobileNetV1, cnn.MobileNetV2])
def test_mobilenets_stay_one_op_in_float32(kind, monkeypatch):
    """Layers that run as one op are left unless they are asked for; a low-bit classifier comes behind that op."""
    model = settled(kind(cnn.MobileNetConfig(width=0.5, classes=10)))
    x, calls = torch.randn(2, 3, 64, 64), []
    run = mlcore.ops.PackedChain.__call__
    monkeypatch.setattr(mlcore.ops.PackedChain, "__call__", lambda self, x: calls.append(x.shape) or run(self, x))
    with torch.no_grad():
        want = model(x)
        report = mlcore.quantize(model, INT8)
        got = model(x)
    assert calls == [x.shape] * 2 and sqnr(got, want) > 35
    assert [r.name for r in report.quantized] == ["classifier"]
    reasons = {r.skipped for r in report.skipped if r.name.endswith("pointwise")}
    assert "in float32 one op runs it and its neighbours, which is faster; config.convolutions=True takes it" in reasons
    assert all("convolutions=True takes it" in reason for reason in reasons)


def torchs_cnn():
    def block(before, after, stride):
        depthwise = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
        pointwise = nn.Conv2d(before, after, 1, bias=False)
        return nn.Sequential(depthwise, nn.BatchNorm2d(before), nn.ReLU(True), pointwise, nn.BatchNorm2d(after), nn.SiLU())

    return nn.Sequential(nn.Conv2d(3, 128, 3, 2, 1), nn.ReLU(), block(128, 256, 1), block(256, 160, 2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(160, 10))  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_torchs_layers(layout):
    model, x = settled(torchs_cnn()), torch.randn(2, 3, 32, 32).to(memory_format=layout)
    want = model(x)
    report = mlcore.quantize(model, INT8, measure_rows=64)
    assert [r.name for r in report.quantized] == ["2.3", "3.3", "6"] and sqnr(model(x), want) > 30
    assert [type(m).__name__ for m in model[2]] == ["Conv2d", "BatchNorm2d", "ReLU", "QuantConv2d", "Identity", "Identity"]
    assert model[2][3].activation == "silu" and all(r.seconds_before > 0 and r.seconds_after > 0 for r in report.quantized)
    mlcore.quantize(model, ALL)
    assert [type(m).__name__ for m in model[2]] == [
        "QuantConv2d",
        "Identity",
        "Identity",
        "QuantConv2d",
        "Identity",
        "Identity",
    ]
    assert sqnr(model(x), want) > 30


def test_training_norms_and_hooks_stay():
    model = torchs_cnn().train()
    mlcore.quantize(model, INT8)
    assert [type(m).__name__ for m in model[2][3:]] == ["QuantConv2d", "BatchNorm2d", "SiLU"]
    model = settled(torchs_cnn())
    seen = []
    model[2][5].register_forward_hook(lambda *args: seen.append(1))
    model[3][4].register_forward_hook(lambda *args: seen.append(2))
    mlcore.quantize(model, INT8)
    model(torch.randn(1, 3, 16, 16))
    assert seen == [1, 2] and model[2][3].activation is None and type(model[3][4]) is nn.BatchNorm2d


class Reused(nn.Module):
    """Children whose calls follow no order that can be seen."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(128, 128, 1), nn.Conv2d(128, 128, 1), nn.BatchNorm2d(128)
        self.twin = nn.Sequential(self.b, nn.ReLU())

    def forward(self, x):
        return self.twin(self.norm(self.a(x))) + self.norm(x)


def test_unknown_orders_are_left_alone():
    model, x = settled(nn.Sequential(Reused())), torch.randn(1, 128, 5, 5)
    want = model(x)
    report = mlcore.quantize(model, INT8)
    assert {r.name: r.skipped for r in report.layers} == {"0.a": None, "0.b": "its weight is also 0.twin.0's"}
    assert type(model[0].norm) is nn.BatchNorm2d and sqnr(model(x), want) > 30


def test_reasons():
    def why(config, conv):
        return mlcore.quantize(nn.Sequential(conv), config).layers[0].skipped

    wide = {"in_channels": 128, "out_channels": 128, "kernel_size": 1}
    assert why(INT8, nn.Conv2d(**wide)) is None
    assert why(QuantConfig("int8", convolutions=False), nn.Conv2d(**wide)) == "a convolution, and config.convolutions is False"
    assert "with inputs as they are" in why(QuantConfig("int4"), nn.Conv2d(**wide))
    assert why(QuantConfig("int4", convolutions=True), nn.Conv2d(**wide)) is None
    assert why(QuantConfig("int4", dynamic_int8=True), nn.Conv2d(**wide)) is None
    assert "a 1 x 1 convolution of 2 groups" in why(ALL, nn.Conv2d(**wide, groups=2))
    assert "4 to 128 channels: below 96" in why(INT8, nn.Conv2d(4, 128, 1))
    assert why(ALL, nn.Conv2d(4, 128, 1)) is None

    class Other(nn.Conv2d):
        pass

    assert why(ALL, Other(4, 4, 1)) == "Other is a subclass of Conv2d and may compute something else"
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module around the layers; got Conv2d"):
        mlcore.quantize(nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_with_data(method):
    torch.manual_seed(0)
    model, x = settled(torchs_cnn()), torch.randn(8, 3, 32, 32)
    twin, want = copy.deepcopy(model), model(x)
    for m in (model, twin):  # channels of very different sizes, which these methods are for
        m[2][1].weight.data[:5] *= 20
    want = model(x)
    config = QuantConfig("int3", 64, symmetric=False, method=method, convolutions=True)
    mlcore.quantize(model, config, batches=[x])
    mlcore.quantize(twin, QuantConfig("int3", 64, symmetric=False, convolutions=True))
    assert sqnr(model(x), want) > sqnr(twin(x), want) + (method == "gptq")
    assert (model[2][3].input_scale is not None) == (method == "awq") and model[2][0].input_scale is None


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_trained_is_what_is_served(format, learned):
    torch.manual_seed(0)
    features = [
        ConvNorm2d(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        DepthwiseSeparableConv2d(16, 24, stride=2, activation=nn.ReLU6),
        PointwiseConv2d(24, 32),
        nn.Sequential(nn.Conv2d(32, 8, 1, padding=1), nn.BatchNorm2d(8), nn.GELU()),
    ]
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(8 * 36, 4))
    config = QuantConfig(format, 16, dynamic_int8=True, convolutions=True)
    report = mlcore.prepare_qat(model, config, learn_scales=learned)
    assert len(report.quantized) == 5 and len([m for m in model.modules() if isinstance(m, FakeQuantConv2d)]) == 4
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    losses = []
    for _ in range(12):
        losses.append(F.cross_entropy(model(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model.eval()(x)
        report = mlcore.convert(model)
        assert len(report.quantized) == 5 and not any(isinstance(m, FakeQuantConv2d) for m in model.modules())
        assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 1  # the first convolution's, which isn't prepared
        torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2)  # a rounding may fall to the other side


def test_digits():
    """A separable network that has learned scikit-learn's digits answers in int8 what it answered before."""
    pytest.importorskip("sklearn")
    sys.path.append(str(Path(__file__).parents[2] / "examples" / "cnn"))
    import digits

    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits.digits()
    block = [DepthwiseSeparableConv2d(16, 128), DepthwiseSeparableConv2d(128, 128, stride=2), PointwiseConv2d(128, 128)]
    stem = ConvNorm2d(nn.Conv2d(x.shape[1], 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(stem, *block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(100):
        some = torch.arange(step * 64, step * 64 + 64) % len(x)
        loss = F.cross_entropy(model(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        before = model.eval()(x_test)
        for config in (INT8, ALL):
            report = mlcore.quantize(copied := copy.deepcopy(model), config)
            after = copied(x_test)
            assert (before.argmax(1) == after.argmax(1)).float().mean() >= 0.99
            assert sqnr(after, before) > 25 and min(r.sqnr_db for r in report.quantized) > 35
            assert sum(isinstance(m, QuantLinear | QuantConv2d) for m in copied.modules()) == (3 if config is INT8 else 6)
    assert (before.argmax(1) == y_test).float().mean() > 0.9
