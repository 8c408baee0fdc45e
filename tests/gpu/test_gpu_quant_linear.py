"""quant_linear on a GPU: the CUDA and Triton kernels in every format, and in the sizes of real models."""

from __future__ import annotations

import pytest
import test_quant_linear as suite
import torch
from gpu_code import BF16, F16, F32

from mlcore import explain
from mlcore.ops import quant_linear
from mlcore.quant import pack

CUDA = pytest.param("cuda", marks=pytest.mark.sanitized)
PROBLEMS = [(1, 33, 130, 32), (9, 17, 70, None), (35, 40, 100, 9), (70, 5, 200, 128), (3, 0, 8, 4), (2, 5, 0, 4)]
TOLERANCE = {F32: (1e-5, 1e-4), BF16: (1.6e-2, 5e-2), F16: (2e-3, 1e-2)}


def make(M, N, K, dtype):
    return {n: t.cuda() for n, t in suite.make(M, N, K, dtype).items()}


def packed_on_gpu(N, K, *args, **kwargs):
    return pack(torch.randn(N, K) * max(K, 1) ** -0.5, *args, **kwargs).to("cuda")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dynamic_int8", [False, True])
@pytest.mark.parametrize("format", suite.FORMATS)
@pytest.mark.parametrize("backend", [CUDA, "triton"])
def test_every_format(backend, format, dynamic_int8, dtype):
    if backend == "cuda" and (dtype == F32 or format in ("nf4", "codebook")):
        pytest.skip("the CUDA kernels take 16 bits of x and no codebooks")
    for M, N, K, group in PROBLEMS if format not in ("nf4", "codebook") else PROBLEMS[:4]:
        for symmetric in (True, False) if format.startswith("int") else (True,):
            packed = packed_on_gpu(N, K, format, group_size=group, symmetric=symmetric)
            inputs = make(M, N, K, dtype)
            args = {"packed": packed, "activation": "gelu", "dynamic_int8": dynamic_int8}
            got = quant_linear(**inputs, **args, impl=backend)
            rtol, atol = TOLERANCE[dtype]
            torch.testing.assert_close(got, quant_linear(**inputs, **args, impl="reference"), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("M", [1, 16, 64, 300])
@pytest.mark.parametrize(("format", "group"), [("int4", 128), ("int4", 32), ("int8", None)])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_large(backend, format, group, M, dtype):
    packed = packed_on_gpu(1040, 4096, format, group_size=group)
    suite.check_numerics(backend, packed, "silu", make(M, 1040, 4096, dtype))


@pytest.mark.parametrize("dynamic_int8", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_same_bits_every_run(backend, dynamic_int8):
    packed, x = packed_on_gpu(1000, 2048, "int4", group_size=64), torch.randn(40, 2048, device="cuda", dtype=BF16)
    for M in (1, 16, 40):
        first, second = (quant_linear(x[:M], packed, dynamic_int8=dynamic_int8, impl=backend) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dynamic_int8", [False, True])
def test_nan_stays_in_its_row(dynamic_int8):
    packed, x = packed_on_gpu(40, 50, "int4", group_size=16), torch.randn(8, 50, device="cuda", dtype=BF16)
    x[2, 3] = torch.nan
    clean = [0, 1, 3, 4, 5, 6, 7]
    for backend in ("cuda", "triton"):
        got = quant_linear(x, packed, dynamic_int8=dynamic_int8, impl=backend)
        assert got[2].isnan().all() and got[clean].isfinite().all()


def test_the_choice_is_explained():
    x = torch.randn(2, 40, device="cuda", dtype=BF16)
    plain, nf4 = packed_on_gpu(6, 40, "int4"), packed_on_gpu(6, 40, "nf4")
    assert explain("quant_linear", x, plain).chosen == "cuda"
    assert explain("quant_linear", x, nf4).chosen == explain("quant_linear", x.float(), plain).chosen == "triton"
    assert "no codebooks" in explain("quant_linear", x, nf4).reasons["cuda"]
    with pytest.raises(ValueError, match="no codebooks"):
        quant_linear(x, nf4, impl="cuda")


def test_a_weight_moves_between_devices():
    packed = pack(torch.randn(70, 200), "int3", group_size=48, symmetric=False)
    there = packed.to("cuda")
    for name, t in there.to("cpu").tensors().items():
        assert torch.equal(t, packed.tensors()[name])
    x = torch.randn(5, 200)
    for impl in ("triton", "reference"):
        torch.testing.assert_close(
            quant_linear(x.cuda(), there, impl=impl).cpu(), quant_linear(x, packed), rtol=1e-5, atol=1e-4
        )


def test_codes_written_to_are_reordered_again():
    """As load_state_dict() does."""
    first, second = packed_on_gpu(64, 128, "int4"), packed_on_gpu(64, 128, "int4")
    x = torch.randn(2, 128, device="cuda", dtype=F16)
    quant_linear(x, first, impl="cuda")
    for name, t in first.tensors().items():
        t.copy_(second.tensors()[name])
    assert torch.equal(quant_linear(x, first, impl="cuda"), quant_linear(x, second, impl="cuda"))
