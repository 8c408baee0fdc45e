"""attention_with_kvcache's CUDA kernels in the emulator and its Triton kernels in the interpreter, against float64 and against
each other."""

from __future__ import annotations

import functools
import importlib

import attention_decode_gpu_suite as suite
import gpu_code
import pytest
import torch
from attention_decode_gpu_suite import Case, Made
from gpu_code import BF16, F16, F32
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mlcore import _registry
from mlcore.ops import _attention_decode, attention_with_kvcache

BACKEND = "triton" if gpu_code.INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def served():
    with suite.serving(BACKEND):
        yield


@pytest.fixture
def lib():
    return gpu_code.emulator.load("kernels/attention/attention_decode.cu")


@pytest.fixture
def kernels():
    return [_registry.kernel("attention", name, BACKEND) for name in ("decode", "append")]


test_interpreted = gpu_code.interpreted_by_triton(__file__)


@pytest.mark.parametrize("case", suite.INTERPRETED if gpu_code.INTERPRETING else suite.CASES, ids=str)
def test_emulated_or_interpreted_case(case):
    suite.check(case)


def attend(q, k, v, lengths, **options):
    return attention_with_kvcache(q, k, v, cache_seqlens=lengths, return_lse=True, **options)


@pytest.mark.parametrize("dtype", [F16] if gpu_code.INTERPRETING else [F32, BF16], ids=str)
@pytest.mark.parametrize("window", [(300, None)] if gpu_code.INTERPRETING else [None, (300, None)], ids=str)
def test_emulated_or_interpreted_a_row_has_the_same_bits_in_any_call(dtype, window):
    """Alone or in a batch, in a chunk or token by token, in pages, in a longer cache."""
    T, lengths = 620, torch.tensor([620, 33])
    q, k, v = (torch.randn(2, h, n, 40).to(dtype) for h, n in ((4, 3), (2, T), (2, T)))
    slopes = torch.rand(4)
    options = {"window": window, "alibi_slopes": slopes}
    want = attend(q, k, v, lengths, **options)
    for b in range(2):
        got = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], lengths[b : b + 1], **options)
        assert all(torch.equal(a[0], w[b]) for a, w in zip(got, want))
    for t in range(3):
        got = attend(q[:, :, t : t + 1], k, v, lengths - 2 + t, **options)
        assert all(torch.equal(a[:, :, 0], w[:, :, t]) for a, w in zip(got, want))
    table = torch.randperm(2 * 31).view(2, 31)
    pages = [suite._paged(t, table, 20, float("nan")) for t in (k, v)]
    longer = [torch.nn.functional.pad(t, (0, 0, 0, 700), value=float("nan")) for t in (k, v)]
    for caches, more in ((pages, {"page_table": table}), (longer, {})):
        got = attend(q, *caches, lengths, **options, **more)
        assert all(torch.equal(a, w) for a, w in zip(got, want))
    one_head = attend(q[:, 2:], k[:, 1:], v[:, 1:], lengths, **{**options, "alibi_slopes": slopes[2:]})
    assert all(torch.equal(a, w[:, 2:]) for a, w in zip(one_head, want))


def test_emulated_or_interpreted_parts_are_added_by_their_own_numbers():
    """With a first part that the second of two queries doesn't see, and so many that chains have several."""
    q, k, v = (torch.randn(1, 1, n, 8) for n in (2, 2600, 2600))
    both, alone = (attend(x, k, v, 2600, window=(2343, None)) for x in (q, q[:, :, 1:]))
    assert all(torch.equal(a[:, :, 1], b[:, :, 0]) for a, b in zip(both, alone))


def test_bits_do_not_depend_on_the_order_of_threads(lib):
    case = Case((4, 2, 2, 40, 24), (300, 40), BF16, page=8, int8=True, added=1, sinks=True)
    outputs = []
    for seed in range(3):
        lib.set_seed(seed)
        outputs.append(suite.check(case))
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_emulated_or_interpreted_unseen_values_reach_nobody(dtype):
    """Of three queries the last alone sees infinities and NaN."""
    q, k, v = (torch.randn(1, 1, n, 16).to(dtype) for n in (3, 90, 90))
    clean = attend(q, k, v, 90)[0]
    k[:, :, 89], v[:, :, 89] = float("nan"), float("inf")
    spoilt = attend(q, k, v, 90)[0]
    assert torch.equal(spoilt[:, :, :2], clean[:, :, :2]) and spoilt[:, :, 2].isnan().all()
    k[:, :, 89] = 1.0
    assert (attend(q, k, v, 90)[0][:, :, 2] == float("inf")).all()


