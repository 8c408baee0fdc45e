"""Convolutions in int8: pointwise and depthwise layers with bias and ReLU6, and MobileNets at 224 x 224, against float32 by
mlcore and by torch in both layouts, and ONNX Runtime in int8 (static, per channel) where onnxruntime and onnx are installed.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_cnn import MODELS, multiplications, stock
from harness import Group, relative_error, settled
from torch import nn

import mlcore
from mlcore import ops
from mlcore.nn import QuantConv2d

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx"))


@dataclass(frozen=True)
class Problem:
    C: int
    size: int
    J: int
    kernel: int = 1
    stride: int = 1

    def __str__(self) -> str:
        kind = "pointwise" if self.kernel == 1 else f"depthwise {self.kernel}x{self.kernel}"
        return f"{kind} (1,{self.C},{self.size},{self.size})->{self.J}" + f" stride {self.stride}" * (self.stride > 1)


LAYERS = [
    Problem(32, 112, 64),
    Problem(128, 56, 128),
    Problem(256, 28, 256),
    Problem(512, 14, 512),
    Problem(1024, 7, 1024),
    Problem(512, 14, 512, 3),
    Problem(96, 56, 96, 7),
]
ROWS = ["mlcore", "float32 by mlcore", "torch float32", "torch float32 (channels_last)"]


def layer_group(problem: Problem) -> Group:
    torch.manual_seed(0)
    depthwise = problem.kernel > 1
    groups, padding = problem.C if depthwise else 1, problem.kernel // 2
    conv = nn.Conv2d(problem.C, problem.J, problem.kernel, problem.stride, padding, groups=groups)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    x = torch.randn(1, problem.C, problem.size, problem.size)
    pixels = x.to(memory_format=torch.channels_last)
    low = QuantConv2d.from_float(conv, activation="relu6")
    rows = {
        "mlcore": lambda: low(pixels),
        "torch float32": lambda: F.relu6(conv(x)),
        "torch float32 (channels_last)": lambda: F.relu6(last(pixels)),
    }
    if depthwise:
        how = (conv.weight.detach(), conv.bias.detach(), problem.stride, padding)
        rows["float32 by mlcore"] = lambda: F.relu6(ops.depthwise_conv2d(pixels, *how))
    else:
        packed = ops.PackedSeparable(None, conv.weight, None, conv.bias, pointwise_activation="relu6")
        rows["float32 by mlcore"] = lambda: packed(pixels)
    want = F.relu6(copy.deepcopy(conv).double()(x.double())).detach()

    def check(row, got):
        error = relative_error(got, want)
        assert error < (3e-2 if row == "mlcore" else 1e-5), f"{row}: relative error {error}"
        return error

    calls = {name: torch.no_grad()(call) for name, call in rows.items()}
    return Group(calls, check, flops=2 * want.numel() * conv.weight[0].numel())


def onnx_int8(model: nn.Module, x: torch.Tensor):
    """ONNX Runtime's own recipe for CNNs: static quantization in QDQ form, weights by channels, calibrated on x."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        left = iter([{"x": x.numpy()}])

        def get_next(self):
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("float.onnx", "ready.onnx", "int8.onnx")]
        torch.onnx.export(model, (x,), paths[0], input_names=["x"], dynamo=False)
        quant_pre_process(paths[0], paths[1])
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(paths[1], paths[2], Reader(), per_channel=True, reduce_range=False, **kinds)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(paths[2], options, providers=["CPUExecutionProvider"])
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


def network_group(kind: str, batch: int) -> Group:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    x = torch.randn(batch, 3, 224, 224)
    low, lowest = copy.deepcopy(model), copy.deepcopy(model)
    mlcore.quantize(low, mlcore.QuantConfig("int8"))
    mlcore.quantize(lowest, mlcore.QuantConfig("int8", convolutions=True))
    plain, last = stock(model, torch.contiguous_format), stock(model, torch.channels_last)
    rows = {
        "mlcore": lambda: low(x),
        "mlcore, every layer": lambda: lowest(x),
        "float32 by mlcore": lambda: model(x),
        "torch float32": lambda: plain(x),
        "torch float32 (channels_last)": lambda: last(x),
    }
    if HAS_ONNX:
        rows["ONNX Runtime int8"] = onnx_int8(stock(model, torch.contiguous_format), x)
    with torch.no_grad():
        want = plain.double()(x.double())
        plain.float()

    def check(row, got):
        error = ((got.double() - want).square().sum() / want.square().sum()).sqrt().item()  # noise over signal
        limit = 0.2 if row.startswith("mlcore") else 1.0 if row == "ONNX Runtime int8" else 1e-4
        assert error < limit, f"{row}: noise {error} of the signal"
        return error

    flops = batch * multiplications(model)
    return Group({name: torch.no_grad()(call) for name, call in rows.items()}, check, flops=flops, before=settled(rows))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("problem", LAYERS, ids=str)
def test_layer(race, problem, row):
    race(f"cnn_quantized {problem}", row, lambda: layer_group(problem))


@pytest.mark.parametrize("row", [*ROWS, "mlcore, every layer", "ONNX Runtime int8"])
@pytest.mark.parametrize("kind", MODELS)
def test_network(race, kind, row):
    if row == "ONNX Runtime int8" and not HAS_ONNX:
        pytest.skip("needs onnxruntime and onnx")
    race(f"cnn_quantized {kind} inference batch 1", row, lambda: network_group(kind, 1))
