"""What tests of decoding's GPU kernels share: calls of attention_with_kvcache with everything that it takes, compared with
float64. The emulator's and the interpreter's tests and tests/gpu run them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from attention_gpu_suite import BF16, F16, F32, unfused
from gpu_code import emulator

from mlcore import _registry, testing
from mlcore.ops import _attention_decode, attention_with_kvcache

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One call: (H, Hkv, Tq, D, Dv), the keys that each sequence holds in the end, and which arguments are given."""

    shape: tuple[int, int, int, int, int]
    lengths: tuple[int, ...]
    dtype: torch.dtype = F32
    page: int | None = None
    int8: bool = False
    added: int = 0  # of the keys, this many are appended by the call
    starts: tuple[int, ...] | None = None
    window: tuple[int | None, int | None] | None = None
    causal: bool = True
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    layout: str = "heads"  # of contiguous caches: "heads" (B, Hkv, S, D), "tokens" (B, S, Hkv, D), "odd": no row is aligned

    def __str__(self) -> str:
        given = {n: getattr(self, n) for n in ("page", "int8", "added", "starts", "window", "softcap", "alibi", "sinks")}
        parts = [f"{n}{'' if v is True else v}" for n, v in given.items() if v]
        parts += ["seen both ways"] * (not self.causal) + [self.layout] * (self.layout != "heads")
        return f"{self.shape} {self.lengths} {str(self.dtype)[6:]} {' '.join(parts)}".replace(", ", ",")


CASES = [
    Case((1, 1, 1, 1, 1), (1,)),
    Case((4, 2, 1, 24, 16), (0, 31, 149), added=0),
    Case((8, 1, 1, 64, 64), (600, 257, 256), BF16, page=16, added=1),
    Case((4, 2, 5, 59, 111), (239, 5), F16, page=1, added=5),
    Case((4, 2, 5, 24, 40), (80, 3, 0), F16),
    Case((2, 2, 1, 32, 32), (700, 40), window=(40, None), added=1),
    Case((2, 1, 4, 32, 32), (800, 530), BF16, window=(300, 0), sinks=True, layout="tokens"),
    Case((4, 1, 16, 128, 80), (300,), BF16, page=128, added=16),
    Case((3, 1, 2, 256, 200), (530,)),
    Case((2, 2, 1, 256, 256), (270,), F16, layout="odd"),
    Case((8, 2, 3, 40, 56), (300, 70), BF16, page=7, int8=True, added=3),
    Case((2, 1, 1, 128, 128), (400,), F16, int8=True, added=1),
    Case((2, 1, 1, 33, 20), (130,), F32, int8=True, added=1, layout="odd"),
    Case((4, 4, 2, 16, 16), (300, 290), softcap=2.5, sinks=True, starts=(0, 289)),
    Case((4, 2, 3, 64, 64), (270, 1), F16, alibi=True, added=1),
    Case((2, 1, 7, 48, 48), (290, 100), causal=False, window=(20, 3), alibi=True, softcap=3.0),
    Case((2, 2, 2, 16, 16), (600, 530), F16, starts=(520, 100), page=32, causal=False),
]


# The interpreter computes bfloat16 wrongly.
INTERPRETED = [dataclasses.replace(c, dtype=F16) if c.dtype == BF16 else c for c in CASES]


@contextlib.contextmanager
def serving(backend: str) -> Iterator[None]:
    """Within the block attention_with_kvcache computes CPU tensors by its own launchers with the emulated CUDA kernels ("cuda")
    or the interpreted Triton kernels ("triton")."""
    if backend == "cuda":
        if emulator.compiler() is None:
            pytest.skip("the emulator needs Linux and a C++ compiler")
        lib = emulator.load("kernels/attention/attention_decode.cu")
        kernels = {n: functools.partial(_call, lib, f"mlc_cuda_attention_{n}") for n in ("decode", "append")}
    else:
        module = importlib.import_module("kernels.attention.attention_triton")
        kernels = {n: getattr(module, n) for n in ("decode", "append")}
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in kernels.items():
            patch.setitem(_registry._kernels, ("attention", name, backend), kernel)
        patch.setattr(_attention_decode, "choose", lambda op, impl, *_, **__: impl or backend)
        yield


def _call(lib: emulator.Library, name: str, *args) -> None:
    lib.call(name, *args, None)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 and their scales."""
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / torch.where(scale > 0, scale, 1.0)[..., None]).round().to(torch.int8), scale


def _laid_out(rows: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "tokens":
        return rows.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":
        return torch.nn.functional.pad(rows, (1, 2))[..., 1 : 1 + rows.shape[3]]
    return rows


def _paged(rows: torch.Tensor, table: torch.Tensor, page: int, blank) -> torch.Tensor:
    """The rows (B, Hkv, n * page, ...) on the table's pages."""
    pages = torch.full((table.numel() + 2, rows.shape[1], page, *rows.shape[3:]), blank, dtype=rows.dtype, device=rows.device)
    pages[table.to(rows.device)] = rows.unflatten(2, (-1, page)).transpose(1, 2)
    return pages


