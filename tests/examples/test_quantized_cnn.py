"""The binary and the 2-bit CNN: they learn, and packed they give the same logits to the bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "quantized_cnn" / "quantized_digits.py"


@pytest.fixture(scope="module")
def example():
    for needed in ("rich", "sklearn"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("example_quantized_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("network", ["binary", "2-bit"])
def test_learns_and_is_served_exactly(example, network):
    (x, y), test = example.digits.digits()
    torch.set_num_threads(1)  # as the example does
    model, history = example.train(network, (x[:640], y[:640]), test, epochs=3)
    assert history[-1][0] < 0.8 * history[0][0]
    example.check_served(model, test[0])
    real, small = example.weight_bytes(model)
    assert small < real / (20 if network == "binary" else 10)
    broken = example.packed(model)
    next(m for m in broken.modules() if hasattr(m, "packed")).packed.codes.bitwise_not_()
    with torch.no_grad():
        assert not torch.equal(broken(test[0]), model.eval()(test[0]))  # that the packed layers are what computes
