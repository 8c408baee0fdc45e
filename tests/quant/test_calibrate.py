"""The calibrations against plain rounding, on weights and inputs with outliers; and that what they give is exact."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore import QuantConfig
from mlcore.nn import QuantLinear
from mlcore.quant import pack, pack_awq, pack_gptq, pack_hqq, pack_mse, pack_percentile

N, K = 48, 200


@pytest.fixture(scope="module")
def data():
    """weight with heavy tails (Student's t of 4 degrees), x, and x with channels 20 times as large as the rest."""
    g = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(N, K, generator=g) / (torch.randn(4, N, K, generator=g).square().mean(0)).sqrt()
    x = torch.randn(256, K, generator=g)
    return weight, x, torch.where(torch.arange(K) % 37 == 0, 20 * x, x)


def output_error(packed, input_scale, weight, x):
    kept = packed.dequantize() if input_scale is None else packed.dequantize() * input_scale
    return (((kept - weight) @ x.T).square().mean()).item()


METHODS = {
    "percentile": lambda w, h, **how: (pack_percentile(w, **how), None),
    "mse": lambda w, h, **how: (pack_mse(w, **how), None),
    "hqq": lambda w, h, **how: (pack_hqq(w, **how), None),
    "gptq": lambda w, h, **how: (pack_gptq(w, h, **how), None),
    "awq": lambda w, h, **how: pack_awq(w, h, **how),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 37])
@pytest.mark.parametrize("format", ["int3", "int4"])
@pytest.mark.parametrize("method", METHODS)
def test_loses_no_more_than_rounding(data, method, format, group_size, symmetric):
    weight, x = data[0], data[2 if method in ("gptq", "awq") else 1]
    how = {"format": format, "group_size": group_size, "symmetric": symmetric}
    plain = output_error(pack(weight, **how), None, weight, x)
    lost = output_error(*METHODS[method](weight, x.T @ x, **how), weight, x)
    assert lost <= plain * (0.8 if method == "awq" else 1)


