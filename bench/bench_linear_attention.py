"""Linear attention against plain torch: the chunked einsum form and, for the plain kind, a loop over tokens; against mlcore's
softmax attention; how it scales with threads at one head, and how time and memory grow with the length. Next:
kernels/linear_attention/README.md.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error

import mlcore
from mlcore.kernels.linear_attention import linear_attention_ref
from mlcore.ops import linear_attention

TOLERANCE = 1e-4  # whether all rows solve the same problem; tests/ops holds the numerics contract


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, int, int, int]  # (B, H, T, D)
    kind: str = "normalized"  # "normalized", "retention", "gate", "vector gate", "delta", "gated delta"
    backward: bool = False

    def __str__(self) -> str:
        return f"{'fwd+bwd' if self.backward else 'fwd'} ({','.join(map(str, self.shape))}) {self.kind}"

    def flops(self) -> float:
        """Multiplies and adds of the recurrence: state update and output, and twice that in backward for each."""
        B, H, T, D = self.shape
        return 4 * B * H * T * D * D * (3 if self.backward else 1)


FORWARD = [Problem((1, 8, 4096, 64))] + [
    Problem((1, 8, 4096, 64), kind) for kind in ("retention", "gate", "vector gate", "delta", "gated delta")
]
BACKWARD = [Problem((1, 8, 4096, 64), kind, backward=True) for kind in ("normalized", "gate", "vector gate", "gated delta")]


def inputs(problem: Problem) -> tuple[list[torch.Tensor], dict, torch.Tensor]:
    """([q, k, v], the variant's arguments, d_o), standard normal; keys of length 1 with the delta rule."""
    generator = torch.Generator().manual_seed(0)
    B, H, T, _ = problem.shape
    q, k, v, d_o = (torch.randn(problem.shape, generator=generator) for _ in range(4))
    kwargs = {"feature_map": "elu", "normalize": True} if problem.kind == "normalized" else {
        "feature_map": None, "normalize": False
    }  # fmt: skip
    if problem.kind == "retention":
        kwargs["decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(H).float())))
    if problem.kind in ("gate", "gated delta"):
        kwargs["gate"] = F.logsigmoid(torch.randn(B, H, T, generator=generator) + 3)
    if problem.kind == "vector gate":
        kwargs["gate"] = F.logsigmoid(torch.randn(problem.shape, generator=generator) + 3)
    if "delta" in problem.kind:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        kwargs["beta"] = torch.rand(B, H, T, generator=generator)
    return [q, k, v], kwargs, d_o


def chunked(q, k, v, *, feature_map, normalize, decay=None, gate=None, beta=None):
    if decay is not None:
        gate = decay.view(1, -1, 1).expand(q.shape[:3])
    chunk = 16 if gate is not None and gate.dim() == 4 else 64  # with vector gates chunk^2 D numbers are made: 64 is slower
    return linear_attention_ref.chunked(q, k, v, gate, beta, None, feature_map, normalize, chunk)[0]


def token_loop(q, k, v, *, feature_map, normalize):
    """As CPU loops over tokens do it: every token updates the state by an outer product and reads it, all heads at once."""
    q, k = linear_attention_ref.feature_map(q, feature_map), linear_attention_ref.feature_map(k, feature_map)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    o = torch.empty_like(v)
    for t in range(q.shape[2]):
        state.addcmul_(k[:, :, t, :, None], v[:, :, t, None, :])
        torch.matmul(q[:, :, t, None], state, out=o[:, :, t : t + 1])
    return o / (q * k.cumsum(2)).sum(-1, keepdim=True)


@functools.cache
def compiled_loop():
    """recurrence_loop.c, built for this machine; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source, library = Path(__file__).parent / "recurrence_loop.c", Path(tempfile.mkdtemp()) / "recurrence_loop.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True)
    return ctypes.CDLL(str(library)).recurrence_loop


def native_loop(q, k, v, *, feature_map, normalize):
    """The same token by token in C, a head a thread; numerators there, denominators in torch."""
    q, k = linear_attention_ref.feature_map(q, feature_map), linear_attention_ref.feature_map(k, feature_map)
    B, H, T, D = q.shape
    o = torch.empty_like(v)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, o)]
    compiled_loop()(*pointers, *(ctypes.c_long(n) for n in (B * H, T, D, v.shape[3])))
    return o / (q * k.cumsum(2)).sum(-1, keepdim=True)


def call_of(fn, tensors, kwargs, d_o, backward):
    if not backward:

        def forward():
            with torch.no_grad():
                return [fn(*tensors, **kwargs)]

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]

    def forward_backward():
        o = fn(*leaves, **kwargs)
        return [o, *torch.autograd.grad(o, leaves, d_o)]

    return forward_backward


def checker(want):
    def check(row, got):
        error = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        assert error < TOLERANCE, f"{row}: relative error {error:.1e} against float64"
        return error

    return check


def truth(problem, tensors, kwargs, d_o):
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
    return [t.detach() for t in call_of(chunked, [t.double() for t in tensors], wide, d_o.double(), problem.backward)()]


def rows_of(problem: Problem) -> list[str]:
    if problem.kind != "normalized" or problem.backward:
        return ["mlcore", "torch chunked"]
    return ["mlcore", "torch chunked", "loop over tokens", *(["loop over tokens in C"] if compiled_loop() else [])]


def make_group(problem: Problem) -> Group:
    tensors, kwargs, d_o = inputs(problem)
    functions = {"mlcore": linear_attention, "torch chunked": chunked}
    functions |= {"loop over tokens": token_loop, "loop over tokens in C": native_loop}
    calls = {row: call_of(functions[row], tensors, kwargs, d_o, problem.backward) for row in rows_of(problem)}
    return Group(calls, checker(truth(problem, tensors, kwargs, d_o)), flops=problem.flops())


CASES = [(p, r) for p in FORWARD + BACKWARD for r in rows_of(p)]


@pytest.mark.parametrize(("problem", "row"), CASES, ids=[f"{p}-{r}" for p, r in CASES])
def test_linear_attention(race, problem, row):
    race(f"linear_attention float32 {problem}", row, lambda: make_group(problem))


def make_softmax_group() -> Group:
    """Another function of the same inputs: each row is checked against its own truth elsewhere, here only for being finite."""
    tensors, kwargs, _ = inputs(Problem((1, 8, 8192, 64)))

    def check(row, got):
        assert got[0].isfinite().all(), row
        return 0.0

    def softmax(q, k, v):
        return mlcore.ops.attention(q, k, v, causal=True)

    rows = {
        "mlcore": call_of(linear_attention, tensors, kwargs, None, False),
        "mlcore softmax attention": call_of(softmax, tensors, {}, None, False),
    }
    return Group(rows, check)


@pytest.mark.parametrize("row", ["mlcore", "mlcore softmax attention"])
def test_against_softmax(race, row):
    race("linear_attention float32 fwd (1,8,8192,64) against softmax", row, make_softmax_group)


LENGTHS = (4096, 8192, 16384, 32768, 65536)


# A process of its own, as the peak of one's memory never falls: what a forward and backward add to it beside the inputs.
PEAK = """
import resource, sys, torch
from mlcore.ops import linear_attention
def run(T):
    q, k, v, d_o = (torch.randn(1, 2, T, 64) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(linear_attention(*leaves), leaves, d_o)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
run(64)
print(run(int(sys.argv[1])) / 1024)
"""


def peak_megabytes(T: int) -> float:
    return float(subprocess.run([sys.executable, "-c", PEAK, str(T)], check=True, capture_output=True, text=True).stdout)


def make_length_group() -> Group:
    """One row a length: seconds should double from row to row, and so should the memory of a forward and backward."""
    calls, wants = {}, {}
    for T in LENGTHS:
        problem = Problem((1, 2, T, 64))
        tensors, kwargs, d_o = inputs(problem)
        calls[f"mlcore, T = {T}"] = call_of(linear_attention, tensors, kwargs, d_o, False)
        wants[f"mlcore, T = {T}"] = truth(problem, tensors, kwargs, d_o)
    extra = {f"mlcore, T = {T}": {"peak_megabytes": peak_megabytes(T)} for T in LENGTHS[::2]}
    return Group(calls, lambda row, got: checker(wants[row])(row, got), extra=extra)


@pytest.mark.parametrize("row", [f"mlcore, T = {T}" for T in LENGTHS])
def test_lengths(race, row):
    race("linear_attention float32 fwd (1,2,T,64) normalized", row, make_length_group)


def make_scaling_group(backward: bool) -> Group:
    problem = Problem((1, 1, 4096, 64), backward=backward)
    tensors, kwargs, d_o = inputs(problem)
    everyone = torch.get_num_threads()
    calls, before, extra = {}, {}, {}
    for threads in (1, everyone):
        row = f"mlcore, {'1 thread' if threads == 1 else 'all threads'}"
        calls[row] = call_of(linear_attention, tensors, kwargs, d_o, backward)
        before[row] = functools.partial(torch.set_num_threads, threads)
        extra[row] = {"impl": "mlcore", "threads": threads}
    checked = checker(truth(problem, tensors, kwargs, d_o))

    def check(row, got):
        torch.set_num_threads(everyone)
        return checked(row, got)

    return Group(calls, check, flops=problem.flops(), before=before, extra=extra)


@pytest.mark.parametrize("row", ["mlcore, 1 thread", "mlcore, all threads"])
@pytest.mark.parametrize("backward", [False, True])
def test_threads(race, row, backward):
    """One head, one sequence: the parallelism must be found inside."""
    threads = torch.get_num_threads()
    try:
        name = f"scaling linear_attention {'fwd+bwd' if backward else 'fwd'} float32 (1,1,4096,64)"
        race(name, row, functools.partial(make_scaling_group, backward))
    finally:
        torch.set_num_threads(threads)


def make_step_group() -> Group:
    """A decoding step behind prompts of different lengths costs the same."""
    calls = {}
    for T in (64, 65536):
        tensors, kwargs, _ = inputs(Problem((1, 8, T, 64)))
        _, state = linear_attention(*tensors, **kwargs, return_state=True)
        q, k, v = (t[:, :, -1] for t in tensors)
        calls[f"mlcore, after {T} tokens"] = functools.partial(mlcore.ops.linear_attention_step, q, k, v, state)

    def check(row, got):
        assert all(t.isfinite().all() for t in got), row
        return 0.0

    return Group(calls, check)


@pytest.mark.parametrize("row", ["mlcore, after 64 tokens", "mlcore, after 65536 tokens"])
def test_step(race, row):
    race("linear_attention float32 step (1,8,1,64)", row, make_step_group)
