"""A fused quantized BERT computes what its parts do, and says what it leaves."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="BERT comes from transformers: pip install 'mlcore[hf]'")

import mlcore  # noqa: E402
import mlcore.integrations.transformers  # noqa: E402
from mlcore import QuantConfig  # noqa: E402
from mlcore.integrations.transformers_bert import fuse  # noqa: E402
from mlcore.quant import concatenate, pack  # noqa: E402

mlcore.integrations.transformers.register()
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}


def make(**how):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32, attn_implementation="mlcore", **how)
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize(
    "config",
    [QuantConfig("int8", None), QuantConfig("int4", 32, symmetric=False), QuantConfig("nf4", 16), QuantConfig("ternary", None)],
    ids=lambda c: c.format,
)
def test_fused_is_what_it_was(config):
    model = make()
    mlcore.quantize(model, config)
    ids, mask = torch.randint(0, 60, (3, 11)), torch.ones(3, 11)
    mask[1, 7:] = 0
    keys = model.state_dict().keys()
    with torch.no_grad():
        want = model(ids, mask, output_hidden_states=True, output_attentions=True)
        report = fuse(model)
        got = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert len(report.swapped) == 8 and not report.left and model.state_dict().keys() == keys
    for a, b in zip((*got.hidden_states, *got.attentions), (*want.hidden_states, *want.attentions)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-2 if config.format == "int8" else 1e-4)
    assert not fuse(model).swapped


def test_another_weight_is_seen():
    model, other = make(), make()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for m in (model, other):
        mlcore.quantize(m, QuantConfig("int4", 16))
    fuse(model)
    ids = torch.randint(0, 60, (2, 5))
    with torch.no_grad():
        model(ids)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(ids)[0], other(ids)[0], rtol=1e-3, atol=1e-4)


def test_training_is_the_parts_with_dropout():
    model = make()
    mlcore.quantize(model, QuantConfig("int4", 16))
    ids = torch.randint(0, 60, (2, 5))
    torch.manual_seed(1)
    want = model.train()(ids)[0]
    fuse(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(ids)[0], want)
    want.sum().backward()


def test_what_is_left():
    model = make(hidden_act="relu")
    mlcore.quantize(model, QuantConfig("int4", 16), lambda m, name: "layer.1.attention.self.key" not in name)
    model.encoder.layer[0].output = type(model.encoder.layer[0].output)(model.config)
    left = fuse(model).left
    assert left == {
        "encoder.layer.0.intermediate": "its activation is ReLU, not GELU",
        "encoder.layer.1.intermediate": "its activation is ReLU, not GELU",
        "encoder.layer.0.output": "its linear layers are not all QuantLinear",
        "encoder.layer.1.attention.self": "its linear layers are not all QuantLinear",
    }
    calibrated = make()
    mlcore.quantize(calibrated, QuantConfig("int4", 16, method="awq"), batches=[{"input_ids": torch.randint(0, 60, (4, 9))}])
    ids = torch.randint(0, 60, (2, 5))
    with torch.no_grad():
        want = calibrated(ids)[0]
        assert "each of q, k and v in its own way" in str(fuse(calibrated))
        torch.testing.assert_close(calibrated(ids)[0], want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"fuse: model must be a torch\.nn\.Module"):
        fuse("bert")


@pytest.mark.parametrize("format", ["int8", "int3", "nf4", "ternary"])
def test_concatenate(format):
    weights = [torch.randn(n, 21) for n in (5, 16, 1)]
    packed = [pack(w, format, group_size=8, **({"symmetric": False} if format == "int3" else {})) for w in weights]
    assert torch.equal(concatenate(packed).dequantize(), torch.cat([p.dequantize() for p in packed]))


def test_concatenate_refuses():
    w = torch.randn(4, 8)
    for parts, message in (
        ([], "at least one weight"),
        ([pack(w, "int4"), pack(w, "int3")], "one bits; got 4 and 3"),
        ([pack(w, "int4"), pack(w[:, :7], "int4", group_size=8)], "one group_size|one K"),
        ([pack(w, "int4"), pack(w, "int4", symmetric=False)], "zero points in all or none"),
        ([pack(w, "codebook", entries=4), pack(w + 1, "codebook", entries=4)], "one codebook"),
    ):
        with pytest.raises(ValueError, match=message):
            concatenate(parts)