@pytest.mark.parametrize("dtype", [F32, F16] if gpu_code.INTERPRETING else [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_emulated_or_interpreted_appended_rows_are_those_of_the_cpu(dtype, int8):
    k, v = torch.randn(2, 3, 4, 33).to(dtype), torch.randn(2, 3, 4, 8).to(dtype)
    k[0, 1, 2] = 0
    table, after = torch.tensor([[5, 1], [0, 3]]), []
    for impl in ("cpu", BACKEND):
        caches = [torch.zeros(6, 3, 5, n, dtype=torch.int8 if int8 else dtype) for n in (33, 8)]
        caches += [torch.zeros(6, 3, 5) if int8 else None for _ in range(2)]
        _attention_decode._append_launch(k, v, table, torch.tensor([7, 4]), *caches, impl)
        after.append([c for c in caches if c is not None])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*after))


def decode(kernels, q, k, v, table, lengths, starts=None, parts=4):
    o, lse = torch.full((*q.shape[:3], v.shape[3]), float("nan")), torch.full(q.shape[:3], float("nan"))
    scratch = torch.full((*lse.shape, parts, v.shape[3] + 2), float("nan"))
    args = (q, k, v, None, None, table, lengths, starts, None, None, -1, 0, 0.25, 0.0, o, lse, scratch)
    kernels[0](*args)
    return o, lse


