"""Which backend serves a call: what is usable here, the choice for given tensors, and the reasons (explain, show_config).

The rows come from kernels/kernels.inc through _C.table(). Nothing here computes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import _C

BACKENDS = ("cpu", "cuda", "triton", "reference")

#: op -> backend -> the dtypes that its kernels take.
SUPPORT: dict[str, dict[str, frozenset[torch.dtype]]] = {}
for _op, _pass, _backend, _dtypes in _C.table():
    SUPPORT.setdefault(_op, {})[_backend] = frozenset(getattr(torch, d) for d in _dtypes.split())

#: (op, backend) -> a rule over the call's main tensor and whether gradients are recorded: None where its kernels can serve the
#: call, else the reason. Set by op files.
RULES: dict[tuple[str, str], Callable[[torch.Tensor, bool], str | None]] = {}

#: The same over what follows the main tensor in the call (explain's further tensors).
REST_RULES: dict[tuple[str, str], Callable[..., str | None]] = {}


@functools.cache
def cuda_library():
    """The module that binds the CUDA kernels, or the reason (str) why there is none. Loaded on first use."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("mlcore._cuda") is None:
        return "this build has no CUDA kernels (built without a CUDA compiler, or with MLCORE_CUDA=OFF)"
    try:
        return importlib.import_module("mlcore._cuda")
    except ImportError as error:
        return f"the CUDA kernels failed to load: {error}"


@functools.cache
def unusable(backend: str) -> str | None:
    """None where the backend can run on this machine, else the reason."""
    if backend == "cuda":
        library = cuda_library()
        return library if isinstance(library, str) else None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not interpreting():
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def interpreting() -> bool:
    """True when Triton kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the backend serves this op on this device and dtype, else the reason."""
    if backend == "reference":
        return None
    dtypes = SUPPORT[op].get(backend)
    if dtypes is None:
        return f"{op} has no {backend} kernel"
    if (reason := unusable(backend)) is not None:
        return reason
    want = "cpu" if backend == "cpu" or (backend == "triton" and interpreting()) else "cuda"
    if device.type != want:
        return f"the tensors are on {device}, the {backend} kernels work on {want}"
    if dtype not in dtypes:
        return f"{dtype} is none of its dtypes: {', '.join(sorted(str(d) for d in dtypes))}"
    return None


def choose(op: str, impl: str | None, tensor: torch.Tensor, grad: bool = False, rest: tuple = ()) -> str:
    """The backend for a call whose main tensor is `tensor`. An explicit impl is taken or refused, never replaced."""
    if impl is not None:
        if impl not in BACKENDS:
            raise ValueError(f"{op}: impl must be one of {', '.join(BACKENDS)} or None; got {impl!r}")
        reason = _explicit(op, impl, tensor.device.type, tensor.dtype) or broken_rule(op, impl, tensor, grad, rest)
        if reason is not None:
            raise ValueError(f"{op}: impl={impl!r} can't serve this call: {reason}")
        return impl
    found = _automatic(op, tensor.device.type, tensor.dtype)
    ruled = (op, found) in RULES or (op, found) in REST_RULES
    if ruled and broken_rule(op, found, tensor, grad, rest) is not None:
        found = _next(op, found, tensor.device.type, tensor.dtype)
        if broken_rule(op, found, tensor, grad, rest) is not None:
            found = "reference"
    return found


def broken_rule(op: str, backend: str, tensor: torch.Tensor, grad: bool = False, rest: tuple = ()) -> str | None:
    """Why the backend's kernels can't serve a call with this main tensor, whose device and dtype they take; or None."""
    rule, rest_rule = RULES.get((op, backend)), REST_RULES.get((op, backend))
    reason = None if rule is None else rule(tensor, grad)
    return rest_rule(*rest) if reason is None and rest and rest_rule is not None else reason


@torch.compiler.assume_constant_result
def _explicit(op: str, impl: str, device: str, dtype: torch.dtype) -> str | None:
    return refusal(op, impl, torch.device(device), dtype)


@torch.compiler.assume_constant_result
def _automatic(op: str, device: str, dtype: torch.dtype) -> str:
    found = _chosen.get((op, device, dtype))
    if found is None:
        found = _chosen[op, device, dtype] = next(_usable(op, device, dtype))
    return found


