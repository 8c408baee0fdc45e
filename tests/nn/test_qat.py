"""prepare_qat and convert: the training graph computes what the packed model will, gradients go straight through, and nothing
else about the model changes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore import QuantConfig
from mlcore.nn import FakeQuantEmbedding, FakeQuantLinear, QuantEmbedding, QuantLinear

CONFIGS = [
    QuantConfig("int8", None),
    QuantConfig("int8", 16, dynamic_int8=False, method="mse"),
    QuantConfig("int4", 16),
    QuantConfig("int4", 9, symmetric=False, dynamic_int8=True),
    QuantConfig("int3", None, symmetric=False, method="hqq"),
    QuantConfig("int2", 7, method="percentile"),
    QuantConfig("ternary", None, dynamic_int8=True),
    QuantConfig("nf4", 16),
    QuantConfig("nf4", 16, dynamic_int8=True),
    QuantConfig("codebook", None, entries=5),
]


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = torch.nn.Embedding(40, 24), torch.nn.Linear(24, 48), torch.nn.Linear(48, 5)

    def forward(self, numbers):
        return self.out(F.relu(self.hidden(self.embed(numbers).mean(1))))


def train(model, steps=20, lr=1e-2):
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        numbers = torch.randint(0, 40, (64, 9), generator=g)
        loss = F.cross_entropy(model(numbers), (numbers % 5).mode(1).values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.group_size}-{c.method}-{c.integer_inputs}")
def test_trained_is_what_is_served(config, learned):
    """After training, the packed model's predictions are those of the training graph, layer by layer to rounding errors."""
    if learned and not config.format.startswith("int"):
        with pytest.raises(ValueError, match="learn_scales belongs to int formats"):
            mlcore.prepare_qat(Classifier(), config, learn_scales=True)
        return
    torch.manual_seed(0)
    model, numbers = Classifier(), torch.randint(0, 40, (128, 9))
    report = mlcore.prepare_qat(model, QuantConfig(**vars(config) | {"embeddings": True}), learn_scales=learned)
    assert [r.name for r in report.quantized] == ["embed", "hidden", "out"] and report.quantized[1].sqnr_db > 0
    train(model, 5)
    with torch.no_grad():
        x = torch.randn(32, 24)
        hidden, want = model.hidden(x), model(numbers)
        embedded = model.embed(numbers)
        done = mlcore.convert(model, measure_rows=4)
        assert isinstance(model.hidden, QuantLinear) and isinstance(model.embed, QuantEmbedding)
        assert torch.equal(model.embed(numbers), embedded)
        torch.testing.assert_close(model.hidden(x), hidden, rtol=1e-4, atol=1e-5)
        got = model(numbers)
    # integer inputs behind a layer may fall on the other side of a rounding: one step of 1/127
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-2 if config.integer_inputs else 1e-4)
    sure = want.topk(2).values.diff().abs().squeeze(1) > 0.05
    assert torch.equal(got.argmax(1)[sure], want.argmax(1)[sure]) and sure.float().mean() > 0.2
    assert [r.name for r in done.quantized] == ["embed", "hidden", "out"]
    assert done.quantized[1].bytes_after < done.quantized[1].bytes_before  # 5 rows take a panel of 16
    assert all(r.seconds_before > 0 and r.seconds_after > 0 for r in done.quantized)


def test_forward_is_the_packed_layers_and_gradients_go_straight_through():
    stock = torch.nn.Linear(30, 8)
    model, x = torch.nn.Sequential(copy.deepcopy(stock)), torch.randn(6, 30, requires_grad=True)
    mlcore.prepare_qat(model, QuantConfig("int4", 10))
    assert isinstance(model[0], FakeQuantLinear)
    left = QuantLinear.from_linear(stock, "int4", group_size=10).packed.dequantize()
    y, dy = model(x), torch.randn(6, 8)
    assert torch.equal(y, F.linear(x, left, stock.bias))
    y.backward(dy)
    torch.testing.assert_close(model[0].weight.grad, dy.T @ x.detach())
    torch.testing.assert_close(x.grad, dy @ left)
    torch.testing.assert_close(model[0].bias.grad, dy.sum(0))


