"""causal_conv1d's CUDA kernels in the emulator and its Triton kernels in the interpreter, against float64: the cases of
test_causal_conv1d.py through the public functions, in small shapes.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_causal_conv1d as suite
import torch
from gpu_code import BF16, F16, F32, emulator

from mlcore.ops import causal_conv1d

OP = "causal_conv1d"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 4), (3, 5, 2, 7), (2, 17, 33, 4), (1, 2, 300, 3), (1, 67, 70, 5), (1, 2, 60, 20)]
DTYPES = [F32, F16] if gpu_code.INTERPRETING else [F32, BF16, F16]  # the interpreter computes bfloat16 wrongly


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_matches_conv1d(dtype, shape):
    suite.check(BACKEND, suite.make(shape, dtype, "contiguous"))
    suite.check(BACKEND, suite.make(shape, dtype, "channels_last", initial=True), activation="silu")


@pytest.mark.parametrize("layout", suite.LAYOUTS)
@pytest.mark.parametrize("activation", suite.ACTIVATIONS, ids=str)
def test_interpreted_layouts_and_activations(activation, layout):
    inputs = suite.make((2, 9, 21, 4), F32, layout, bias=layout != "sliced", initial=layout != "expanded")
    suite.check(BACKEND, inputs, activation=activation)


def test_interpreted_mixed_dtypes():
    inputs = suite.make((2, 9, 20, 4), DTYPES[-1])
    inputs["weight"], inputs["bias"] = inputs["weight"].float(), inputs["bias"].float()
    suite.check(BACKEND, inputs, activation="gelu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_interpreted_packed_sequences(layout, width):
    suite.test_packed_sequences_are_sequences(BACKEND, layout, width)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_interpreted_seq_idx(layout):
    suite.test_seq_idx_cuts(BACKEND, layout)


def test_interpreted_runs_of_packed_sequences():
    """seq_idx inside of cu_seqlens, as the reference; the last run of the middle sequence is padding."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1, -1, 3, 3, 3]])
    kwargs = {"seq_idx": ids, "cu_seqlens": torch.tensor([0, 4, 4, 9, 12]), "activation": "gelu"}
    inputs = suite.make((1, 5, 12, 4))
    inputs["initial_states"] = torch.randn(4, 5, 3)
    outputs = []
    for function in (lambda **t: causal_conv1d(**t, return_final_states=True, impl=BACKEND), gpu_code.reference(OP)):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        out = function(**leaves, **kwargs)
        seeds = [torch.linspace(-1, 1, o.numel()).view_as(o) for o in out]
        outputs.append((*out, *torch.autograd.grad(out, list(leaves.values()), seeds)))
    for got, want in zip(*outputs):
        torch.testing.assert_close(got, want)


def test_interpreted_runs_do_not_leak():
    suite.test_runs_do_not_leak()


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_interpreted_update_continues(ring, T):
    suite.test_update_continues(BACKEND, ring, T)


def test_interpreted_update_of_slots():
    suite.test_update_of_slots(BACKEND)
    x, state = torch.randn(2, 4), torch.randn(3, 4, 3)
    before = state.clone()
    slots = torch.tensor([3, 1])
    y = suite.causal_conv1d_update(x, state, torch.randn(4, 4), slots=slots, impl=BACKEND)
    assert y[0].isnan().all() and y[1].isfinite().all(), "a slot that state doesn't have"
    assert torch.equal(state[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_interpreted_empty(shape):
    suite.test_empty(shape)


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    def test_emulated_bits_do_not_depend_on_the_order_of_threads():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        x, weight = torch.randn(2, 5, 700, requires_grad=True), torch.randn(5, 6, requires_grad=True)
        outputs = []
        for seed in range(3):
            library.set_seed(seed)
            y = causal_conv1d(x, weight, activation="silu", impl=BACKEND)
            outputs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other))

    def test_emulated_errors():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        x, weight, y = torch.ones(2, 3, 9), torch.ones(3, 4), torch.full((2, 3, 9), 7.0)
        in_channels = x.transpose(1, 2).contiguous().transpose(1, 2)
        for args, message in [
            ((in_channels, weight, None, None, None, None, 0, y, None), "y must be contiguous in C"),
            ((x, weight.bfloat16(), None, None, None, None, 0, y, None), "weight must be float32"),
            ((x, weight, None, None, None, None, 3, y, None), "activation must be 0, 1 or 2; got 3"),
            ((x, weight, None, x, None, None, 0, y, None), r"initial must be \(N, C, w-1\)"),
        ]:
            with pytest.raises(ValueError, match=f"causal_conv1d: {message}"):
                library.call(f"mlc_cuda_{OP}_fwd", *args, None)
            assert y.eq(7).all()