def test_emulated_or_interpreted_what_lies_on_the_device_stays_within_the_cache(kernels):
    """Lengths, starts and pages that the host could not check."""
    q, k, v = torch.randn(4, 2, 1, 16), torch.randn(40, 2, 8, 16), torch.randn(40, 2, 8, 16)
    table = torch.randperm(40).view(4, 10)
    far = 1 << 40
    lengths, starts = torch.tensor([far, -far, 80, 1000]), torch.tensor([-far, 0, far, 77])
    got = decode(kernels, q, k, v, table, lengths, starts)
    want = attend(
        q, k, v, torch.tensor([80, 0, 80, 80]), cache_starts=torch.tensor([0, 0, 80, 77]), page_table=table, scale=0.25
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and (want[1][1:3] == float("-inf")).all()
    lengths, broken = torch.tensor([80, 80, 5, 16]), table.clone()
    broken[0, 3], broken[1, 0], broken[1, 9], broken[2, 0], broken[3, 5] = 40, -1, far, -far, -9
    o, lse = decode(kernels, q, k, v, broken, lengths)
    for b, n in enumerate(lengths.tolist()):
        at = torch.arange(n)
        page = broken[b, at // 8]
        at, page = at[(page >= 0) & (page < 40)] % 8, page[(page >= 0) & (page < 40)]
        keys, values = (t[page, :, at].transpose(0, 1).double() for t in (k, v))
        scores = q[b].double() @ keys.mT * 0.25
        torch.testing.assert_close(o[b].double(), scores.softmax(-1) @ values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_emulated_or_interpreted_new_keys_without_a_place_are_not_written(kernels):
    k, v = torch.randn(4, 1, 2, 8), torch.randn(4, 1, 2, 8)
    caches = [torch.zeros(6, 1, 4, 8) for _ in range(2)]
    table = torch.tensor([[0, 1], [2, -1], [3, 6], [4, 5]])
    kernels[1](k, v, table, torch.tensor([1, 5, 1 << 40, 9]), *caches, None, None)
    for new, cache in zip((k, v), caches):
        want = torch.zeros(6, 1, 4, 8)
        want[0, :, 0], want[2, :, 3], want[5, :, 3] = new[0, :, 1], new[1, :, 0], new[3, :, 0]
        assert torch.equal(cache, want)


@pytest.mark.skipif(gpu_code.INTERPRETING, reason="too many for the interpreter: the next test is its own")
def test_blocks_take_parts_in_turns(kernels):
    """More sequences than blocks: all but one are empty."""
    B = 9000
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    lengths = torch.zeros(B, dtype=torch.int64)
    lengths[B - 2] = 600
    got = decode(kernels, *(t.expand(B, -1, -1, -1) for t in (q, k, v)), None, lengths, parts=3)
    want = decode(kernels, q, k, v, None, torch.tensor([600]), parts=3)
    assert all(torch.equal(a[B - 2], b[0]) for a, b in zip(got, want))
    assert (got[0][: B - 2] == 0).all() and (got[1][: B - 2] == float("-inf")).all()


@pytest.mark.skipif(not gpu_code.INTERPRETING, reason="of Triton")
def test_interpreted_programs_take_parts_in_turns(monkeypatch):
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 600, 16), torch.randn(1, 2, 600, 16)
    want = attend(q, k, v, 600)
    monkeypatch.setattr(importlib.import_module("kernels.attention.attention_triton"), "_MOST_PROGRAMS", 4)
    got = attend(q, k, v, 600)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    ("left", "right", "causal", "longest", "parts"),
    [
        (None, None, True, 1, 1),
        (None, None, True, 256, 1),
        (None, None, True, 257, 2),
        (9, None, False, 900, 4),
        (0, 0, True, 900, 1),
        (1, None, True, 900, 2),
        (256, 7, True, 9000, 2),
        (257, None, True, 9000, 3),
        (100, 156, False, 9000, 2),
        (None, None, True, 0, 1),
    ],
)
def test_parts_cover_what_is_seen(left, right, causal, longest, parts):
    assert _attention_decode._parts(longest, 1, (left, right), causal) == parts
    if left is not None and longest:
        span = 1 + left + (0 if causal else right or 0)
        ends = range(max(span, longest - 600), longest + 1)
        most = max((end - 1) // 256 - (end - span) // 256 + 1 for end in ends)
        assert (right is None and not causal) or most <= parts


def test_nothing_waits_for_values_on_the_device():
    """Fake CUDA tensors have none to look at."""
    with FakeTensorMode():
        empty = functools.partial(torch.empty, device="cuda")
        q, k, new = empty(2, 4, 1, 64), empty(2, 2, 80, 64), empty(2, 2, 1, 64)
        lengths, table = empty(2, dtype=torch.int32), empty(2, 9, dtype=torch.int32)
        options = {"cache_starts": lengths, "window": (100, None), "alibi_slopes": empty(4), "return_lse": True}
        call = functools.partial(attention_with_kvcache, q, k, empty(2, 2, 80, 48), new, empty(2, 2, 1, 48), page_table=table)
        o, lse = call(cache_seqlens=lengths, **options)
        assert o.shape == (2, 4, 1, 48) and lse.shape == (2, 4, 1) and o.device == lse.device == q.device
        with pytest.raises(DataDependentOutputException):
            call(cache_seqlens=lengths, impl="reference")


def test_pages_that_the_host_knows_are_checked_before_anything_is_written():
    made = Made(Case((2, 1, 1, 8, 8), (40, 20), page=8, added=1, window=(3, None)))
    made.options["page_table"][1, 0] = 99  # the window has left it
    made.call()
    made.options["page_table"][1, 2] = 77
    before = [c.clone() for c in made.caches]
    with pytest.raises(ValueError, match=r"page_table must name pages below 12; got 77 at \(1, 2\)"):
        made.call()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, made.caches))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.zeros(1, 2, 3, 300), "k": torch.zeros(1, 1, 5, 300)}, "head dims must be 1 to 256; got D 300, Dv 8"),
        ({"q": torch.zeros(1, 2, 3, 8).double()}, "q must be float32, bfloat16, float16; got float64"),
        ({"k": torch.zeros(1, 1, 5, 7)}, r"k_cache must be \(pages, Hkv, P, D\) = \(1, 1, 5, 8\); got \(1, 1, 5, 7\)"),
        ({"v": torch.zeros(1, 1, 8, 5).mT}, "v_cache must be contiguous in its last dimension; got stride 5"),
        ({"k_scale": torch.zeros(1, 1, 5)}, "k_scale must be given with int8 caches, and only then"),
        ({"table": torch.zeros(2, 3).long()}, r"page_table must be \(B, n\) with B = 1; got \(2, 3\)"),
        ({"lengths": torch.zeros(1).int()}, "lengths must be int64; got int32"),
        ({"slopes": torch.zeros(1, 3)}, r"slopes must be \(B\|1, H\) of \(1, 2\); got \(1, 3\)"),
        ({"scratch": torch.zeros(1, 2, 3, 2, 8)}, r"scratch must be \(B, H, Tq, n, Dv \+ 2\) = \(1, 2, 3, 2, 10\)"),
        ({"scratch": torch.zeros(1, 2, 3, 0, 10)}, r"scratch must be of 1 to 2\^22 parts; got 0"),
    ],
)  # fmt: skip
def test_errors(lib, change, text):
    args = {"q": torch.zeros(1, 2, 3, 8), "k": torch.zeros(1, 1, 5, 8), "v": torch.zeros(1, 1, 5, 8)}
    args |= dict.fromkeys(("k_scale", "v_scale", "table")) | {"lengths": torch.tensor([5])}
    args |= dict.fromkeys(("starts", "slopes", "sinks")) | {"left": -1, "right": 0, "scale": 0.3, "softcap": 0.0}
    args |= {"o": torch.zeros(1, 2, 3, 8), "lse": None, "scratch": None} | change
    with pytest.raises(ValueError, match="attention_with_kvcache: " + text):
        lib.call("mlc_cuda_attention_decode", *args.values(), None)


@pytest.mark.parametrize("shape", [(0, 2, 2, 1, 8), (2, 2, 1, 0, 8), (2, 0, 0, 1, 8)], ids=str)
def test_emulated_or_interpreted_empty_dimensions(shape):
    B, H, Hkv, Tq, D = shape
    o, lse = attend(torch.zeros(B, H, Tq, D), *(torch.zeros(B, Hkv, 5, D) for _ in range(2)), 5)
    assert o.shape == (B, H, Tq, D) and lse.shape == (B, H, Tq)
