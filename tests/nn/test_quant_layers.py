"""mlcore.nn.QuantLinear and QuantEmbedding against torch.nn with the dequantized weight, and mlcore.quantize."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore import QuantConfig
from mlcore.nn import QuantEmbedding, QuantLinear
from mlcore.quant import pack


@pytest.mark.parametrize("format", ["int8", "int4", "int3", "nf4", "ternary"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(format, bias):
    stock = torch.nn.Linear(70, 30, bias)
    layer = QuantLinear.from_linear(stock, format, group_size=32, activation="gelu")
    x, residual = torch.randn(2, 5, 70), torch.randn(2, 5, 30)
    want = F.gelu(F.linear(x, layer.packed.dequantize(), stock.bias)) + residual
    torch.testing.assert_close(layer(x, residual), want, rtol=1e-4, atol=1e-5)
    assert layer.bias is stock.bias and (layer.in_features, layer.out_features) == (70, 30)


def test_initialization_is_torchs():
    torch.manual_seed(3)
    layer = QuantLinear(8, 5, format="int8", dynamic_int8=True)
    torch.manual_seed(3)
    stock = torch.nn.Linear(8, 5)
    torch.testing.assert_close(layer.packed.dequantize(), stock.weight.detach(), rtol=0, atol=2e-3)
    assert torch.equal(layer.bias, stock.bias)
    assert "int, bits=8" in repr(layer) and "dynamic_int8" in repr(layer)


def test_trains_bias_and_input():
    layer, x = QuantLinear(8, 5, format="int4", group_size=4), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((5,), 3.0))
    torch.testing.assert_close(x.grad, layer.packed.dequantize().sum(0).expand(3, -1))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_conversion_leaves_the_weight(dtype):
    layer = QuantLinear(8, 5, format="nf4", group_size=4)
    before = layer.packed.dequantize()
    layer.to(dtype)
    assert torch.equal(layer.packed.dequantize(), before)
    assert layer.bias.dtype == dtype and layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_state_dict_carries_the_format(tmp_path):
    source = torch.nn.Sequential(QuantLinear(40, 30, format="int3", group_size=9, symmetric=False))
    target = torch.nn.Sequential(QuantLinear(40, 30, format="int8"))
    torch.save(source.state_dict(), tmp_path / "w")
    target.load_state_dict(torch.load(tmp_path / "w", weights_only=True))
    x = torch.randn(3, 40)
    assert torch.equal(target(x), source(x)) and target[0].packed.numbers() == source[0].packed.numbers()
    assert target[0].codes is not source[0].codes
    twin = copy.deepcopy(source)
    assert torch.equal(twin(x), source(x)) and twin[0].packed.codes is twin[0].codes


def test_state_dict_refuses_contradictions():
    layer = QuantLinear(40, 30, format="int4", group_size=8)
    good = layer.state_dict()
    for key, value, message in [
        ("codes", good["codes"][:1], "codes must be"),
        ("form", torch.tensor([30, 40, 4, 8, 8, 7, 0]), "form must be"),
        ("form", torch.tensor([30, 40]), "form must be"),
        ("scales", good["scales"] * math.nan, "scales must be finite"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            QuantLinear(40, 30, format="int4", group_size=8).load_state_dict({**good, key: value})
    with pytest.raises(RuntimeError, match=r"the weight is \(30, 40\), the layer's \(30, 41\)"):
        QuantLinear(41, 30).load_state_dict(good)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": good["bias"]})


def test_safetensors_state_dict(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, other = QuantLinear(40, 30), QuantLinear(40, 30)
    safetensors.save_file(layer.state_dict(), tmp_path / "w")
    other.load_state_dict(safetensors.load_file(tmp_path / "w"))
    assert torch.equal(other.packed.dequantize(), layer.packed.dequantize())


def test_compiles():
    layer, x = QuantLinear(40, 30, group_size=8), torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "int3"])
def test_embedding(format):
    stock = torch.nn.Embedding(50, 20)
    layer = QuantEmbedding.from_embedding(stock, format, group_size=8)
    numbers = torch.randint(0, 50, (3, 7))
    assert torch.equal(layer(numbers), layer.packed.dequantize()[numbers])
    assert layer(numbers[:0]).shape == (0, 7, 20)
    assert layer.to(torch.bfloat16)(numbers.int()).dtype == torch.bfloat16
    with pytest.raises(IndexError, match="input must be 0 to 49; got 0 to 50"):
        layer(torch.tensor([0, 50]))
    with pytest.raises(ValueError, match="input must be int32 or int64"):
        layer(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="max_norm"):
        QuantEmbedding.from_embedding(torch.nn.Embedding(5, 2, max_norm=1.0))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(30, 16)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.scaled = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16))
        self.bad = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, numbers):
        h = self.body(self.embed(numbers))
        return self.head(self.scaled(h + self.attention(h, h, h)[0]))


def test_quantize():
    model = Tied().eval()
    model.bad.weight.data[0, 0] = math.nan
    numbers = torch.randint(0, 30, (2, 9))
    before = model(numbers)
    report = mlcore.quantize(model, QuantConfig("int8", group_size=None, embeddings=True), measure_rows=4)
    assert [r.name for r in report.quantized] == ["body.0", "body.2"]
    assert all(isinstance(m, QuantLinear) and m.dynamic_int8 for m in (model.body[0], model.body[2]))
    for r in report.quantized:
        assert r.bytes_after < r.bytes_before and r.sqnr_db > 40 and r.seconds_before > 0 and r.seconds_after > 0
    why = {r.name: r.skipped for r in report.skipped}
    assert why == {
        "embed": "its weight is also head's",
        "head": "its weight is also embed's",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass of Linear and may compute something else",
        "scaled": "ParametrizedLinear is a subclass of Linear and may compute something else",
        "bad": "its weight has NaN or infinity",
    }
    assert F.cosine_similarity(model(numbers).flatten(), before.flatten(), dim=0) > 0.999
    text = str(report)
    assert text.startswith("quantized 2 layers, left 5: ") and "body.0: 4096 -> " in text and " ms" in text


def test_quantize_filter_and_embeddings():
    model = torch.nn.Sequential(torch.nn.Embedding(30, 64), torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
    report = mlcore.quantize(model, QuantConfig(embeddings=True), lambda module, name: name != "2")
    assert [r.name for r in report.quantized] == ["0", "1"] and isinstance(model[0], QuantEmbedding)
    assert report.skipped[0].skipped == "the filter said no" and not model[1].dynamic_int8
    assert model(torch.arange(5)).shape == (5, 8)
    assert [r.name for r in mlcore.quantize(model).quantized] == ["2"]


def test_torchs_encoder_layer_keeps_its_linears():
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)).eval()
    report = mlcore.quantize(model)
    assert not report.quantized and "reads its weight" in str(report)
    with torch.no_grad():
        assert model(torch.randn(2, 5, 16)).shape == (2, 5, 16)


@pytest.mark.parametrize("bad", [torch.nn.Linear(3, 3), torch.ones(2), None])
def test_quantize_needs_a_model_around_layers(bad):
    with pytest.raises(ValueError, match=r"quantize: model must be a torch\.nn\.Module around the layers"):
        mlcore.quantize(bad)


def test_a_bad_config_changes_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="group_size must be at least 1; got 0"):
        mlcore.quantize(model, QuantConfig(group_size=0))
    assert type(model[0]) is torch.nn.Linear


def test_pack_of_a_layer_is_pack_of_its_weight():
    stock = torch.nn.Linear(16, 8)
    assert torch.equal(
        QuantLinear.from_linear(stock, "int4", group_size=5).codes, pack(stock.weight, "int4", group_size=5).codes
    )
    with pytest.raises(ValueError, match=r"QuantLinear: bias must be \(8,\); got \(7,\)"):
        QuantLinear.from_packed(pack(stock.weight), torch.zeros(7))


class Correlated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out, self.unused = torch.nn.Linear(16, 96), torch.nn.Linear(96, 32), torch.nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return self.out(self.mix(x) * scale)


def test_gptq_sees_the_inputs():
    """The outputs for inputs of 16 dimensions: GPTQ loses less than half of what rounding loses."""
    model, x = Correlated(), torch.randn(256, 16)
    want, errors = model(x), {}
    for method in ("minmax", "mse", "gptq"):
        twin = copy.deepcopy(model)
        config = QuantConfig("int4", 32, method=method)
        batches = [x[:128], (x[128:],), {"x": x[:1], "scale": 0.5}] if method == "gptq" else None
        report = mlcore.quantize(twin, config, lambda module, name: name != "mix", batches=batches)
        assert twin.training and not twin.out._forward_pre_hooks
        errors[method] = (twin(x) - want).square().mean().item()
        left = {r.name: r.skipped for r in report.skipped}
        assert left.get("unused") == ("no batch reached it" if method == "gptq" else None)
    assert errors["gptq"] < 0.5 * errors["minmax"]
    assert errors["mse"] < 1.1 * errors["minmax"]


def test_batches_and_gptq_belong_together():
    for config, batches in ((QuantConfig(method="gptq"), None), (QuantConfig(), [torch.ones(1, 16)])):
        with pytest.raises(ValueError, match="quantize: batches and method 'gptq' or 'awq' belong together"):
            mlcore.quantize(Correlated(), config, batches=batches)
    with pytest.raises(ValueError, match="method must be one of minmax, percentile, mse, hqq, gptq, awq; got 'round'"):
        mlcore.quantize(Correlated(), QuantConfig(method="round"))
