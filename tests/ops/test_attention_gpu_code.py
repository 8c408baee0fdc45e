"""attention's CUDA kernels in the emulator and its Triton kernels in the interpreter, against float64."""

from __future__ import annotations

import attention_gpu_suite as suite
import gpu_code
import pytest
import torch
from attention_suite import qkv

from mlcore.ops import attention
from mlcore.ops._attention_device import on_device
from mlcore.ops._attention_schedule import schedule
from mlcore.patterns import Causal, GlobalTokens, Window

OP = "attention"

if gpu_code.INTERPRETING:

    @pytest.mark.parametrize("case", suite.INTERPRETED, ids=str)
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
        suite.check_unseen_keys(gpu_code.interpreted(OP))

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


test_interpreted = gpu_code.interpreted_by_triton(__file__)


@pytest.fixture
def kernels():
    if gpu_code.emulator.compiler() is None:
        pytest.skip("the emulator needs Linux and a C++ compiler")
    return suite.emulated()


@pytest.mark.parametrize("case", suite.CASES, ids=str)
def test_emulated(kernels, case):
    suite.check(kernels, case)


def test_emulated_unseen_keys_may_hold_anything(kernels):
    for dtype in (suite.F32, suite.BF16):
        suite.check_unseen_keys(kernels, dtype=dtype)


def test_emulated_bits_do_not_depend_on_the_order_of_threads(kernels):
    libraries = [gpu_code.emulator.load(f"kernels/{OP}/{name}.cu") for name in ("attention", "attention_bwd")]
    case = suite.Case(
        (1, 2, 1, 70, 90, 24, 24), suite.BF16, Causal(), density=0.9, mask_shape=(70, 90), bias=(1, 1, 1, 90), relative=(1, 2)
    )
    outputs = []
    for seed in range(3):
        for library in libraries:
            library.set_seed(seed)
        outputs.append(suite.check(kernels, case))
    for name, first in outputs[0].items():
        assert all(torch.equal(first, other[name]) for other in outputs[1:]), name


@pytest.mark.parametrize(
    "change, text",
    [
        ({"q": torch.zeros(1, 2, 3, 300), "k": torch.zeros(1, 1, 5, 300)}, "head dims must be 1 to 256; got D 300, Dv 8"),
        ({"q": torch.zeros(1, 2, 3, 8).double()}, "attention: q must be float32, bfloat16, float16; got float64"),
        ({"k": torch.zeros(1, 1, 5, 7)}, r"attention: k must be \(B, Hkv, Tk, D\) = \(1, 1, 5, 8\); got \(1, 1, 5, 7\)"),
        ({"v": torch.zeros(1, 1, 8, 5).mT}, "attention: v must be contiguous in its last dimension; got stride 5"),
        ({"q": torch.zeros(1, 3, 3, 8), **dict.fromkeys("kv", torch.zeros(1, 2, 5, 8))}, "k has 2 heads, which must divide"),
        ({"bias": torch.zeros(1, 2, 3, 4)}, r"attention: bias must be \(B\|1, H\|1, Tq\|1, Tk\|1\)"),
        ({"relative": torch.zeros(1, 1, 6)}, "attention: relative must be"),
        ({"sinks": torch.zeros(3)}, r"attention: sinks must be \(H\) = \(2\); got \(3\)"),
        ({"row_ptr": torch.zeros(2, dtype=torch.int64)}, r"row_ptr must be \(sets \* .* \+ 1\) = \(3\)"),
        ({"dropout_p": 1.5}, r"attention: dropout_p must be in \[0, 1\]; got 1.5"),
        ({"o": torch.zeros(1, 2, 3, 7)}, r"attention: o must be \(B, H, Tq, Dv\) = \(1, 2, 3, 8\); got \(1, 2, 3, 7\)"),
    ],
)  # fmt: skip
def test_emulated_errors(kernels, change, text):
    args = {"q": torch.zeros(1, 2, 3, 8), "k": torch.zeros(1, 1, 5, 8), "v": torch.zeros(1, 1, 5, 8)}
    args |= dict.fromkeys(("bias", "relative", "sinks")) | {"left": -1, "right": -1, "offset": 0}
    args |= dict.fromkeys(("row_ptr", "cols", "ids", "bits")) | {"set_b": 1, "set_h": 1, "scale": 0.3, "softcap": 0.0}
    args |= {"dropout_p": 0.0, "seed": 0, "o": torch.zeros(1, 2, 3, 8), "lse": None} | change
    with pytest.raises(ValueError, match=text):
        kernels[0](*args.values())


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
