"""What tests of attention's GPU kernels share: cases of the public function with everything that kernels are asked for, and the
comparison of outputs and gradients with float64. The emulator's and the interpreter's tests and tests/gpu run them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_code import emulator

from mlcore import testing
from mlcore.kernels.attention import attention_ref
from mlcore.ops._attention_device import on_device
from mlcore.ops._attention_schedule import schedule
from mlcore.patterns import Causal, Documents, GlobalTokens, Pattern, Strided, Window, dense

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = "('and',)"


@dataclass(frozen=True)
class Case:
    """One call: (B, H, Hkv, Tq, Tk, D, Dv), the pattern, and which arguments are given."""

    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    pattern: Pattern | None = None
    density: float = 0.0  # of a random boolean mask that stands beside the pattern; 0 is none
    mask_shape: tuple[int, ...] = ()
    bias: tuple[int, ...] = ()
    bias_dtype: torch.dtype | None = None
    relative: tuple[int, int] = ()
    sinks: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    d_lse: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        given = [
            "" if self.pattern is None else str(self.pattern),
            f"mask{self.mask_shape}" * bool(self.density),
            f"bias{self.bias}" * bool(self.bias),
        ]
        given += [f"relative{self.relative}" * bool(self.relative), "sinks" * self.sinks, f"softcap{self.softcap}"]
        given += [f"dropout{self.dropout_p}", self.layout * (self.layout != "contiguous")]
        name = "x".join(map(str, self.shape)) + " " + str(self.dtype)[6:] + " " + " ".join(g for g in given if g)
        return name.replace(" softcap0.0", "").replace(" dropout0.0", "")


SMALL = (1, 2, 1, 70, 90, 40, 33)
CASES = [
    Case((1, 1, 1, 1, 1, 1, 1)),
    Case((2, 2, 2, 1, 139, 32, 32)),
    Case((1, 2, 1, 3, 199, 40, 59), F16, Causal()),
    Case((1, 2, 2, 139, 1, 16, 8)),
    Case(SMALL, BF16, Causal()),
    Case((1, 2, 1, 113, 140, 80, 96), F16, Causal("top_left"), layout="transposed"),
    Case((1, 1, 1, 70, 65, 111, 128), BF16),
    Case((1, 1, 1, 40, 70, 256, 256), F16),
    Case((1, 1, 1, 40, 70, 200, 256), F32, Causal()),
    Case((1, 1, 1, 150, 200, 64, 64), BF16, Window(20, 5), layout="expanded"),
    Case((1, 1, 1, 130, 130, 24, 16), F32, Causal() & Window(30, 0), layout="sliced"),
    Case((1, 1, 1, 200, 230, 32, 64), F16, Strided(7) & Causal()),
    Case((1, 1, 1, 130, 130, 32, 32), F32, Documents(torch.tensor([0, 5, 5, 90, 130])) & Causal()),
    Case((1, 1, 1, 200, 200, 16, 16), BF16, GlobalTokens(2) | Window(10, 10)),
    Case(SMALL, F32, Causal(), density=0.5, mask_shape=(1, 2, 70, 90)),
    Case((2, 2, 2, 150, 131, 16, 16), F16, density=0.5, mask_shape=(2, 1, 1, 131)),
    Case((2, 2, 1, 40, 70, 16, 16), F32, bias=(1, 1, 40, 70)),
    Case(SMALL, F16, Causal(), bias=(1, 2, 70, 90)),
    Case(SMALL, F32, density=0.8, mask_shape=(1, 1, 70, 90), bias=(1, 1, 1, 90), bias_dtype=F16),
    Case((2, 2, 1, 40, 70, 16, 16), F32, Causal(), relative=(1, 2), sinks=True),
    Case((2, 2, 1, 150, 90, 16, 16), F16, Window(40, 30), relative=(2, 2), softcap=2.5),
    Case((1, 2, 1, 40, 70, 16, 16), F32, Causal(), dropout_p=0.3, softcap=2.5, bias=(1, 2, 40, 70), sinks=True),
    Case((2, 2, 1, 70, 131, 16, 16), BF16, dropout_p=0.2, d_lse=False),
    Case((1, 1, 1, 20, 30, 16, 16), F32, dropout_p=1.0),
]


# The interpreter computes bfloat16 wrongly and takes about a second a tile of 64 x 64 and pass.
INTERPRETED = [c for c in CASES if c.dtype != BF16 and c.shape[0] * c.shape[1] * c.shape[3] * c.shape[4] <= 20000]


def emulated() -> tuple[Callable, Callable]:
    """The CUDA kernels in the emulator, through their C functions."""
    sources = {"fwd": "attention.cu", "bwd": "attention_bwd.cu"}
    libraries = {name: emulator.load(f"kernels/attention/{source}") for name, source in sources.items()}
    return tuple(lambda *a, n=n, lib=lib: lib.call(f"mlc_cuda_attention_{n}", *a, None) for n, lib in libraries.items())


def inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    """q, k, v, bias, relative, sinks, mask."""
    B, H, Hkv, Tq, Tk, D, Dv = case.shape
    torch.manual_seed(sum(case.shape))
    sizes = {"q": (B, H, Tq, D), "k": (B, Hkv, Tk, D), "v": (B, Hkv, Tk, Dv)}
    made = {n: testing.make_input(*size, dtype=case.dtype, layout=case.layout, device=device) for n, size in sizes.items()}
    for name, t in made.items():
        if t.stride(-1) != 1 and t.shape[-1] > 1:  # as the launcher does
            made[name] = t.contiguous()
    made["bias"] = torch.randn(case.bias, device=device).to(case.bias_dtype or case.dtype) if case.bias else None
    made["relative"] = torch.randn(*case.relative, Tq + Tk - 1, device=device) if case.relative else None
    made["sinks"] = torch.randn(H, device=device) if case.sinks else None
    made["mask"] = torch.rand(case.mask_shape) < case.density if case.density else None
    if made["mask"] is not None:
        made["mask"][..., -1:, : Tk - 1] = False  # tiles and rows that nobody sees
    return made


def seen_by(case: Case, mask) -> tuple[str, tuple, torch.Tensor | None]:
    """(spec, tensors, dense mask) of the case's pattern."""
    spec, tensors = (case.pattern.spec, case.pattern.tensors) if case.pattern is not None else (EVERYTHING, ())
    if mask is not None:
        spec, tensors = f"('and', ('dense',), {spec})", (mask, *tensors)
    Tq, Tk = case.shape[3:5]
    return spec, tensors, None if spec == EVERYTHING else dense(spec, tensors, Tq, Tk, torch.device("cpu"))


