"""quantization_config=MlcoreConfig(...) in from_pretrained on tiny random models; the files; what is wrong in them is said."""

from __future__ import annotations

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the quantizer is for transformers: pip install 'mlcore[hf]'")
pytest.importorskip("safetensors")

import mlcore  # noqa: E402
from mlcore import QuantConfig  # noqa: E402
from mlcore.integrations.transformers_quantizer import MlcoreConfig, attach  # noqa: E402
from mlcore.nn import QuantEmbedding, QuantLinear  # noqa: E402

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"num_key_value_heads": 2, "pad_token_id": 0}),
    "bert": (transformers.BertConfig, transformers.BertModel, {"max_position_embeddings": 32}),
}
IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with tiny random models, by kind."""
    torch.manual_seed(0)
    folders = {}
    for kind, (config, cls, more) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        cls(config(**SIZES, **more)).eval().save_pretrained(folders[kind])
    return folders


def load(kind, folder, **how):
    return KINDS[kind][1].from_pretrained(folder, **how).eval()


@torch.no_grad()
def output(model):
    return model(IDS)[0]


@pytest.mark.parametrize(
    "kind, config",
    [
        ("llama", {"bits": 8, "group_size": None}),
        ("bert", {"bits": 4, "group_size": 32}),
        ("llama", {"bits": 3, "group_size": 13, "symmetric": False, "method": "hqq"}),
        ("bert", {"bits": None, "format": "nf4", "method": "minmax", "embeddings": True}),
        ("llama", {"bits": None, "format": "codebook", "entries": 5, "method": "minmax", "dynamic_int8": True}),
        ("bert", {"bits": None, "format": "ternary", "method": "minmax"}),
    ],
    ids=str,
)
def test_quantize_save_load(saved, tmp_path, kind, config):
    stock = load(kind, saved[kind])
    model = load(kind, saved[kind], quantization_config=MlcoreConfig(**config))
    low = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(low) == (14 if kind == "llama" else 13) and {r.name for r in model.quantization_report.quantized} >= set(low)
    twin = copy.deepcopy(stock)
    mlcore.quantize(twin, MlcoreConfig(**config).quant_config(), lambda m, name: name != "lm_head")
    want = output(model)
    assert torch.equal(want, output(twin))
    model.save_pretrained(tmp_path)
    files = {p.name for p in tmp_path.iterdir()}
    assert "model.safetensors" in files and not any(f.endswith((".bin", ".pt", ".pkl")) for f in files)
    again = load(kind, tmp_path)
    assert torch.equal(output(again), want)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.config.quantization_config.layers == model.config.quantization_config.layers
    embeddings = [m for m in again.modules() if isinstance(m, QuantEmbedding)]
    assert bool(embeddings) == bool(config.get("embeddings"))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(output(load(kind, tmp_path / "twice")), want)


def test_low_precision_keeps_scales_wide(saved, tmp_path):
    model = load("llama", saved["llama"], quantization_config=MlcoreConfig(bits=4), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path, dtype=torch.bfloat16)
    layer = again.model.layers[0].mlp.up_proj
    assert layer.scales.dtype == torch.float32 and again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(output(again), output(model)) and output(again).dtype == torch.bfloat16


def test_generates(saved, tmp_path):
    model = load("llama", saved["llama"], quantization_config=MlcoreConfig(bits=8, group_size=None))
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 13) and model.is_quantized


def test_the_config_chooses_layers(saved):
    config = MlcoreConfig(bits=4, modules_to_not_convert=[r".*\.mlp"], embeddings=True)
    model = load("llama", saved["llama"], quantization_config=config)
    low = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert low == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_attach_saves_what_was_calibrated(saved, tmp_path, method):
    model = load("bert", saved["bert"])
    mlcore.quantize(model, QuantConfig("int4", 16, method=method), batches=[{"input_ids": IDS}])
    attach(model)
    model.save_pretrained(tmp_path)
    again = load("bert", tmp_path)
    assert torch.equal(output(again), output(model))
    scales = [m.input_scale for m in again.modules() if isinstance(m, QuantLinear)]
    assert all((s is not None) == (method == "awq") for s in scales)
    with pytest.raises(ValueError, match="attach: model must be a transformers model with low-bit layers; got BertModel"):
        attach(load("bert", saved["bert"]))


def test_convolutions_are_left_and_refused(saved):
    model = load("bert", saved["bert"])
    model.extra = torch.nn.Sequential(torch.nn.Conv2d(128, 128, 1))
    assert MlcoreConfig(bits=8, group_size=None).quant_config().convolutions is False
    mlcore.quantize(model, mlcore.QuantConfig("int8", None))
    with pytest.raises(ValueError, match=r"attach: model must have no low-bit convolutions; got extra\.0"):
        attach(model)


def test_dequantize(saved):
    model = load("llama", saved["llama"], quantization_config=MlcoreConfig(bits=4))
    want = output(model)
    plain = model.dequantize()
    assert not any(isinstance(m, QuantLinear) for m in plain.modules())
    torch.testing.assert_close(output(plain), want, rtol=1e-4, atol=1e-5)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


LAYER = "encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("layers"), "a saved model's layers must be an object"),
        (lambda c: c["layers"].update({"no.such": {}}), "layers names 'no.such', which the model lacks"),
        (lambda c: c["layers"].update({"encoder": {}}), "which is no BertEncoder of mlcore's"),
        (lambda c: c["layers"][LAYER].pop("bits"), "layers describes 'encoder.layer.0.output.dense' by"),
        (lambda c: c["layers"][LAYER].update(group_size=0), "layers describes 'encoder.layer.0.output.dense' wrongly"),
        (lambda c: c["layers"][LAYER].update(bits="4"), "layers describes 'encoder.layer.0.output.dense' wrongly"),
        (lambda c: c["layers"][LAYER].update(format="codebook"), "layers describes .* wrongly: .*contradict"),
        (lambda c: c["layers"][LAYER].update(offset=3), "form is .*, config.json says"),
        (lambda c: c.update(colour="red"), "unexpected keyword argument 'colour'"),
    ],
)
def test_a_wrong_config_is_refused(saved, tmp_path, change, message):
    load("bert", saved["bert"], quantization_config=MlcoreConfig(bits=4)).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises((ValueError, TypeError), match=message):
        load("bert", tmp_path)


def test_wrong_tensors_are_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    load("bert", saved["bert"], quantization_config=MlcoreConfig(bits=4)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good, data = load_file(file), file.read_bytes()
    for bad, message in (
        ({f"{LAYER}.scales": good[f"{LAYER}.scales"] * torch.nan}, "scales must be finite"),
        ({f"{LAYER}.codes": good[f"{LAYER}.codes"][:1].clone()}, "size mismatch|ignore_mismatched_sizes"),
        ({f"{LAYER}.codes": None}, "the file lacks codes of 'encoder"),
    ):
        save_file({k: v for k, v in (good | bad).items() if v is not None}, file, {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=message):
            load("bert", tmp_path)
    for size in (len(data) // 2, 20):
        file.write_bytes(data[:size])
        with pytest.raises(Exception, match=r"(?i)header|incomplete|metadata"):
            load("bert", tmp_path)


def test_bad_config():
    for how, message in (
        ({"bits": 9}, "format must be"),
        ({"bits": 4, "format": "nf4"}, "one of bits and format must be None"),
        ({"bits": None}, "one of bits and format must be None"),
        ({"group_size": -1}, "group_size must be at least 1"),
        ({"method": "gptq"}, "method must be one without data"),
        ({"method": "best"}, "method must be one of"),
        ({"quant_method": "gptq"}, "quant_method must be 'mlcore'"),
    ):
        with pytest.raises(ValueError, match=message):
            MlcoreConfig(**how)
