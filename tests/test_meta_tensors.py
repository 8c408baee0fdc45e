"""Tensors without data (device "meta"): every op and layer gives what a real call would give, in shape and dtype."""

import pytest
import torch

import mlcore
from mlcore import nn, ops
from mlcore.patterns import Causal, GlobalTokens, Window
from mlcore.quant import pack

TOKENS = ((1, 2, 8, 16),) * 3
CALLS = {
    "attention": (lambda q, k, v: ops.attention(q, k, v, causal=True, return_lse=True), TOKENS),
    "attention, pattern": (lambda *t: ops.attention(*t, pattern=Causal() & (Window(3, 0) | GlobalTokens(2))), TOKENS),
    "attention, dropout": (lambda *t: ops.attention(*t, dropout_p=0.5), TOKENS),
    "scaled_dot_product_attention": (lambda *t: ops.scaled_dot_product_attention(*t, is_causal=True), TOKENS),
    "linear_attention": (ops.linear_attention, TOKENS),
    "aft": (ops.aft, TOKENS),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, residual=x), ((3, 8), (8,))),
    "layer_norm": (ops.layer_norm, ((3, 8), (8,), (8,))),
    "depthwise_conv1d": (lambda *t: ops.depthwise_conv1d(*t, padding=1), ((2, 4, 9), (4, 1, 3))),
    "depthwise_conv2d": (lambda *t: ops.depthwise_conv2d(*t, padding="same"), ((2, 4, 9, 9), (8, 1, 3, 3))),
    "depthwise_conv3d": (lambda *t: ops.depthwise_conv3d(*t, stride=2), ((2, 4, 9, 9, 9), (4, 1, 3, 3, 3))),
    "separable_conv2d": (ops.separable_conv2d, ((2, 4, 9, 9), (4, 1, 3, 3), (5, 4, 1, 1))),
    "causal_conv1d": (lambda *t: ops.causal_conv1d(*t, activation="silu"), ((2, 4, 9), (4, 3))),
}
LAYERS = {
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), ((2, 5, 16),) * 3),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(16, 2, batch_first=True), ((2, 5, 16),)),
    "DepthwiseSeparableConv2d": (lambda: nn.DepthwiseSeparableConv2d(4, 5, 3), ((2, 4, 9, 9),)),
    "CausalConv1d": (lambda: nn.CausalConv1d(4, 4, 3), ((2, 4, 9),)),
    "MobileNetV2": (lambda: mlcore.models.cnn.MobileNetV2(), ((2, 3, 64, 64),)),
}


def described(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [None if t is None else (t.shape, t.dtype) for t in outputs]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_op(name, grad):
    call, shapes = CALLS[name]
    real = [torch.randn(s, requires_grad=grad) for s in shapes]
    got = call(*(t.detach().to("meta").requires_grad_(grad) for t in real))
    assert described(got) == described(call(*real))
    assert all(t.device.type == "meta" for t in (got if isinstance(got, tuple) else (got,)))


def test_quant_linear():
    packed = pack(torch.randn(4, 8), "int4", group_size=8)
    assert described(ops.quant_linear(torch.randn(3, 8, device="meta"), packed.to("meta"))) == [((3, 4), torch.float32)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_built_and_called_on_meta(name, train):
    make, shapes = LAYERS[name]
    inputs = [torch.randn(s) for s in shapes]
    with torch.device("meta"):
        layer = make().train(train)
        got = layer(*(torch.randn(s) for s in shapes))
    assert described(got) == described(layer.to_empty(device="cpu")(*inputs))
