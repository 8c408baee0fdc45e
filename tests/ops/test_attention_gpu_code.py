"""attention's Triton kernels in the interpreter, against float64."""

from __future__ import annotations

import attention_gpu_suite as suite
import gpu_code
import pytest
import torch
from attention_gpu_suite import BF16
from attention_suite import qkv

from mlcore.ops import attention
from mlcore.ops._attention_device import on_device
from mlcore.ops._attention_schedule import schedule
from mlcore.patterns import Causal, GlobalTokens, Window

OP = "attention"

if gpu_code.INTERPRETING:

    @pytest.mark.parametrize("case", [c for c in suite.CASES if c.dtype != BF16], ids=str)
    def test_interpreted_kernels(case):
        suite.check(gpu_code.interpreted(OP), case)

    def test_interpreted_public_function():
        """Through registration, autograd and the schedule's cache, with torch's own formula."""
        leaves = [t.requires_grad_() for t in qkv((1, 2, 1, 70, 90, 16, 24)).values()]
        results = []
        for impl in ("triton", "cpu"):
            torch.manual_seed(3)
            o, lse = attention(
                *leaves, pattern=Causal() & (Window(20, 0) | GlobalTokens(3)), dropout_p=0.1, return_lse=True, impl=impl
            )
            results.append((o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_interpreted_unseen_keys_may_hold_anything():
        _check_unseen_keys("triton")

    @pytest.mark.parametrize("shape", [(0, 2, 2, 5, 7, 8, 8), (2, 2, 2, 0, 7, 8, 8), (2, 2, 2, 5, 0, 8, 8)], ids=str)
    def test_interpreted_empty_dimensions(shape):
        leaves = [t.requires_grad_() for t in qkv(shape).values()]
        o, lse = attention(*leaves, return_lse=True, impl="triton")
        assert (o == 0).all() and (lse == float("-inf")).all()
        assert all((g == 0).all() for g in torch.autograd.grad(o.sum(), leaves))

    def test_interpreted_list_must_be_both_ways():
        q, k, v = qkv((1, 1, 1, 70, 70, 16, 16)).values()
        made = schedule("('columns', 3, 0)", (), 1, 1, 70, 70)
        with pytest.raises(ValueError, match="attention: row_ptr must have 5 elements"):
            gpu_code.interpreted(OP)[0](q, k, v, None, None, None, *made, 0.2, 0.0, 0.0, 0, torch.empty_like(q), None)


@pytest.mark.skipif(gpu_code.INTERPRETING, reason="this is the process that it starts")
def test_interpreted():
    pytest.importorskip("triton", reason="triton is not installed")
    gpu_code.run_interpreted(__file__)


def _check_unseen_keys(impl):
    """NaN and infinities in keys and values reach only the queries that see them, forward and backward."""
    tensors = qkv((1, 1, 1, 70, 90, 16, 16))
    dirty = {n: t.clone() for n, t in tensors.items()}
    dirty["k"][:, :, 88] = dirty["v"][:, :, 88] = float("nan")  # the last two queries see it
    dirty["v"][:, :, 89] = float("inf")

    def run(given):
        leaves = [t.clone().requires_grad_() for t in given.values()]
        o = attention(*leaves, causal=True, impl=impl)
        return o.detach(), *torch.autograd.grad(o.sum(), leaves)

    clean, spoilt = run(tensors), run(dirty)
    assert torch.equal(spoilt[0][:, :, :-2], clean[0][:, :, :-2]) and spoilt[0][:, :, -2:].isnan().all()
    assert torch.equal(spoilt[1][:, :, :-2], clean[1][:, :, :-2])
    infinite = {**tensors, "v": dirty["v"].nan_to_num(nan=0.0, posinf=float("inf"))}
    o = run(infinite)[0]
    assert o[:, :, :-1].isfinite().all() and (o[:, :, -1] == float("inf")).all()


def test_schedule_on_device_lists_pairs_both_ways():
    """Tiles outside of the band are dropped, and what is left comes by query tiles and by key tiles, with the same masks."""
    mask = torch.rand(2, 1, 300, 400) < 0.01
    mask[:, :, 64:128, :192] = True
    Tq, Tk, tensors = 300, 400, (mask,)
    s = schedule("('and', ('dense',), ('band', 100, 20, 1))", tensors, 2, 4, Tq, Tk)
    made = on_device(s, Tq, Tk, torch.device("cpu"))
    assert on_device(s, Tq, Tk, torch.device("cpu")) is made
    q_tiles, k_tiles, sets = 5, 7, 2
    assert made.row_ptr.numel() == sets * (q_tiles + k_tiles) + 1 and made.cols.numel() == made.ids.numel()

    def pairs(first, rows, turned):
        found = set()
        for row in range(rows * sets):
            begin, end = made.row_ptr[first + row], made.row_ptr[first + row + 1]
            others = made.cols[begin:end].tolist()
            assert others == sorted(others)
            for other, tile in zip(others, made.ids[begin:end].tolist()):
                a, b = row % rows, other
                found.add((row // rows, *((b, a) if turned else (a, b)), tile))
        return found

    by_query = pairs(0, q_tiles, False)
    assert by_query == pairs(sets * q_tiles, k_tiles, True)
    listed = {
        (r // q_tiles, r % q_tiles, int(s.cols[e]), int(s.ids[e]))
        for r in range(sets * q_tiles)
        for e in range(s.row_ptr[r], s.row_ptr[r + 1])
    }
    band = {
        (x, i, j)
        for x in range(sets)
        for i in range(q_tiles)
        for j in range(k_tiles)
        if -100 - 63 <= (j - i) * 64 - 100 <= 20 + 63
    }
    assert by_query == {p for p in listed if p[:3] in band} and len(by_query) < len(listed)
