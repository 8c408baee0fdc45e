"""attention on a GPU: the CUDA and Triton kernels on the cases of the emulator and on long ones, and the public function."""

from __future__ import annotations

import attention_gpu_suite as suite
import gpu_code
import pytest
import torch
from attention_gpu_suite import BF16, F16, F32, Case

from mlcore.ops import attention
from mlcore.patterns import Causal, GlobalTokens, Window

BACKENDS = ["cuda", "triton"]
LARGE = [
    Case((2, 8, 2, 1024, 1024, 128, 128), BF16, Causal()),
    Case((1, 4, 4, 2048, 2000, 64, 64), F16, Window(255, 0)),
    Case((1, 2, 2, 1500, 1500, 64, 64), F32, Causal() & (Window(200, 0) | GlobalTokens(16))),
    Case((1, 2, 1, 700, 900, 256, 256), BF16, density=0.5, mask_shape=(1, 1, 700, 900)),
    Case((2, 4, 4, 600, 600, 80, 80), F16, bias=(1, 4, 600, 600), relative=(1, 4)),
]


@pytest.mark.parametrize("case", suite.CASES, ids=str)
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.sanitized), "triton"])
def test_kernels(backend, case):
    suite.check(gpu_code.on_gpu("attention", backend), case, "cuda")


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large(backend, case):
    suite.check(gpu_code.on_gpu("attention", backend), case, "cuda")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unseen_keys_may_hold_anything(backend, dtype):
    suite.check_unseen_keys(gpu_code.on_gpu("attention", backend), "cuda", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend):
    case = Case((2, 8, 2, 1000, 1000, 64, 64), BF16, Causal() & Window(300, 0), bias=(1, 8, 1, 1000), dropout_p=0.1)
    _, _, first = suite.run(gpu_code.on_gpu("attention", backend), case, "cuda")
    _, _, second = suite.run(gpu_code.on_gpu("attention", backend), case, "cuda")
    for name in ("o", "lse"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", [None, *BACKENDS])
def test_public_function(impl):
    leaves = [torch.randn(2, h, 300, 64, device="cuda", dtype=BF16, requires_grad=True) for h in (4, 2, 2)]
    mask = torch.rand(300, 300, device="cuda") < 0.7
    outputs = []
    for name, tensors in ((impl, leaves), ("reference", [t.detach().double().requires_grad_() for t in leaves])):
        o = attention(*tensors, pattern=mask, causal=True, impl=name)
        outputs.append((o, *torch.autograd.grad(o.float().square().sum(), tensors)))
    for got, want in zip(*outputs):
        torch.testing.assert_close(got.double(), want.double(), rtol=3e-2, atol=3e-2)  # two bfloat16 roundings