class Made:
    """A case's tensors: what attention_with_kvcache gets, and all keys and values as if they were contiguous."""

    def __init__(self, case: Case, device: str = "cpu"):
        torch.manual_seed(sum(case.lengths) + sum(case.shape))
        H, Hkv, Tq, D, Dv = case.shape
        B, longest = len(case.lengths), max(case.lengths)
        made = {n: torch.randn(B, *s, device=device) for n, s in (("q", (H, Tq, D)), ("k", (Hkv, longest, D)))}
        made["v"] = torch.randn(B, Hkv, longest, Dv, device=device)
        self.case, self.q = case, made["q"].to(case.dtype)
        self.total = torch.tensor(case.lengths)
        self.before = self.total - case.added
        room = longest + 9 if case.page is None else -(-longest // case.page) * case.page
        pages = torch.randperm(B * room // (case.page or room)).view(B, -1)
        self.options = {"window": case.window, "causal": case.causal, "return_lse": True}
        self.caches, self.rows, self.new = [], [], []
        at = torch.arange(longest, device=device)
        for name in ("k", "v"):
            x = made[name].to(case.dtype)
            there = torch.stack([at < n for n in case.lengths])[:, None, :, None].to(device)
            seen = torch.stack([at < n for n in self.before.tolist()])[:, None, :, None].to(device)
            small, scale = quantised(x)
            self.rows.append(
                torch.where(there, small.float() * scale[..., None] if case.int8 else x, 0).to(
                    case.dtype if not case.int8 else F32
                )
            )
            index = torch.stack([torch.arange(n - case.added, n) for n in case.lengths]).to(device).clamp(min=0)
            self.new.append(torch.gather(x, 2, index[:, None, :, None].expand(-1, Hkv, -1, x.shape[3])))
            cache = torch.where(seen, small, 99) if case.int8 else torch.where(seen, x, NAN)
            grow = (0, 0, 0, room - longest)
            cache = torch.nn.functional.pad(cache, grow, value=99 if case.int8 else NAN)
            scale = torch.nn.functional.pad(torch.where(seen[..., 0], scale, NAN), (0, room - longest), value=NAN)
            if case.page is not None:
                cache = _paged(cache, pages, case.page, 99 if case.int8 else NAN)
                scale = _paged(scale[..., None], pages, case.page, NAN)[..., 0]
            self.caches.append(_laid_out(cache, case.layout))
            if case.int8:
                self.options[f"{name}_scale"] = scale
        if case.page is not None:
            self.options["page_table"] = pages
        if case.starts is not None:
            self.options["cache_starts"] = torch.tensor(case.starts)
        if case.softcap:
            self.options["softcap"] = case.softcap
        if case.alibi:
            self.options["alibi_slopes"] = torch.rand(B, H, device=device)
        if case.sinks:
            self.options["sinks"] = torch.randn(H, device=device)

    def call(self, **change) -> tuple[torch.Tensor, torch.Tensor]:
        new = self.new if self.case.added else (None, None)
        arguments = {"cache_seqlens": self.before, **self.options} | change
        return attention_with_kvcache(self.q, *self.caches, *new, **arguments)

    def seen(self) -> torch.Tensor:
        """(B, 1, Tq, T): who sees whom."""
        Tq, T = self.case.shape[2], self.rows[0].shape[2]
        position, j = (self.total - Tq)[:, None, None] + torch.arange(Tq)[:, None], torch.arange(T)
        left, right = self.case.window or (None, None)
        seen = (j < self.total[:, None, None]) & (position >= position)
        if self.case.causal:
            seen = seen & (j <= position)
        if left is not None:
            seen = seen & (j >= position - left)
        if right is not None:
            seen = seen & (j <= position + right)
        if self.case.starts is not None:
            seen = seen & (j >= self.options["cache_starts"][:, None, None])
        return seen[:, None].to(self.q.device)

    def want(self, dtype: torch.dtype | None, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse) by torch's formula in a dtype; None: that of q."""
        cast = (lambda t: t.to(dtype or self.case.dtype)) if dtype or not self.case.int8 else lambda t: t.to(self.case.dtype)
        given = {"q": cast(self.q), "k": cast(self.rows[0]), "v": cast(self.rows[1]), "relative": None, "bias": None}
        given["sinks"] = self.options.get("sinks")
        if self.case.alibi:
            Tq, T = self.case.shape[2], self.rows[0].shape[2]
            distance = (self.total - Tq)[:, None, None] + torch.arange(Tq)[:, None] - torch.arange(T)
            given["bias"] = -self.options["alibi_slopes"][..., None, None] * distance.abs()[:, None].to(self.q.device)
        return unfused(given, self.seen() if seen is None else seen, None, self.case)


def check(case: Case, device: str = "cpu", impl: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a case, compares it with float64 by the tolerance rule, and the appended rows bit for bit."""
    made = Made(case, device)
    where = [c.clone() for c in made.caches]
    o, lse = made.call(impl=impl)
    truth, math = made.want(torch.float64), made.want(None)
    exact = made.want(F32)[1] if case.dtype != F32 else math[1]
    testing.assert_close_to_reference(o, math[0], truth[0], terms=1.0, what="o")
    size = 1.0 + float(truth[1].nan_to_num(neginf=0.0).abs().amax())
    testing.assert_close_to_reference(lse, exact, truth[1], terms=size, what="lse")
    for name, cache, before, new in zip("kv", made.caches, where, made.new):
        if case.added:
            scale = made.options.get(f"{name}_scale")
            _check_appended(made, cache, before, new, scale)
    return o, lse


def _check_appended(made: Made, cache, before, new, scale):
    """The new rows stand where they belong, and nothing else has changed."""
    want, page = before.clone(), made.case.page
    small, factor = quantised(new)
    for b, n in enumerate(made.before.tolist()):
        for t in range(made.case.added):
            at = n + t
            if at < 0:
                continue
            where = (b, at) if page is None else (int(made.options["page_table"][b, at // page]), at % page)
            want[where[0], :, where[1]] = small[b, :, t] if scale is not None else new[b, :, t]
            if scale is not None:
                assert torch.equal(scale[where[0], :, where[1]], factor[b, :, t])
    assert torch.equal(cache.nan_to_num(7.0), want.nan_to_num(7.0))
