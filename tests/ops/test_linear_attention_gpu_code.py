"""linear_attention's CUDA step emulated, its Triton kernels interpreted, against the float64 recurrence: every variant of the
CPU's tests through the public functions, in small shapes, with states kept every 64 tokens.
"""

from __future__ import annotations

import itertools

import gpu_code
import linear_attention_suite as suite
import pytest
import test_linear_attention
import test_linear_attention_state
import torch
import torch.nn.functional as F

from mlcore.ops import linear_attention, linear_attention_step

OP = "linear_attention"
SHAPES = [(2, 2, 1, 16, 16), (1, 2, 63, 33, 24), (1, 1, 140, 20, 8)]
SHORT = [(1, 2, 1, 16, 16), (1, 1, 17, 33, 24), (1, 1, 67, 16, 8)]  # pairs of tokens one by one: slow when interpreted


def _triton_of(variant):
    return lambda **t: linear_attention(**t, return_state=True, impl="triton", **suite.options(variant))


def _reference_of(variant):
    return lambda **t: linear_attention(**t, return_state=True, impl="reference", **suite.options(variant))


if gpu_code.INTERPRETING:

    @pytest.fixture(autouse=True)
    def served(monkeypatch):
        with gpu_code.serving(OP, "triton"):
            monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext("triton"))
            monkeypatch.setattr(gpu_code.importlib.import_module("mlcore.ops.linear_attention"), "_SPAN", 64)
            yield

    CASES = [(v, s) for v in suite.VARIANTS for s in (SHORT if "vector" in v or "delta" in v else SHAPES)]

    @pytest.mark.parametrize(("variant", "shape"), CASES, ids=str)
    def test_interpreted_matches_float64(variant, shape):
        suite.check(["triton"], suite.make(variant, shape), **suite.options(variant))

    @pytest.mark.parametrize("variant", ["normalized", "gate", "vector gated delta"])
    def test_interpreted_half(variant):
        suite.check(["triton"], suite.make(variant, (1, 1, 20, 24, 16), torch.float16), **suite.options(variant))

    @pytest.mark.parametrize("variant", ["normalized", "gated delta"])
    def test_interpreted_blocks_of_values(variant, monkeypatch):
        """More columns of the values than a program takes: sums over blocks in dq, dk and the gates' gradients."""
        module = gpu_code.importlib.import_module(f"kernels.{OP}.{OP}_triton")
        shape_of = module._shape
        monkeypatch.setattr(module, "_shape", lambda *args: shape_of(*args) | {"BV": 16})
        suite.check(["triton"], suite.make(variant, (1, 1, 35, 20, 40)), **suite.options(variant))

    @pytest.mark.parametrize("variant", ["normalized", "gate", "vector gated delta"])
    def test_interpreted_strides(variant):
        suite.check(["triton"], suite.make(variant, (2, 1, 9, 20, 24), layout="transposed"), **suite.options(variant))

    @pytest.mark.parametrize("variant", ["normalized", "gate", "vector gated delta"])
    def test_interpreted_packed_sequences(variant):
        """Empty sequences, and ones that no chunk divides, have the bits that each has alone."""
        bounds = [0, 0, 17, 18, 18, 25, 25] if "delta" in variant else [0, 0, 70, 71, 71, 120]
        inputs = suite.make(variant, (1, 1, bounds[-1], 12, 16), sequences=len(bounds) - 1)
        kwargs = {"impl": "triton", **suite.options(variant)}
        got = suite.gradients(inputs, cu_seqlens=torch.tensor(bounds), **kwargs)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(t.shape, generator=generator) for t in got[:2]]
        own = {"decay", "initial_state"}
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            part = {m: t if m in own else t[:, :, begin:end] for m, t in inputs.items()}
            part["initial_state"] = inputs["initial_state"][n : n + 1]
            want = suite.gradients(part, (seeds[0][:, :, begin:end], seeds[1][n : n + 1]), **kwargs)
            for m, g, w in zip(["o", "state", *inputs], got, want):
                g = g[n : n + 1] if m in ("state", "initial_state") else g[:, :, begin:end] if m != "decay" else w
                assert torch.equal(g, w), (m, n)

    @pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
    @pytest.mark.parametrize("causal", [True, False])
    def test_interpreted_feature_maps(feature_map, causal):
        inputs = {n: torch.randn(1, 2, 70 if n == "q" or causal else 33, 20) for n in "qkv"}
        kwargs = {"feature_map": feature_map, "causal": causal}
        seeds = []
        want = suite.evaluate(lambda **t: linear_attention(**t, return_state=True, impl="reference", **kwargs), inputs, seeds)
        got = suite.evaluate(lambda **t: linear_attention(**t, return_state=True, impl="triton", **kwargs), inputs, seeds)
        for g, w in zip(got, want):
            for name in w:
                torch.testing.assert_close(g[name], w[name], rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")

    @pytest.mark.parametrize("variant", suite.VARIANTS)
    def test_interpreted_step(variant):
        test_linear_attention_state.test_step_matches_one_token("triton", torch.float32, variant)

    @pytest.mark.parametrize("variant", ["gate", "vector gate", "vector gated delta"])
    def test_interpreted_extreme_gates(variant):
        """Gates that forget everything beside gates that forget nothing: finite, and right behind."""
        inputs = suite.make(variant, (1, 1, 70 if variant == "gate" else 22, 16, 8))
        inputs["gate"][:, :, 1::7], inputs["gate"][:, :, 5::11] = -1e4, -1e-7
        inputs["gate"][:, :, 12] = float("-inf")
        inputs["gate"][:, :, 16:20] = -60.0
        seeds = []
        want = suite.evaluate(_reference_of(variant), {n: t.double() for n, t in inputs.items()}, seeds)
        got = suite.evaluate(_triton_of(variant), inputs, seeds)
        for g, w in zip(got, want):
            for name in w:
                clean = torch.where(w[name].isfinite(), w[name], 0.0).float()  # of a gate of -inf: 0 times infinity
                torch.testing.assert_close(
                    g[name].float(), clean, rtol=2e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
                )

    @pytest.mark.parametrize("variant", ["normalized", "vector gate", "gated delta"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_interpreted_nan_reaches_no_token_before_it(name, variant):
        """Also within a chunk, whose products have zeros that NaN would pass; and q's reaches its own token alone."""
        inputs = suite.make(variant, (1, 2, 14, 16, 8))
        want = linear_attention(**inputs, impl="triton", **suite.options(variant))
        inputs[name][:, 0, 9, 2] = float("nan")
        got = linear_attention(**inputs, impl="triton", **suite.options(variant))
        assert torch.equal(got[:, :, :9], want[:, :, :9]) and torch.equal(got[:, 1], want[:, 1])
        assert got[:, 0, 9].isnan().any()
        assert name != "q" or torch.equal(got[:, :, 10:], want[:, :, 10:])

    def test_interpreted_zero_denominator():
        test_linear_attention.test_a_zero_denominator_gives_zero("triton")

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
    def test_interpreted_empty(shape, causal):
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        state = torch.rand(*shape[:2], 4, 5, requires_grad=True)
        o, final = linear_attention(q, k, v, causal=causal, initial_state=state, return_state=True, impl="triton")
        assert o.shape == shape
        grads = torch.autograd.grad(o.sum() + final.sum(), (q, state))
        if shape[2] == 0:
            assert torch.equal(final, state) and grads[1].eq(1).all()

    def test_interpreted_prefill_then_steps():
        q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
        gate = F.logsigmoid(torch.randn(1, 2, 9))
        want, last = linear_attention(q, k, v, gate=gate, return_state=True, impl="triton")
        part = [t[:, :, :5] for t in (q, k, v)]
        _, state = linear_attention(*part, gate=gate[:, :, :5], return_state=True, impl="triton")
        for t in range(5, 9):
            one = [x[:, :, t] for x in (q, k, v)]
            o, state = linear_attention_step(*one, state, gate=gate[:, :, t], impl="triton")
            torch.testing.assert_close(o, want[:, :, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


test_interpreted_by_triton = gpu_code.interpreted_by_triton(__file__)


if not gpu_code.INTERPRETING:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("variant", suite.VARIANTS)
    def test_emulated_step(variant, dtype, monkeypatch):
        monkeypatch.setattr(suite.testing, "use", lambda name: gpu_code.contextlib.nullcontext("cuda"))
        with gpu_code.serving(OP, "cuda"):
            test_linear_attention_state.test_step_matches_one_token("cuda", dtype, variant)

    @pytest.mark.parametrize("shape", [(2, 2, 1, 16, 16), (1, 2, 9, 33, 40)], ids=str)
    @pytest.mark.parametrize("variant", suite.VARIANTS)
    def test_emulated_short_sequences(variant, shape):
        inputs = suite.make(variant, shape)
        kwargs = {"return_state": True, **suite.options(variant)}
        want = linear_attention(**inputs, impl="reference", **kwargs)
        with gpu_code.serving(OP, "cuda"):
            got = linear_attention(**inputs, impl="cuda", **kwargs)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
    def test_emulated_not_causal(feature_map):
        q, k, v = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 5)
        kwargs = {"feature_map": feature_map, "causal": False, "return_state": True}
        want = linear_attention(q, k, v, impl="reference", **kwargs)
        with gpu_code.serving(OP, "cuda"):
            got = linear_attention(q, k, v, impl="cuda", **kwargs)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)

    def test_emulated_packed_short_sequences():
        inputs = suite.make("gated delta", (1, 2, 9, 12, 8), torch.bfloat16, sequences=4)
        kwargs = {"return_state": True, "cu_seqlens": torch.tensor([0, 0, 4, 5, 9]), **suite.options("gated delta")}
        want = linear_attention(**inputs, impl="reference", **kwargs)
        with gpu_code.serving(OP, "cuda"):
            got = linear_attention(**inputs, impl="cuda", **kwargs)
        torch.testing.assert_close(got[0], want[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
    def test_emulated_step_in_place(feature_map):
        """More columns than a block has, a gate that forgets everything, and the new state in the old one's memory."""
        q, k, v = torch.randn(1, 2, 20), torch.randn(1, 2, 20), torch.randn(1, 2, 70)
        gate = torch.tensor([[[-0.5] * 20, [float("-inf")] * 20]])
        state = torch.rand(1, 2, 20, 71)
        one = [t[:, :, None] for t in (q, k, v, gate)]
        reference = gpu_code.reference(OP)
        want, last = reference(*one[:4], initial_state=state, feature=feature_map)
        o = torch.full((1, 2, 70), float("nan"))
        library = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu")
        number = [None, "elu", "relu", "softmax"].index(feature_map)
        library.call(f"mlc_cuda_{OP}_step", q, k, v, gate, None, state, number, 1, o, state, None)
        torch.testing.assert_close(o, want[:, :, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)

    def test_emulated_errors():
        library = gpu_code.emulator.load(f"kernels/{OP}/{OP}.cu")
        q, state, o = torch.ones(1, 2, 4), torch.ones(1, 2, 4, 5), torch.full((1, 2, 4), 7.0)
        for args, message in [
            ((q, q, q, None, None, state[..., :4].contiguous(), 0, 1, o, state), "state must be .* = \\(1, 2, 4, 5\\)"),
            ((q, q, q, None, None, state, 4, 1, o, state), "feature_map must be 0 to 3; got 4"),
            ((q, q, q, None, torch.ones(1, 2), state, 0, 1, o, state), "beta needs normalize = 0"),
            ((q, q.half(), q, None, None, state, 0, 1, o, state), "k must be float32; got float16"),
        ]:
            with pytest.raises(ValueError, match=f"linear_attention: {message}"):
                library.call(f"mlc_cuda_{OP}_step", *args, None)
            assert o.eq(7).all()


def test_cuda_refuses_what_it_has_no_kernel_for():
    from mlcore._backend import broken_rule

    assert broken_rule(OP, "cuda", torch.empty(1, 1, 800)) is None and broken_rule(OP, "cuda", torch.empty(1, 1, 64, 8)) is None
    assert broken_rule(OP, "cuda", torch.empty(1, 1, 4, 8), grad=True) == "the cuda kernels have no backward pass"
    assert broken_rule(OP, "cuda", torch.empty(1, 1, 65, 8)) == (
        "the cuda kernels take up to 64 tokens and head dims up to 512; got 65 and 8"
    )


@pytest.mark.skipif(gpu_code.INTERPRETING, reason="the choice is replaced there")
def test_a_broken_rule_is_refused_and_explained(monkeypatch):
    """A rule keeps the automatic choice away, an explicit impl raises with its reason, and explain shows it."""
    from mlcore import _backend, explain

    q = torch.ones(1, 1, 2, 4)
    assert _backend.choose(OP, None, q) == "cpu"
    monkeypatch.setitem(_backend.RULES, (OP, "cpu"), lambda t, grad: f"no {t.dim()}-dimensional tensors today")
    assert _backend.choose(OP, None, q) == "reference"
    assert explain(OP, q).reasons["cpu"] == "no 4-dimensional tensors today"
    with pytest.raises(ValueError, match="impl='cpu' can't serve this call: no 4-dimensional tensors today"):
        linear_attention(q, q, q, impl="cpu")


def test_triton_refuses_head_dims_that_it_cannot_hold():
    from mlcore._backend import broken_rule

    assert broken_rule(OP, "triton", torch.empty(1, 1, 1, 256)) is None
    assert broken_rule(OP, "triton", torch.empty(1, 1, 1, 257)) == (
        "q's head dim is 257, the triton kernels hold states of at most 256 rows"
    )
