"""BERT-base end to end in int8 with inputs rounded by rows, random weights: transformers' model with mlcore's attention, norms
and fused low-bit products, against torch in fp32 and what quantizes for the CPU elsewhere. torchao (compiled) with --compiled,
ONNX Runtime's dynamic quantization with onnxruntime and onnx installed; without them these rows are skipped and say so.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
from dataclasses import dataclass

import harness
import pytest
import torch
from harness import Group, relative_error, settled

transformers = pytest.importorskip("transformers", reason="BERT comes from transformers: pip install 'mlcore[hf]'")

import mlcore  # noqa: E402
import mlcore.integrations.transformers  # noqa: E402
from mlcore import QuantConfig  # noqa: E402
from mlcore.integrations.transformers_bert import fuse  # noqa: E402

# Of the fp32 model's last hidden state, by norm: what twelve layers of int8 inputs lose. ONNX Runtime rounds inputs by tensor.
LOST = {
    "mlcore": 0.05,
    "mlcore, parts": 0.05,
    "mlcore, int4 g32": 0.3,
    "mlcore, fp32": 1e-4,
    "torch fp32": 1e-6,
    "torchao int8 (compiled)": 0.05,
    "ONNX Runtime int8": 0.1,
}


@dataclass(frozen=True)
class Problem:
    batch: int
    length: int

    def __str__(self) -> str:
        return f"BERT-base int8 ({self.batch},{self.length})"

    @property
    def flops(self) -> float:
        tokens, d, layers = self.batch * self.length, 768, 12
        return layers * (2 * tokens * 12 * d * d + 4 * tokens * self.length * d)


class LastHidden(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids).last_hidden_state


def ours(model, config: QuantConfig | None, fused: bool = True) -> torch.nn.Module:
    model = copy.deepcopy(model)
    model.set_attn_implementation("mlcore")
    mlcore.accelerate(model)
    if config is not None:
        mlcore.quantize(model, config)
        if fused:
            fuse(model)
    return LastHidden(model)


def torchao_compiled(model, ids):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = LastHidden(copy.deepcopy(model))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return harness.compiled(model)


def onnx_runtime(model, ids, folder):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    logging.getLogger().setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(LastHidden(model), (ids,), folder / "fp32.onnx", dynamo=False, opset_version=17)
        quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: torch.from_numpy(session.run(None, {name: ids.numpy()})[0])


def make_group(problem: Problem, compiled: bool, folder) -> Group:
    torch.manual_seed(0)
    mlcore.integrations.transformers.register()
    stock = transformers.BertModel(transformers.BertConfig(attn_implementation="sdpa"), add_pooling_layer=False).eval()
    ids = torch.randint(0, 30000, (problem.batch, problem.length))
    int8 = QuantConfig("int8")
    models = {
        "mlcore": ours(stock, int8),
        "mlcore, parts": ours(stock, int8, fused=False),
        "mlcore, int4 g32": ours(stock, QuantConfig("int4", 32, symmetric=False)),
        "mlcore, fp32": ours(stock, None),
        "torch fp32": LastHidden(stock),
    }
    if compiled and importlib.util.find_spec("torchao"):
        models["torchao int8 (compiled)"] = torchao_compiled(stock, ids)
    rows = {name: torch.inference_mode()(lambda model=model: model(ids)) for name, model in models.items()}
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        rows["ONNX Runtime int8"] = onnx_runtime(stock, ids, folder)
    with torch.inference_mode():
        want = stock(ids).last_hidden_state

    def check(row, got):
        error = relative_error(got, want)
        assert error < LOST[row], f"{row}: relative error {error}, {LOST[row]} is allowed"
        return error

    return Group(rows, check, flops=problem.flops, before=settled(rows))


@pytest.mark.parametrize("row", LOST)
@pytest.mark.parametrize("problem", [Problem(1, 128), Problem(4, 512)], ids=str)
def test_bert(race, request, tmp_path_factory, problem, row):
    package = {"torchao int8 (compiled)": "torchao", "ONNX Runtime int8": "onnxruntime"}.get(row)
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed")
    compiled = request.config.getoption("compiled")
    race(f"bert_quantized {problem}", row, lambda: make_group(problem, compiled, tmp_path_factory.mktemp("onnx")))
