"""attention_with_kvcache on a GPU: the CUDA and Triton kernels on the cases of the emulator and on long caches, and what they
don't wait for."""

from __future__ import annotations

import functools

import attention_decode_gpu_suite as suite
import pytest
import torch
from attention_decode_gpu_suite import BF16, F16, F32, Case, Made

from mlcore.ops import attention_with_kvcache

LARGE = [
    Case((32, 8, 1, 128, 128), (9000, 300, 4097, 1), BF16, page=16, added=1),
    Case((64, 1, 1, 128, 128), (5000, 2500), F16, added=1, layout="tokens"),
    Case((16, 16, 1, 64, 64), (40000,), BF16, int8=True, added=1, sinks=True),
    Case((8, 4, 8, 256, 256), (3000, 700), BF16, added=8, window=(1000, None)),
    Case((8, 2, 2, 80, 96), (6000, 5999), F32, page=64, alibi=True),
]
IMPLS = [pytest.param("cuda", marks=pytest.mark.sanitized), "triton", None]
BACKENDS = ["cuda", "triton"]


@pytest.mark.parametrize("case", suite.CASES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_kernels(impl, case):
    suite.check(case, "cuda", impl)


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("impl", BACKENDS)
def test_large(impl, case):
    suite.check(case, "cuda", impl)


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("impl", BACKENDS)
def test_what_lies_on_the_device_is_not_waited_for(impl, case):
    """The same bits as with lengths and pages on the CPU; a graph is captured, in which waiting is an error."""
    made = Made(case, "cuda")
    want = made.call(impl=impl)
    there = {n: made.options[n].cuda() for n in ("page_table", "cache_starts") if n in made.options}
    there["cache_seqlens"] = made.before.cuda()
    made.call(impl=impl, **there)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = made.call(impl=impl, **there)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("impl", BACKENDS)
def test_a_row_has_the_same_bits_in_any_call(impl, dtype):
    attend = functools.partial(attention_with_kvcache, impl=impl)
    q, k, v = (torch.randn(5, h, n, 64, device="cuda").to(dtype) for h, n in ((8, 3), (2, 3000), (2, 3000)))
    lengths = torch.tensor([3000, 3, 257, 1000, 2999], device="cuda")
    want = attend(q, k, v, cache_seqlens=lengths)
    for b in range(5):
        got = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], cache_seqlens=lengths[b : b + 1])
        assert torch.equal(got[0], want[b])
    for t in range(3):
        assert torch.equal(attend(q[:, :, t : t + 1], k, v, cache_seqlens=lengths - 2 + t)[:, :, 0], want[:, :, t])


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_device_values_stay_within_the_cache(impl):
    """compute-sanitizer is what looks here."""
    q, k, v = (torch.randn(2, 2, n, 64, device="cuda") for n in (1, 700, 700))
    table = torch.tensor([[0, 7, -3], [1, 1 << 40, 1]], device="cuda")
    for lengths in ([1 << 40, -5], [2100, 1000]):
        lengths = torch.tensor(lengths, device="cuda")
        o = attention_with_kvcache(q, k, v, q, q, cache_seqlens=lengths, page_table=table, impl=impl)
        assert o.isfinite().all()