def test_learned_scales_have_lsqs_gradients():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(20, 3, bias=False)), torch.randn(6, 20)
    mlcore.prepare_qat(model, QuantConfig("int3", 8, method="percentile", percentile=80), learn_scales=True)
    layer, dy = model[0], torch.randn(6, 3)
    model(x).backward(dy)
    dw, s = dy.T @ x, layer.scales.detach().repeat_interleave(8, 1)[:, :20]
    v = layer.weight.detach() / s
    whole = v.round().clamp(-4, 3)
    inside = v.round() == whole
    assert 0 < inside.sum() < 60
    torch.testing.assert_close(layer.weight.grad, dw * inside)
    terms = F.pad(dw * torch.where(inside, whole - v, whole), (0, 4)).view(3, 3, 8).sum(2)
    torch.testing.assert_close(layer.scales.grad, terms * (8 * 3) ** -0.5)


def test_nothing_else_changes():
    model = Classifier()
    before, weight = {k: v.clone() for k, v in model.state_dict().items()}, model.hidden.weight
    calls = []
    model.hidden.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = mlcore.prepare_qat(model, filter=lambda module, name: name != "out")
    assert model.hidden.weight is weight and model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {r.name: r.skipped for r in report.skipped} == {
        "embed": "an embedding, and config.embeddings is False",
        "out": "the filter said no",
    }
    model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert calls and not torch.equal(model.hidden.weight, before["hidden.weight"])
    Classifier().load_state_dict(model.state_dict())
    assert "FakeQuantLinear is a subclass" in str(mlcore.prepare_qat(model))  # a second time changes nothing


def test_learned_scales_travel_in_the_state_dict():
    model, other = Classifier(), Classifier()
    for m in (model, other):
        mlcore.prepare_qat(m, QuantConfig("int4", 8, symmetric=False), learn_scales=True)
    train(model, 3)
    other.load_state_dict(model.state_dict())
    numbers = torch.randint(0, 40, (4, 9))
    assert torch.equal(other(numbers), model(numbers)) and "hidden.scales" in model.state_dict()


@pytest.mark.parametrize("learned", [False, True])
def test_training_regains_what_rounding_loses(learned):
    """Two bits: rounding after training loses most of it, training with rounding keeps most of it."""
    torch.manual_seed(0)
    model = Classifier()
    train(model, 150)
    g = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 40, (512, 9), generator=g)
    labels = (numbers % 5).mode(1).values

    def loss(m):
        with torch.no_grad():
            return F.cross_entropy(m(numbers), labels).item()

    rounded, config = copy.deepcopy(model), QuantConfig("int2", 12)
    mlcore.quantize(rounded, config)
    mlcore.prepare_qat(model, config, learn_scales=learned)
    train(model, 100, 5e-3)
    mlcore.convert(model)
    assert loss(model) < loss(rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    x = torch.randn(5, 24)
    for model in (torch.nn.Sequential(torch.nn.Linear(24, 9)).to(dtype), torch.nn.Sequential(torch.nn.Linear(24, 9))):
        cast = torch.autocast("cpu", dtype, enabled=model[0].weight.dtype == torch.float32)
        mlcore.prepare_qat(model, QuantConfig("int4", 8))
        with cast:
            y = model(x.to(model[0].weight.dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert model[0].weight.grad.dtype == model[0].weight.dtype
        mlcore.convert(model)
        with cast, torch.no_grad():
            torch.testing.assert_close(model(x.to(model[0].bias.dtype)), y.detach(), rtol=1e-2, atol=1e-2)


def test_sparse_embedding_gradients():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True, padding_idx=0))
    mlcore.prepare_qat(model, QuantConfig("int8", embeddings=True))
    assert isinstance(model[0], FakeQuantEmbedding)
    model(torch.tensor([0, 3, 3])).sum().backward()
    grad = model[0].weight.grad.to_dense()
    assert grad[3].tolist() == [2.0] * 4 and grad[0].tolist() == [0.0] * 4


def test_bad_input():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="prepare_qat: method must be one without data, the weights change; got 'gptq'"):
        mlcore.prepare_qat(model, QuantConfig(method="gptq"))
    with pytest.raises(ValueError, match="method must be one of"):
        mlcore.prepare_qat(model, QuantConfig(method="x"))
    with pytest.raises(ValueError, match="prepare_qat: model must be a"):
        mlcore.prepare_qat(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="convert: model must hold layers that prepare_qat prepared"):
        mlcore.convert(model)
    mlcore.prepare_qat(model)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="convert: the weight of 0 must be finite"):
        mlcore.convert(model)
    assert isinstance(model[0], FakeQuantLinear)
