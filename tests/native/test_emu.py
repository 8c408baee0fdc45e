"""csrc/cuda/emu.h: every primitive computes what the GPU would, and what is undefined on a GPU is an error here."""

from __future__ import annotations

import emulator
import primitive_checks as checks
import pytest
import torch

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the emulator needs Linux and a C++ compiler")

SEEDS = range(6)
ATTENTION_ERROR = 1.6e-2  # two bfloat16 roundings: of the probabilities and of o
NOTHING, BARRIER_AFTER_LOAD, BARRIER_BEFORE_REFILL, WAIT = range(4)  # enum Break of flash_attention.cu


@pytest.fixture(scope="module")
def primitives():
    return emulator.load("tests/native/emu/primitives.cu")


@pytest.fixture(scope="module")
def faults():
    return emulator.load("tests/native/emu/faults.cu")


@pytest.fixture(scope="module")
def attention():
    return emulator.load("tests/native/emu/flash_attention.cu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_mma(primitives, dtype):
    checks.mma(primitives, dtype)


def test_mma_bits(primitives):
    checks.mma_bits(primitives)


def test_mma_tf32_rounding(primitives):
    checks.mma_tf32_rounding(primitives)


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(primitives, n, trans):
    checks.ldmatrix(primitives, n, trans)


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(primitives, size, left):
    copied, wanted = checks.cp_async(primitives, size, left)
    assert torch.equal(copied, wanted)


def test_cp_async_without_wait_shows_stale_data(primitives):
    copied, wanted = checks.cp_async(primitives, 16, -1)
    assert not torch.equal(copied, wanted)


def test_warp_functions(primitives):
    for seed in SEEDS:
        primitives.set_seed(seed)
        checks.warp(primitives)


def test_atomics_and_random_order(primitives):
    orders = []
    for seed in (1, 1, 2):
        primitives.set_seed(seed)
        orders.append(checks.atomics(primitives).tolist())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("threads", [64, 256, 1024])
def test_reduce(primitives, threads):
    checks.reduce(primitives, threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convert(primitives, dtype):
    checks.convert(primitives, dtype)


def test_attention_matches_sdpa(attention):
    for seed in SEEDS:
        attention.set_seed(seed)
        assert checks.attention(attention, 2, 129) < ATTENTION_ERROR
    assert checks.attention(attention, 1, 1) < ATTENTION_ERROR


@pytest.mark.parametrize("left_out", [BARRIER_AFTER_LOAD, BARRIER_BEFORE_REFILL, WAIT])
def test_attention_without_one_synchronisation_is_wrong(attention, left_out):
    errors = []
    for seed in SEEDS:
        attention.set_seed(seed)
        errors.append(checks.attention(attention, 1, 129, left_out))
    assert max(errors) > 10 * ATTENTION_ERROR


@pytest.mark.parametrize(
    "name, text",
    [
        ("divergent_barrier", "divergent barrier: thread .* is in __syncthreads .*faults.cu"),
        ("barrier_against_shuffle", "deadlock: thread .* waits in __s.*; thread .* waits in __s"),
        ("divergent_warp", "divergent warp: .*__(any|ballot)_sync"),
        ("shuffle_from_outside", "lane 0 shuffles from lane 16, which takes no part"),
        ("mask_without_self", r"lane \d+ is not in its own mask 0x00000001"),
        ("partial_mma", "mma needs all 32 lanes; got 0xfffffffe"),
        ("static_bounds", r"index \d+ is outside the array .*faults.cu"),
        ("dynamic_bounds", "wrote byte 128 of dynamic shared memory, which has 128"),
        ("misaligned", "misaligned"),
        ("copy_to_global", "cp_async: .* is not in shared memory"),
        ("trap", "trap"),
        ("out_of_bounds_write", "argument 1 was written outside its elements"),
        ("empty_grid", "invalid configuration"),
        ("large_block", "invalid configuration"),
        ("much_shared", "307200 bytes of shared memory"),
    ],
)
def test_fault(faults, name, text):
    out = torch.zeros(32, dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError), match=text):
        faults.call("test_case", name, out)
    faults.call("test_case", "barrier_after_return", out)  # the next launch is not affected
    assert out.eq(1).all()


def test_fault_names_kernel_block_and_thread(faults):
    with pytest.raises(RuntimeError, match=r"^emulated trap: block \(0,0,0\): thread \(0,0,0\): __trap\(\)$"):
        faults.call("test_case", "trap", torch.zeros(32, dtype=torch.int32))


def test_writes_between_the_elements_of_a_tensor_are_found(primitives):
    with pytest.raises(RuntimeError, match="argument 1 was written outside its elements"):
        primitives.call("test_warp", torch.zeros(32, dtype=torch.int32), torch.zeros(14, 64, dtype=torch.int32)[:, ::2], None)


def test_shared_memory_starts_poisoned_in_every_block(faults):
    out = torch.zeros(32, dtype=torch.int32)
    faults.call("test_case", "uninitialised", out)
    assert out.eq(-1).all()


def test_race_shows_in_some_order(faults):
    wrong = 0
    for seed in SEEDS:
        faults.set_seed(seed)
        out = torch.zeros(32, dtype=torch.int32)
        faults.call("test_case", "race", out)
        wrong += int(out.ne(7).any())
    assert wrong > 0


def test_portable_context_switch():
    """Other architectures than x86-64 use ucontext."""
    lib = emulator.load("tests/native/emu/primitives.cu", base_flags=("-DMLC_EMU_UCONTEXT",))
    checks.reduce(lib, 256)
    checks.warp(lib)
