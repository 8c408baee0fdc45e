"""aft's CUDA kernels in the emulator and its Triton kernels in the interpreter, against float64: the cases of test_aft.py
through the public function, in small shapes.
"""

from __future__ import annotations

import gpu_code
import pytest
import test_aft as suite
import torch
from gpu_code import BF16, F16, F32, emulator

from mlcore.ops import aft

OP = "aft"
BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"
KINDS = ["simple", "full of heads", "local", "conv, wide"] if gpu_code.INTERPRETING else list(suite.KINDS)
# (B, H, T, D): groups of 32 tokens and chunks of 32 features with tails
SHAPES = [(2, 2, 1, 3), (1, 1, 33, 5)] if gpu_code.INTERPRETING else [(2, 2, 1, 3), (1, 2, 70, 5), (1, 1, 40, 37)]
SMALL = (1, 1, 34, 3) if gpu_code.INTERPRETING else (1, 2, 70, 5)
DTYPES = [F16] if gpu_code.INTERPRETING else [BF16, F16]  # the interpreter computes bfloat16 wrongly
FEW = ["simple", "full", "conv"] if gpu_code.INTERPRETING else ["simple", "full of heads", "local", "conv, wide"]


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Every implementation that the CPU suite's functions ask for is the one under test."""
    with gpu_code.serving(OP, BACKEND):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext(BACKEND))
        monkeypatch.setattr(suite, "SMALL", SMALL)
        yield


def check(*args, **words):
    suite.check(*args, names=[BACKEND], **words)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_matches_float64(kind, causal, shape):
    check(*suite.make(kind, shape, F32, causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["simple", "full", "local", "conv"])
def test_interpreted_16_bits(kind, dtype):
    check(*suite.make(kind, SMALL, dtype, True))


@pytest.mark.parametrize(("T", "S"), [(34, 7), (1, 35)] if gpu_code.INTERPRETING else [(40, 7), (1, 65), (33, 70)])
@pytest.mark.parametrize("kind", FEW)
def test_interpreted_cross_attention(kind, T, S):
    check(*suite.make(kind, (1, 1 if gpu_code.INTERPRETING else 2, T, 3), S=S))


@pytest.mark.parametrize("causal", [True] if gpu_code.INTERPRETING else [False, True])
@pytest.mark.parametrize("kind", FEW)
def test_interpreted_large_weights(kind, causal):
    """Exponents of hundreds of either sign, and keys that grow or fall by 400 over the sequence."""
    check(*suite.make(kind, SMALL, causal=causal, spread=300.0), torch_way=suite.aft_ref.weighted_means)
    for sign in (-1,) if gpu_code.INTERPRETING else (1, -1):
        inputs, options = suite.make(kind, SMALL, causal=causal)
        inputs["k"] = inputs["k"] + sign * torch.linspace(-200, 200, SMALL[2])[:, None]
        check(inputs, options, torch_way=suite.aft_ref.weighted_means)


@pytest.mark.parametrize("kind", FEW)
def test_interpreted_hidden_keys_count_for_nothing(kind):
    suite.test_hidden_keys_count_for_nothing(BACKEND, kind)


def test_interpreted_hidden_pairs_count_for_nothing():
    suite.test_hidden_pairs_count_for_nothing(BACKEND)


@pytest.mark.parametrize("bad", [torch.nan] if gpu_code.INTERPRETING else [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", FEW)
def test_interpreted_nan_reaches_no_earlier_token_and_no_other_head(kind, bad):
    inputs, options = suite.make(kind, (1, 2, 34, 3), causal=True)
    want = aft(**inputs, **options, impl=BACKEND)
    for n in ("k", "v"):
        changed = dict(inputs, **{n: inputs[n].clone()})
        changed[n][0, 1, 33] = bad
        leaves = {m: t.detach().requires_grad_(m != "bias") for m, t in changed.items()}
        got = aft(**leaves, **options, impl=BACKEND)
        torch.testing.assert_close(got[:, :, :33], want[:, :, :33], rtol=1e-5, atol=1e-6)
        assert torch.equal(got[:, 0], want[:, 0])
        assert not got[0, 1, 33:].isfinite().any()
        grads = torch.autograd.grad(got[:, :, :33].sum(), [t for t in leaves.values() if t.requires_grad])
        assert all(g[:, 0].isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", ["simple", "local", "conv"])
def test_interpreted_strides_and_nothing(kind):
    check(*suite.make(kind, (2, 2, 9, 3), layout="transposed", causal=True))
    inputs, options = suite.make(kind, (0, 2, 9, 3))
    leaves = [t.requires_grad_() for t in inputs.values()]
    o = aft(**inputs, **options, impl=BACKEND)
    grads = torch.autograd.grad(o.sum(), leaves)
    assert o.shape == (0, 2, 9, 3) and all(g.shape == t.shape and g.eq(0).all() for g, t in zip(grads, leaves))


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    @pytest.mark.parametrize("kind", ["simple", "full of heads", "conv"])
    def test_emulated_bits_do_not_depend_on_the_order_of_threads(kind):
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        inputs, options = suite.make(kind, SMALL, causal=True)
        outputs = []
        for seed in range(2):
            library.set_seed(seed)
            leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
            o = aft(**leaves, **options, impl=BACKEND)
            outputs.append((o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))

    def test_emulated_errors():
        library = emulator.load(f"kernels/{OP}/{OP}.cu")
        q, bias, o = torch.ones(1, 2, 5, 4), torch.ones(2, 3), torch.full((1, 2, 5, 4), 7.0)
        work = torch.ones(2 * 2 * 2 * 3 * 4)
        good = [q, q, q, bias, 2, 0, o, None, None, None, work]
        for at, value, message in [
            (0, q.double(), "q must be float32, bfloat16, float16; got float64"),
            (1, q[:, :, :, :3], r"k must be \(B, H, T, D\)|k must be \(B, H, S, D\)"),
            (3, None, "window needs bias"),
            (3, bias[:, :2], r"bias must be \(1 or H, columns of the window\) = \(2, 3\); got \(2, 2\)"),
            (7, o, "y, den and peak go together"),
            (10, work[:-1], "work must have 96 elements; got 95"),
        ]:
            args = list(good)
            args[at] = value
            with pytest.raises(ValueError, match=f"{OP}: ({message})"):
                library.call(f"mlc_cuda_{OP}_fwd", *args, None)
            assert o.eq(7).all()
