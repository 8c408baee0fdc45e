"""mlcore.nn.LayerNorm and RMSNorm against torch.nn's: signature, state dict, results, errors."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import mlcore
from mlcore import testing

NAMES = ("LayerNorm", "RMSNorm")


def make_pair(name, *args, **kwargs):
    """Our module and torch's, with the same random parameters, passed on by state_dict."""
    ours, theirs = getattr(mlcore.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module, x, residual=None):
    """Output and gradients; a residual is added before torch's module."""
    x = x.detach().requires_grad_()
    if residual is None:
        y = module(x)
    elif type(module).__module__.startswith("mlcore"):
        y, s = module(x, residual)
        assert torch.equal(s, x + residual)
    else:
        y = module(x + residual)
    seed = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape, normalized", [((4, 33), 33), ((2, 3, 4, 5), (4, 5)), ((6,), (6,)), ((3, 0, 8), [8])], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_matches_torch(name, dtype, shape, normalized, residual):
    ours, theirs = make_pair(name, normalized, dtype=dtype)
    x, r = testing.make_input(*shape, dtype=dtype), testing.make_input(*shape, dtype=dtype) if residual else None
    results = run(ours, x, r), run(theirs, x, r), run(copy.deepcopy(theirs).double(), (x if r is None else x + r).double())
    for i, (g, m, t) in enumerate(zip(*results)):
        testing.assert_close_to_reference(g, m, t, grad=i > 0, what=f"result {i}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [{"elementwise_affine": False}, {"eps": 0.5}, {"dtype": torch.float64}], ids=str)
def test_options(name, kwargs):
    ours, theirs = make_pair(name, (3, 4), **kwargs)
    x = torch.randn(5, 3, 4, dtype=kwargs.get("dtype", torch.float32))
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_norm_without_bias():
    ours, theirs = make_pair("LayerNorm", 12, bias=False)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rms_norm_default_eps_is_torchs(dtype):
    ours, theirs = make_pair("RMSNorm", 8, dtype=dtype)
    x = torch.full((2, 8), 1e-4, dtype=dtype)  # the mean square is below every float32's epsilon
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_is_torchs_module_to_the_outside(name):
    ours, theirs = make_pair(name, (4, 5))
    assert isinstance(ours, getattr(torch.nn, name))
    assert inspect.signature(type(ours).__init__) == inspect.signature(type(theirs).__init__)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        x = torch.randn(2, 4, 5)
        assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_keeps_float32_parameters(name):
    """float32 parameters on bfloat16 activations, as under FSDP's mixed precision or after a bfloat16 linear layer."""
    ours, theirs = make_pair(name, 40)
    x = testing.make_input(6, 40, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x.float()).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_exports(name):
    for normalized, shapes in ((24, [(3, 24), (7, 24)]), ((4, 6), [(3, 4, 6), (5, 4, 6)])):
        module, _ = make_pair(name, normalized)
        testing.check_public(module, *([torch.randn(s, requires_grad=True)] for s in shapes))
        testing.check_public(module, *([torch.randn(s, requires_grad=True), torch.randn(s)] for s in shapes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "normalized, x, residual, message",
    [
        (5, (3, 4), None, "x must end in normalized_shape (5,); got shape (3, 4)"),
        ((4, 5), (5, 4), None, "x must end in normalized_shape (4, 5); got shape (5, 4)"),
        ((4, 5), (5,), None, "x must end in normalized_shape (4, 5); got shape (5,)"),
        ((4, 5), (2, 4, 5), (2, 5, 4), "residual must have x's shape (2, 4, 5); got (2, 5, 4)"),
        (5, (2, 5), (5,), "residual must have x's shape (2, 5); got (5,)"),
    ],
    ids=str,
)
def test_bad_shapes(name, normalized, x, residual, message):
    op = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[name]
    module = getattr(mlcore.nn, name)(normalized, elementwise_affine=False)
    with pytest.raises(ValueError) as error:
        module(torch.ones(x), None if residual is None else torch.ones(residual))
    assert str(error.value) == f"{op}: {message}"