def unfused(given, seen, keep, case):
    """torch's formula in the tensors' own dtype, and lse."""
    q, k, v = (given[n] for n in ("q", "k", "v"))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    Tq, Tk = q.shape[2], k.shape[2]
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    if given["bias"] is not None:
        s = s + given["bias"].to(s.dtype)
    if given["relative"] is not None:
        at = torch.arange(Tk)[None] - torch.arange(Tq)[:, None] + Tq - 1
        s = s + given["relative"].to(s.dtype)[..., at.to(s.device)]
    if seen is not None:
        s = s.masked_fill(~seen, float("-inf"))
    if given["sinks"] is not None:
        s = torch.cat([s, given["sinks"].to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    some = (s != float("-inf")).any(-1, keepdim=True)
    p = torch.where(some, torch.softmax(torch.where(some, s, 0.0), -1), 0.0)[..., :Tk]
    if keep is not None:
        p = torch.where(keep, p / (1.0 - case.dropout_p), 0.0) if case.dropout_p < 1 else p * 0.0
    lse = torch.logsumexp(torch.where(some, s, 0.0), -1)
    return p @ v, torch.where(some.squeeze(-1), lse, float("-inf"))


def run(kernels: tuple[Callable, Callable], case: Case, device: str = "cpu", seed: int = -0x123456789ABCDEF):
    """(inputs, cotangents, results) of both passes through the kernels' own arguments; outputs are NaN before."""
    fwd, bwd = kernels
    given = inputs(case, device)
    q, k, v, bias, relative, sinks = (given[n] for n in ("q", "k", "v", "bias", "relative", "sinks"))
    B, H, _, Tq, Tk, D, Dv = case.shape
    spec, tensors, _ = seen_by(case, given["mask"])
    made = on_device(schedule(spec, tensors, B, H, Tq, Tk), Tq, Tk, torch.device(device))
    common = (q, k, v, bias, relative, sinks, *made, D**-0.5, case.softcap, case.dropout_p, seed)

    def blank(*shape, dtype=F32):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    o, lse = blank(B, Tq, H, Dv, dtype=case.dtype).transpose(1, 2), blank(2, B, H, Tq)
    fwd(*common, o, lse)
    d_o, d_lse = torch.randn_like(o), torch.randn(B, H, Tq, device=device) if case.d_lse else None
    grads = {n: torch.full_like(given[n], float("nan"), memory_format=torch.contiguous_format) for n in ("q", "k", "v")}
    grads["bias"] = torch.zeros(*bias.shape[:3], Tk, device=device) if bias is not None and bias.shape[3] == Tk else None
    grads["relative"] = torch.zeros(B, H, Tq + Tk - 1, device=device) if relative is not None else None
    if bwd is not None:
        bwd(*common, o, lse, d_o, d_lse, *grads.values(), torch.empty_like(lse[0]))
    return given, (d_o, d_lse), {"o": o, "lse": lse[0], "factor": lse[1], **{f"d{n}": g for n, g in grads.items()}}


def check(kernels: tuple[Callable, Callable], case: Case, device: str = "cpu", seed: int = -0x123456789ABCDEF) -> dict:
    """Runs both passes, compares with float64 by the tolerance rule, and returns what the kernels wrote."""
    given, (d_o, d_lse), got = run(kernels, case, device, seed)
    B, H, _, Tq, Tk, _, Dv = case.shape
    _, _, seen = seen_by(case, given["mask"])
    seen = seen if seen is None else seen.to(device)
    keep = attention_ref.dropout_keep((B, H, Tq, Tk), seed, case.dropout_p, device) if case.dropout_p else None
    names = [n for n in ("q", "k", "v", "bias", "relative") if given[n] is not None]

    def evaluate(cast, lse_cast):
        leaves = {n: None if t is None else cast(t).detach() for n, t in given.items() if n != "mask"}
        for n in names:
            leaves[n].requires_grad_()
        o, lse = unfused(leaves, seen, keep, case)
        exact = unfused({n: t if t is None else lse_cast(t) for n, t in leaves.items()}, seen, keep, case)[1]
        total = (o * d_o.to(o.dtype)).sum()
        if d_lse is not None:
            total = total + torch.where(lse == float("-inf"), 0.0, lse * d_lse.to(lse.dtype)).sum()
        grads = torch.autograd.grad(total, [leaves[n] for n in names])
        return {"o": o, "lse": exact, **{f"d{n}": g for n, g in zip(names, grads)}}

    truth = evaluate(torch.Tensor.double, torch.Tensor.double)
    math = evaluate(lambda t: t, lambda t: t.float())
    dp = 3 * Dv**0.5  # what cancels in ds, as attention_suite says
    size = 1.0 + float(truth["lse"].detach().nan_to_num(neginf=0.0).abs().amax())
    terms = {"o": 1.0, "lse": size, "dq": 5 * dp, "dk": 5 * dp, "dv": 1.0, "dbias": 4 * dp, "drelative": 16 * dp}
    if got["drelative"] is not None:
        got["drelative"] = got["drelative"].sum_to_size(given["relative"].shape)
    for name, want in truth.items():
        result = got[name]
        if not name.startswith("d") or case.shape[4] > 0:
            result = result.to(math[name].dtype)
            testing.assert_close_to_reference(result, math[name], want, grad=name[0] == "d", terms=terms[name], what=name)
    return {n: t for n, t in got.items() if t is not None}


def check_unseen_keys(kernels: tuple[Callable, Callable], device: str = "cpu", dtype: torch.dtype = F32) -> None:
    """NaN and infinities in keys and values reach only the queries that see them, forward and backward, and no other bit."""
    torch.manual_seed(1)
    q, k, v, d_o = (torch.randn(1, 1, n, 16, device=device).to(dtype) for n in (70, 90, 90, 70))
    dirty_k, dirty_v, infinite = k.clone(), v.clone(), v.clone()
    dirty_k[:, :, 88] = dirty_v[:, :, 88] = float("nan")  # causally the last two queries see it
    dirty_v[:, :, 89] = infinite[:, :, 89] = float("inf")

    def both(k, v):
        o, dq, dk, dv = (torch.empty_like(t) for t in (q, q, k, v))
        lse = torch.empty(2, 1, 1, 70, device=device)
        common = (q, k, v, None, None, None, -1, 0, 20, None, None, None, None, 1, 1, 0.25, 0.0, 0.0, 0)
        kernels[0](*common, o, lse)
        kernels[1](*common, o, lse, torch.where(o.isfinite(), d_o, 0), None, dq, dk, dv, None, None, torch.empty_like(lse[0]))
        return o[0, 0], dq[0, 0]

    clean, spoilt = both(k, v), both(dirty_k, dirty_v)
    assert torch.equal(spoilt[0][:-2], clean[0][:-2]) and spoilt[0][-2:].isnan().all()
    assert torch.equal(spoilt[1][:-2], clean[1][:-2])
    o, _ = both(k, infinite)
    assert torch.equal(o[:-1], clean[0][:-1]) and (o[-1] == float("inf")).all()
