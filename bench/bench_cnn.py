"""MobileNet V1 and V2 end to end, 224 x 224, float32: inference at batch 1 and 8, and a training step at 96 x 96.

Baselines are the same networks of torch's layers in both layouts; with --compiled also torch.compile with frozen weights, with
onnxruntime and onnx installed also ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import io
import types

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error, settled
from torch import nn

from mlcore.models import cnn
from mlcore.nn import ConvNorm2d, DepthwiseConv2d, DepthwiseSeparableConv2d, PointwiseConv2d

MODELS = {"MobileNetV1": cnn.MobileNetV1, "MobileNetV2": cnn.MobileNetV2}


def stock(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The same network with the same weights, every layer torch's own."""

    def separable(self, x, residual=None):
        h = self.depthwise_activation(self.depthwise_norm(self.depthwise(x)))
        return self._finish(self.pointwise(h), residual)

    def pointwise(self, x, residual=None):
        return self._finish(self.pointwise(x), residual)

    def pooled(self, x):
        return self.blocks(self.stem(x.contiguous(memory_format=layout))).mean((2, 3))

    theirs = type(model)(model.config)
    theirs.load_state_dict(model.state_dict())
    theirs.train(model.training)
    theirs._pooled = types.MethodType(pooled, theirs)
    for m in theirs.modules():
        if isinstance(m, DepthwiseConv2d):
            m.__class__ = nn.Conv2d
        elif isinstance(m, (DepthwiseSeparableConv2d, PointwiseConv2d)):
            m.forward = types.MethodType(separable if isinstance(m, DepthwiseSeparableConv2d) else pointwise, m)
        elif isinstance(m, ConvNorm2d):
            m.forward = types.MethodType(nn.Sequential.forward, m)
    return theirs.to(memory_format=layout)


def frozen(model, x):
    import torch._inductor.config as config

    fast = harness.compiled(model)

    def run():
        with config.patch(freezing=True):
            return fast(x)

    return run


def onnx_session(model, x):
    import onnxruntime

    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, x.numpy()
    return lambda: torch.from_numpy(session.run(None, {name: array})[0])


def inference(kind: str, batch: int, compiled: bool) -> Group:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    x = torch.randn(batch, 3, 224, 224)
    plain, last = stock(model, torch.contiguous_format), stock(model, torch.channels_last)

    def layers():  # a call for each of them, where nn.InferenceChain makes one
        return model.classifier(model._pooled(x))

    rows = {"mlcore": lambda: model(x), "mlcore, layer by layer": layers}
    rows |= {"torch": lambda: plain(x), "torch (channels_last)": lambda: last(x)}
    if compiled:
        rows["torch.compile, frozen"] = frozen(stock(model, torch.channels_last), x)
    if all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx")):
        rows["ONNX Runtime"] = onnx_session(stock(model, torch.contiguous_format), x)
    with torch.no_grad():
        want = stock(model, torch.contiguous_format).double()(x.double())

    def check(row, got):
        error = relative_error(got, want)
        assert error < 1e-4, f"{row}: relative error {error}"
        return error

    flops = batch * multiplications(model)
    return Group({name: torch.no_grad()(call) for name, call in rows.items()}, check, flops=flops, before=settled(rows))


def multiplications(model) -> float:
    """Two times the multiplications of one 224 x 224 image in convolutions."""
    total = 0

    def add(m, args, out):
        nonlocal total
        total += 2 * out.numel() * m.weight[0].numel()

    plain = stock(model, torch.contiguous_format)
    for m in plain.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(add)
    with torch.no_grad():
        plain(torch.zeros(1, 3, 224, 224))
    return total


def training(kind: str) -> Group:
    torch.manual_seed(0)
    model = MODELS[kind](cnn.MobileNetConfig(classes=10, dropout=0.0)).train()
    x, labels = torch.randn(32, 3, 96, 96), torch.arange(32) % 10
    models = {
        "mlcore": model,
        "torch": stock(model, torch.contiguous_format),
        "torch (channels_last)": stock(model, torch.channels_last),
    }

    def step(m):
        def run():
            loss = F.cross_entropy(m(x), labels)
            m.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach()

        return run

    want = F.cross_entropy(stock(model, torch.contiguous_format).double()(x.double()), labels).detach()

    def check(row, got):
        error = relative_error(got, want)
        assert error < 1e-3, f"{row}: relative error {error}"
        return error

    return Group({name: step(m) for name, m in models.items()}, check, flops=32 * 3 * multiplications(model) * (96 / 224) ** 2)


INFERENCE = ["mlcore", "mlcore, layer by layer", "torch", "torch (channels_last)", "torch.compile, frozen", "ONNX Runtime"]


@pytest.mark.parametrize("row", INFERENCE)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_inference(race, pytestconfig, kind, batch, row):
    compiled = pytestconfig.getoption("--compiled")
    if row == "torch.compile, frozen" and not compiled:
        pytest.skip("--compiled measures it")
    if row == "ONNX Runtime" and not all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx")):
        pytest.skip("onnxruntime and onnx are not installed")
    race(f"cnn {kind} inference batch {batch}", row, lambda: inference(kind, batch, compiled))


@pytest.mark.parametrize("row", ["mlcore", "torch", "torch (channels_last)"])
@pytest.mark.parametrize("kind", MODELS)
def test_training(race, kind, row):
    race(f"cnn {kind} training batch 32 at 96 x 96", row, lambda: training(kind))