@pytest.mark.parametrize("method", METHODS)
def test_edges(method):
    for shape in ((0, 5), (5, 0), (3, 1), (1, 7)):
        weight = torch.randn(shape)
        packed, scale = METHODS[method](weight, torch.eye(shape[1]), group_size=4)
        assert packed.shape == shape and (scale is None or scale.shape == (shape[1],))
    zeros = torch.zeros(4, 9)
    for symmetric in (True, False):
        packed, _ = METHODS[method](zeros, torch.zeros(9, 9), group_size=4, symmetric=symmetric)
        assert torch.equal(packed.dequantize(), zeros)
    for bad, message in (
        ({"format": "nf4"}, "format"),
        ({"group_size": 0}, "group_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            METHODS[method](torch.ones(2, 3), torch.eye(3), **bad)
    with pytest.raises(ValueError, match=f"pack_{method}: weight must be floating and finite"):
        METHODS[method](torch.full((2, 3), torch.nan), torch.eye(3))


def test_percentile():
    weight = torch.arange(1.0, 101)[None] * torch.tensor([1.0, -1]).repeat(50)
    packed = pack_percentile(weight, "int8", percentile=90)
    assert packed.dequantize().abs().max() == pytest.approx(90.1 * 128 / 127, rel=1e-3)  # there is one more code below zero
    assert torch.equal(pack_percentile(weight, "int4", percentile=100).codes, pack(weight, "int4").codes)
    for bad in (50, 101, -1):
        with pytest.raises(ValueError, match="percentile must be above 50, at most 100"):
            pack_percentile(weight, percentile=bad)


def test_awq_scales_are_powers_of_two_and_refuse_another_shape(data):
    weight, _, x = data
    _, scale = pack_awq(weight, x.T @ x, group_size=32)
    assert torch.equal(scale.log2(), scale.log2().round()) and scale.unique().numel() > 1
    with pytest.raises(ValueError, match=r"pack_awq: hessian must be finite, \(200, 200\)"):
        pack_awq(weight, torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_scale_is_exact(data, dtype, tmp_path):
    """The layer with an input scale gives to the bit what it gives for x that was scaled before, through a state_dict too."""
    weight, _, x = data
    packed, scale = pack_awq(weight, x.T @ x, group_size=32)
    layer = QuantLinear.from_packed(packed, torch.randn(N), input_scale=scale).to(dtype)
    assert layer.input_scale.dtype == torch.float32
    bare = QuantLinear.from_packed(packed, layer.bias)
    x = x.to(dtype)
    scaled = (x.double() * scale.double()).to(dtype)
    assert torch.equal(scaled.double(), x.double() * scale.double())
    assert torch.equal(layer(x), bare(scaled))
    want = F.linear(x.double(), packed.dequantize(torch.float64) * scale, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    torch.save(layer.state_dict(), tmp_path / "w")
    other = QuantLinear(K, N).to(dtype)
    other.load_state_dict(torch.load(tmp_path / "w", weights_only=True))
    assert torch.equal(other(x), layer(x)) and "input_scale" in repr(other)
    other.load_state_dict(bare.state_dict())
    assert other.input_scale is None and torch.equal(other(x), bare(x))


@pytest.mark.parametrize("scale", [torch.ones(K - 1), torch.ones(K).double(), torch.full((K,), torch.inf)])
def test_bad_input_scale(data, scale):
    packed = pack(data[0])
    with pytest.raises(ValueError, match="input_scale must be finite float32"):
        QuantLinear.from_packed(packed, input_scale=scale)
    layer = QuantLinear.from_packed(packed)
    with pytest.raises(RuntimeError, match="input_scale must be finite float32"):
        layer.load_state_dict(layer.state_dict() | {"input_scale": scale})


@pytest.mark.parametrize("method", ["percentile", "mse", "hqq", "gptq", "awq"])
def test_quantize_by_method(data, method):
    weight, x = data[0], data[2 if method in ("gptq", "awq") else 1]
    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.Embedding(4, 8))
    model[0].weight.data.copy_(weight)
    model.forward = lambda x: model[0](x)
    want = model[0](x)
    errors = {}
    for chosen in ("minmax", method):
        twin = copy.deepcopy(model)
        twin.forward = lambda x, twin=twin: twin[0](x)
        config = QuantConfig("int4", None, method=chosen, embeddings=True)
        report = mlcore.quantize(twin, config, batches=[x[:100], x[100:]] if config.needs_data else None)
        assert [r.name for r in report.quantized] == ["0", "1"] and (twin[0].input_scale is not None) == (chosen == "awq")
        errors[chosen] = (twin[0](x) - want).square().mean().item()
    assert errors[method] < errors["minmax"]


def test_awq_for_integer_inputs(data):
    """With x rounded by rows, magnifying also takes the outliers' channels down: less is lost than without."""
    weight, _, x = data
    want, errors = F.linear(x, weight), {}
    for method in ("minmax", "awq"):
        model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False))
        model[0].weight.data.copy_(weight)
        mlcore.quantize(model, QuantConfig("int8", None, method=method), batches=[x] if method == "awq" else None)
        assert model[0].dynamic_int8
        errors[method] = (model(x) - want).square().mean().item()
    assert errors["awq"] < 0.7 * errors["minmax"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"format": "int9"}, "format must be 'int1' to 'int8', 'ternary', 'binary', 'nf4', 'codebook'; got 'int9'"),
        ({"format": 8}, "got 8"),
        ({"format": "nf4", "method": "hqq"}, "pack_hqq: format must be 'int1' to 'int8'; got 'nf4'"),
        ({"format": "nf4", "symmetric": False}, "belong to int formats; got 'nf4'"),
        ({"group_size": 0}, "group_size must be at least 1; got 0"),
        ({"format": "codebook", "entries": 4, "method": "mse"}, "entries belong to method 'minmax'"),
        ({"method": "median"}, "method must be one of"),
        ({"method": "percentile", "percentile": 10}, "percentile must be above 50"),
        ({"method": "mse", "percentile": 99.0}, "percentile belongs to method 'percentile'"),
    ],
)
def test_config_refuses(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantConfig(**given)


def test_config_defaults():
    assert QuantConfig("int8").group_size is None and QuantConfig("int8").integer_inputs
    assert QuantConfig() == QuantConfig("int4", 32) and QuantConfig("int8", 16).group_size == 16
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert mlcore.quantize(model, "int8").quantized and model[0].dynamic_int8
    with pytest.raises(ValueError, match="config must be a QuantConfig or a format; got int"):
        mlcore.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), 8)
