"""Instruction-set levels: MLCORE_ISA and set_isa choose one or refuse in one line; what must agree between levels agrees."""

import os
import subprocess
import sys

import pytest
import torch

from mlcore import _C, ops

LEVELS = ("scalar", "avx2", "avx512")
HERE = LEVELS[: LEVELS.index(_C.best_isa()) + 1]
BEYOND = LEVELS[len(HERE) :]


@pytest.fixture(autouse=True)
def default_level():
    yield
    _C.set_isa("")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "MLCORE_ISA"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


SHOW = "import mlcore; print(mlcore._C.isa())"


@pytest.mark.parametrize("level", HERE)
def test_environment_forces_a_level(level):
    assert python(SHOW, MLCORE_ISA=level).stdout.strip() == level


@pytest.mark.parametrize("value", [None, ""])
def test_default_is_the_best_level(value):
    assert python(SHOW, **({} if value is None else {"MLCORE_ISA": value})).stdout.strip() == _C.best_isa()


# Import never raises: a bad value shows when a kernel is first needed, and at every later call until it is corrected.
TRY_KERNEL = """
import mlcore, torch
for _ in range(2):
    try:
        mlcore.ops.rms_norm(torch.ones(2, 3))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
mlcore._C.set_isa("scalar")
mlcore.ops.rms_norm(torch.ones(2, 3))
"""


@pytest.mark.parametrize("value", ["sse9", "AVX2", "avx2 ", "avx512vnni", "1"])
def test_bad_value_is_one_clear_line(value):
    done = python(TRY_KERNEL, MLCORE_ISA=value)
    assert done.returncode == 0, done.stderr
    line = f'ValueError: MLCORE_ISA must be scalar, avx2 or avx512; got "{value}"'
    assert done.stdout.splitlines() == [line, line]


@pytest.mark.parametrize("level", BEYOND)
def test_level_beyond_the_machine_is_refused(level):
    line = f"MLCORE_ISA={level}: this machine's highest level is {_C.best_isa()}"
    assert python(TRY_KERNEL, MLCORE_ISA=level).stdout.splitlines() == [f"NotImplementedError: {line}"] * 2
    with pytest.raises(_C.Error, match=f"isa={level}: this machine's highest level is {_C.best_isa()}"):
        _C.set_isa(level)


def test_set_isa():
    for level in HERE:
        _C.set_isa(level)
        assert _C.isa() == level
    with pytest.raises(_C.Error, match='isa must be scalar, avx2 or avx512; got "neon"'):
        _C.set_isa("neon")
    assert _C.isa() == HERE[-1], "a refused level changes nothing"
    _C.set_isa("")
    assert _C.isa() == (os.environ.get("MLCORE_ISA") or _C.best_isa())


def test_allow():
    with pytest.raises(_C.Error, match='extension must be vnni or vpopcntdq; got "amx"'):
        _C.allow("amx", False)


def at_every_level(compute):
    results = []
    for level in HERE:
        _C.set_isa(level)
        results.append(compute())
    return results


def bits(t):
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def assert_same_bits(results):
    for level, result in zip(HERE[1:], results[1:], strict=True):
        for a, b in zip(results[0], result, strict=True):
            differ = bits(a) != bits(b)
            assert not differ.any(), (
                f"scalar and {level} differ in {differ.sum()} of {a.numel()}: {a[differ][:4]}, {b[differ][:4]}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cols", [1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 100, 257])
def test_levels_agree_to_the_bit_where_sums_are_exact(dtype, cols):
    """With whole numbers every order of summation gives the same sum; what follows is one rounding an operation."""
    torch.manual_seed(cols)
    x = torch.randint(-8, 9, (6, cols)).to(dtype)
    weight = torch.randn(cols).to(dtype)
    residual = torch.randint(-8, 9, (6, cols)).to(dtype)
    assert_same_bits(at_every_level(lambda: ops.rms_norm(x, weight, residual=residual)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_rounding_is_torchs_at_every_level(dtype):
    """s = x + residual is one sum in float32 rounded once: through all 65536 values of x, against torch's rounding."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    for residual in (torch.zeros_like(every), torch.full_like(every, 1.0), torch.full_like(every, 3e-5), every.flip(0, 1)):
        want = (every.float() + residual.float()).to(dtype)
        for level, (_, s) in zip(HERE, at_every_level(lambda r=residual: ops.rms_norm(every, residual=r)), strict=True):
            nan = want.isnan()
            assert torch.equal(s.isnan(), nan), level
            assert torch.equal(bits(s)[~nan], bits(want)[~nan]), level