@torch.compiler.assume_constant_result
def _next(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """The choice after `backend`, whose rule refuses the call."""
    usable = list(_usable(op, device, dtype))
    return usable[usable.index(backend) + 1]


def _usable(op: str, device: str, dtype: torch.dtype) -> Iterator[str]:
    order = ("cuda", "triton", "reference") if device == "cuda" else ("cpu", "reference")
    return (b for b in order if refusal(op, b, torch.device(device), dtype) is None)


_chosen: dict[tuple[str, str, torch.dtype], str] = {}


@dataclass(frozen=True)
class Explanation:
    """What mlcore.explain returns: the chosen backend and, for each other one, why it isn't it."""

    op: str
    chosen: str
    reasons: dict[str, str]
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.note}".rstrip()]
        for backend in BACKENDS:
            name = f"cpu[{_C.isa()}]" if backend == "cpu" else backend
            lines.append(f"  {name}: {'chosen' if backend == self.chosen else self.reasons[backend]}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: str, *tensors: torch.Tensor, impl: str | None = None, pattern=None) -> Explanation:
    """Says which backend would serve `op` for these tensors, and why the others would not.

    Args:
        op: an op's name, e.g. "attention".
        tensors: the op's tensors (quant_linear: x and its packed weight); the first decides by its device and dtype.
        impl: as the op's own argument.
        pattern: attention's pattern (mlcore.patterns), with q and k as tensors: how many of its tiles are computed.

    Raises:
        ValueError: an unknown op, no tensor, a pattern without q and k, or an impl that can't serve the call.
    """
    if op not in SUPPORT:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(SUPPORT))}; got {op!r}")
    if not tensors or not isinstance(tensors[0], torch.Tensor):
        raise ValueError(f"explain: give the tensors that {op} would get")
    if pattern is not None and (op != "attention" or len(tensors) < 2):
        raise ValueError(f"explain: pattern needs op 'attention' and tensors q, k; got {op!r} and {len(tensors)} tensors")
    main = tensors[0]
    chosen = choose(op, impl, main, main.requires_grad, tensors[1:])
    reasons = {}
    for backend in BACKENDS:
        if backend != chosen:
            reason = refusal(op, backend, main.device, main.dtype)
            reason = reason or broken_rule(op, backend, main, main.requires_grad, tensors[1:])
            reasons[backend] = reason or f"usable with impl={backend!r}"
    note = "" if pattern is None else importlib.import_module("mlcore.ops._attention_schedule").describe(pattern, *tensors[:2])
    return Explanation(op, chosen, reasons, note)


def config() -> list[tuple[str, str, str]]:
    """Rows (what, state, detail) about this installation and machine."""
    isa = _C.isa()
    detail = f"best here: {_C.best_isa()}" + (" (emulated)" if _C.avx512_is_emulated() else "")
    if os.environ.get("MLCORE_ISA"):
        detail += f"; MLCORE_ISA={os.environ['MLCORE_ISA']}"
    rows = [
        (
            "mlcore",
            importlib.import_module("mlcore").__version__,
            f"torch {torch.__version__}, Python {platform.python_version()}",
        ),
        ("cpu", f"usable: {isa}", detail),
        ("threads", str(_C.num_threads()), "torch.set_num_threads() governs them"),
    ]
    for backend in ("cuda", "triton"):
        reason = unusable(backend)
        rows.append((backend, "usable" if reason is None else "not usable", reason or ""))
    rows.append(("reference", "usable", "plain PyTorch, any device and floating dtype"))
    return rows


def show_config() -> None:
    """Prints what is usable on this machine and why the rest isn't, and the kernels of each op."""
    rows = config()
    widths = [max(len(r[i]) for r in rows) for i in range(2)]
    for what, state, detail in rows:
        print(f"{what:<{widths[0]}}  {state:<{widths[1]}}  {detail}".rstrip())
    print()
    passes: dict[str, dict[str, list[str]]] = {}
    for op, pass_name, backend, _ in _C.table():
        passes.setdefault(op, {}).setdefault(backend, []).append(pass_name)
    for op, backends in passes.items():
        parts = [f"{b} {'+'.join(p)}" for b, p in backends.items()]
        dtypes = sorted(str(d).removeprefix("torch.") for d in set().union(*SUPPORT[op].values()))
        print(f"{op}: {'; '.join(parts)}; {' '.join(dtypes)}")
