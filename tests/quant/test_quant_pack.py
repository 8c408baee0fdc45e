"""mlcore.quant: packing is lossless for codes and as good as its format allows for weights; bad input is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcore._quant_report import sqnr_db
from mlcore.quant import NF4, PackedWeight, pack, pack_codes, pack_gptq, pack_mse, unpack


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40), st.integers(0, 150), st.integers(1, 8), st.integers(1, 160), st.booleans(), st.integers(0, 2**31))
def test_codes_come_back(N, K, bits, group, with_zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator)
    groups = -(-K // min(group, max(K, 1)))
    scales = torch.randn(N, groups, generator=generator)
    zeros = torch.randint(0, 2**bits, (N, groups), generator=generator) if with_zeros else None
    packed = pack_codes(codes, scales, bits=bits, group_size=group, zeros=zeros)
    got_codes, got_scales, got_zeros = unpack(packed)
    assert torch.equal(got_codes, codes.byte()) and torch.equal(got_scales, scales)
    assert got_zeros is None if zeros is None else torch.equal(got_zeros, zeros.byte())
    if N:
        rows = torch.randint(0, N, (5,), generator=generator)
        assert torch.equal(packed.rows(rows), packed.dequantize()[rows])


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_of_the_bits(bits):
    packed = pack(torch.randn(64, 256), f"int{bits}", group_size=64)
    assert packed.codes.nbytes == 64 * 256 * bits // 8
    assert packed.nbytes == packed.codes.nbytes + 64 * 4 * 4


# Gaussian weights, groups of 32; measured with seed 0 and rounded down to a whole dB.
@pytest.mark.parametrize(
    "format, symmetric, least",
    [("int8", True, 43), ("int8", False, 43), ("int5", True, 26), ("int4", True, 20), ("int4", False, 20), ("int3", True, 14),
     ("int2", True, 6), ("ternary", True, 6), ("nf4", True, 20), ("codebook", True, 19)],
)  # fmt: skip
def test_quality(format, symmetric, least):
    weight = torch.randn(64, 512)
    assert sqnr_db(weight, pack(weight, format, group_size=32, symmetric=symmetric).dequantize()) > least


def test_what_a_format_can_say_is_said_exactly():
    torch.manual_seed(1)
    ternary = torch.randint(-1, 2, (9, 50)).float() * 0.25
    assert torch.equal(pack(ternary, "ternary").dequantize(), ternary)
    few = torch.tensor([-3.0, 0.25, 7.0, 8.5])[torch.randint(0, 4, (9, 50))]
    assert torch.equal(pack(few, "codebook", entries=4).dequantize(), few)
    table = torch.tensor(NF4)[torch.randint(0, 16, (9, 50))]
    table[:, 0] = 1
    assert torch.equal(pack(table, "nf4").dequantize(), table)
    assert torch.equal(pack(torch.zeros(3, 8), "int4", group_size=4).dequantize(), torch.zeros(3, 8))


@pytest.mark.parametrize("format", ["int4", "int8", "ternary", "nf4", "codebook"])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty(format, shape):
    packed = pack(torch.randn(shape), format, group_size=4)
    assert packed.dequantize().shape == shape


def test_copies_and_devices():
    packed = pack(torch.randn(20, 30), "int4", group_size=8, symmetric=False)
    twin = copy.deepcopy(packed)
    assert twin.codes is not packed.codes and torch.equal(twin.dequantize(), packed.dequantize())
    assert packed.to("cpu").numbers() == packed.numbers()
    assert packed.to("meta").codes.is_meta


W, ZERO = torch.randn(6, 40), torch.zeros(2, 8).int()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pack(W, "int9"), "format must be 'int1' to 'int8'"),
        (lambda: pack(W, group_size=0), "group_size must be at least 1; got 0"),
        (lambda: pack(W, group_size=-3), "group_size must be at least 1; got -3"),
        (lambda: pack(W[0]), r"weight must be floating, \(N, K\)"),
        (lambda: pack(W.int()), r"weight must be floating, \(N, K\)"),
        (lambda: pack(W / 0), "weight must be finite"),
        (lambda: pack(W, "int4", entries=4), "belong to format 'codebook'"),
        (lambda: pack(W, "codebook", entries=257), "entries must be 2 to 256; got 257"),
        (lambda: pack(W, "codebook", tables=7), "tables must be 1 to N = 6; got 7"),
        (lambda: pack_codes(torch.full((2, 8), 16), torch.ones(2, 1), bits=4, group_size=8), "codes must be 0 to 15"),
        (lambda: pack_codes(ZERO, torch.ones(2, 2), bits=4, group_size=8), r"scales must be \(N, G\) = \(2, 1\)"),
        (lambda: pack_codes(ZERO, torch.full((2, 1), math.nan), bits=4, group_size=8), "scales must be finite"),
        (lambda: pack_codes(ZERO, torch.ones(2, 1), bits=4, group_size=0), "group_size must be at least 1"),
        (lambda: pack_codes(torch.zeros(2, 8), torch.ones(2, 1), bits=4, group_size=8), "codes must be integers"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": (7, 41)}, "codes must be"),
        ({"shape": (-1, 4)}, r"shape must be \(N, K\)"),
        ({"bits": 5}, "codes must be"),
        ({"bits": 0}, "bits must be 1 to 8; got 0"),
        ({"group_size": 17}, "codes must be|scales must be"),
        ({"offset": 16}, "offset must be a code"),
        ({"format": "float"}, "format must be one of"),
        ({"format": "codebook"}, ".* contradict"),
        ({"layout": "rows"}, "layout must be one of"),
    ],
)
def test_contradictions(change, message):
    good = pack(W, "int4", group_size=16)
    parts = {name: getattr(good, name) for name in ("codes", "scales", "zeros", "codebook")} | good.numbers()
    PackedWeight(**parts)
    with pytest.raises(ValueError, match=f"PackedWeight: ({message})"):
        PackedWeight(**(parts | change))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_loses_less_than_rounding(bits, symmetric):
    weight = torch.randn(20, 200)
    plain, best = (p(weight, f"int{bits}", group_size=33, symmetric=symmetric) for p in (pack, pack_mse))
    assert sqnr_db(weight, best.dequantize()) > sqnr_db(weight, plain.dequantize())


@pytest.mark.parametrize("group", [None, 32, 13])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_at_the_output(symmetric, group):
    weight, x = torch.randn(20, 96), torch.randn(300, 12) @ torch.randn(12, 96) + 0.1 * torch.randn(300, 96)
    plain = pack(weight, "int4", group_size=group, symmetric=symmetric)
    gptq = pack_gptq(weight, x.T @ x, "int4", group_size=group, symmetric=symmetric)
    lost, kept = (((p.dequantize() - weight) @ x.T).square().mean() for p in (plain, gptq))
    assert kept < 0.5 * lost


def test_gptq_without_correlations_is_rounding_by_mse():
    weight = torch.randn(9, 64)
    gptq, mse = pack_gptq(weight, torch.eye(64), group_size=16), pack_mse(weight, group_size=16)
    assert torch.equal(gptq.dequantize(), mse.dequantize())
    assert pack_gptq(weight, torch.zeros(64, 64)).shape == (9, 64)
    with pytest.raises(ValueError, match=r"hessian must be finite, \(64, 64\)"):
        pack_gptq(weight, torch.eye(63))
    with pytest.raises(ValueError, match="pack_mse: weight must be floating and finite"):
        pack_mse(weight / 0)
