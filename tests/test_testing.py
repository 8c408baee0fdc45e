"""mlcore.testing tests the tests: that its rule passes what it should, and finds what it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mlcore
from mlcore import _C, testing
from mlcore._registry import register

LOW = [torch.float32, torch.bfloat16, torch.float16]


def truth_and_math(dtype, *shape):
    x = testing.make_input(*shape, dtype=dtype)
    return F.layer_norm(x.double(), shape[-1:]), F.layer_norm(x, shape[-1:])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 300)], ids=str)
def test_rule_passes_torch_and_the_rounded_truth(dtype, shape):
    for seed in range(20):
        torch.manual_seed(seed)
        truth, math = truth_and_math(dtype, *shape)
        testing.assert_close_to_reference(math, math, truth)
        testing.assert_close_to_reference(truth.to(dtype), math, truth)
        testing.assert_close_to_reference(truth.to(dtype), truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rule", ["RMS", "largest"])
def test_rule_finds(dtype, rule):
    truth, math = truth_and_math(dtype, 40, 300)
    got = math.clone()
    if rule == "RMS":  # every element a little off: one more rounding to a coarser type
        got = (got.double() * (1 + 4 * torch.finfo(dtype).eps * torch.randn(40, 1).sign())).to(dtype)
    else:  # one element wrong by two of its last digits
        row, col = divmod(int(truth.abs().argmax()), 300)
        got[row, col] *= 1 + 4 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=rf"result \({dtype}, \(40, 300\)\): {rule} error .* exceeds"):
        testing.assert_close_to_reference(got, math, truth)


def test_rule_is_relative_to_the_tensor():
    truth = torch.randn(64, dtype=torch.float64) * 1e-20
    math = truth.float()
    with pytest.raises(AssertionError, match="exceeds"):
        testing.assert_close_to_reference(math * 1.00001, math, truth)
    testing.assert_close_to_reference(math * 1.00001, math, truth, terms=1e-17)


def test_rule_wants_the_same_shape_dtype_and_infinities():
    truth, math = truth_and_math(torch.float16, 4, 9)
    with pytest.raises(AssertionError, match=r"result: dtype is torch.float32, torch's is torch.float16"):
        testing.assert_close_to_reference(math.float(), math, truth)
    with pytest.raises(AssertionError, match=r"result: shape is \(9, 4\)"):
        testing.assert_close_to_reference(math.T, math, truth)
    for bad in (float("nan"), float("inf")):
        got = math.clone()
        got[1, 2] = bad
        with pytest.raises(AssertionError, match="result: 1 of 36 elements are not finite where the truth is"):
            testing.assert_close_to_reference(got, math, truth)
    huge = truth.clone()
    huge[0, 0], huge[1, 1] = 1e6, float("nan")  # float16 ends at 65504
    testing.assert_close_to_reference(huge.half(), math, huge)
    with pytest.raises(AssertionError, match="infinities or NaNs differ from the truth's"):
        testing.assert_close_to_reference(math, math, huge)


def test_float64_is_compared_within_a_fixed_bound():
    truth = torch.randn(9, dtype=torch.float64)
    testing.assert_close_to_reference(truth * (1 + 1e-12), truth, truth)
    with pytest.raises(AssertionError):
        testing.assert_close_to_reference(truth * (1 + 1e-6), truth, truth)


def test_check_numerics_finds_a_wrong_gradient():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    inputs = {"x": torch.randn(5, 7)}
    triple = lambda x: x * 3  # noqa: E731
    testing.check_numerics(triple, triple, triple, inputs)
    testing.check_numerics(lambda x: Scale.apply(x), triple, triple, inputs, gradients=False)
    with pytest.raises(AssertionError, match="gradient of x"):
        testing.check_numerics(lambda x: Scale.apply(x), triple, triple, inputs)
    with pytest.raises(AssertionError, match="1 outputs, torch's way has 2"):
        testing.check_numerics(triple, lambda x: (x, x), lambda x: (x, x), inputs)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_make_input(layout):
    x = testing.make_input(4, 5, 6, dtype=torch.bfloat16, layout=layout, mean=100.0)
    assert x.shape == (4, 5, 6) and x.dtype == torch.bfloat16 and 90 < x.float().mean() < 110
    assert x.is_contiguous() == (layout == "contiguous")
    assert testing.make_input(layout=layout).shape == ()
    with pytest.raises(ValueError, match=r"layout must be one of contiguous, .*; got 'wide'"):
        testing.make_input(2, layout="wide")


def test_available_and_use():
    names = testing.available("rms_norm")
    assert names[0] == "cpu[scalar]" and names[-1] == "reference" and f"cpu[{_C.best_isa()}]" in names
    before = _C.isa()
    for name in names:
        with testing.use(name) as impl:
            assert impl in ("cpu", "cuda", "triton", "reference")
            assert name != f"cpu[{_C.isa()}]" or impl == "cpu"
        assert _C.isa() == before
    assert (names[0], torch.float64) not in testing.cases("rms_norm")
    assert ("reference", torch.float64) in testing.cases("rms_norm")
    with pytest.raises(RuntimeError, match="isa must be scalar, avx2 or avx512"), testing.isa("sse2"):
        pass
    with pytest.raises(ZeroDivisionError), testing.isa("scalar"):
        raise ZeroDivisionError
    assert _C.isa() == before


def test_check_op_finds_wrong_strides():
    register(
        "test_wrong_strides(Tensor x) -> Tensor",
        launch=lambda x: x.t().contiguous().t(),
        fake=torch.empty_like,
    )
    with pytest.raises(Exception, match="stride"):
        testing.check_op(torch.ops.mlcore.test_wrong_strides.default, [torch.randn(3, 4)])


def test_check_public_finds_graph_breaks_and_recompiles():
    def breaks(x):
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(Exception, match="Data-dependent"):
        testing.check_public(breaks, [torch.ones(3, 4)])

    def specialises(x):
        return x * len([0 for _ in range(x.shape[0])])

    with pytest.raises(AssertionError, match="graphs after each set of arguments"):
        testing.check_public(specialises, [torch.ones(3, 4)], [torch.ones(5, 4)])


def test_memory_is_poisoned():
    for dtype in (*LOW, torch.float64):
        assert torch.empty(5, dtype=dtype).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=dtype)).isnan().all()
        assert torch.ones(2, dtype=dtype).new_empty(4).isnan().all()
    assert mlcore.ops.rms_norm(torch.ones(3, 4)).isfinite().all()
