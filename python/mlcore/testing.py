"""Tools to test an operator against float64, on every implementation that this machine has, and as a citizen of torch.

mlcore's own tests use them; so can a project that adds an op or wants to know how exact one is on its machine. The tolerance
table stands here and nowhere else. Start at check_numerics, check_op and check_public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from . import _C
from ._backend import BACKENDS, SUPPORT, interpreting, unusable

FORWARD_FACTOR = 1.5
GRADIENT_FACTOR = 2.0


@dataclass(frozen=True)
class Tol:
    """What is granted on top of torch's error, in unit roundoffs u of the dtype.

    peak * u * max|truth|: one element may be that much luckier in torch's result than in ours. With N elements this moves the
    root mean square by peak * u * max|truth| / sqrt(N); rms * u * RMS(truth) comes on top, for chance that all elements share.
    """

    peak: float
    rms: float
    reason: str


TOLERANCE = {
    torch.float32: Tol(4.0, 1.0, "sums in another order; a row's elements share the rounding of its statistics"),
    torch.bfloat16: Tol(
        2.0, 0.1, "one rounding of a float32 number, which may fall on the other side: one unit in the last place"
    ),
    torch.float16: Tol(2.0, 0.1, "as bfloat16"),
}


def assert_close_to_reference(
    got: torch.Tensor,
    math: torch.Tensor,
    truth: torch.Tensor,
    *,
    what: str = "result",
    grad: bool = False,
    terms: float = 0.0,
) -> None:
    """Asserts that got's error against truth is at most 1.5 (a gradient: 2) times that of torch's own result, math.

    Two errors are compared, each with the factor: the root mean square over all elements, which a systematic loss of accuracy
    moves and chance hardly does, and the largest, which one wrong element moves. With few elements (one row, one weight)
    chance may leave math exact, and a multiple of nothing would fail a result that is as good as its dtype allows: what the
    dtype's row of TOLERANCE grants is added to both limits. It is a few roundings of the largest element for one element and
    vanishes from the RMS as elements grow more, so that it hides no mistake, and it is relative to the tensor at hand, so that
    it hides none in a tensor of small numbers.

    A float64 truth is no more exact than a float64 result: that is compared within 1e-9, which finds mistakes; gradcheck does
    the rest.

    Args:
        got, math: our result and torch's, of one dtype and shape, from the same inputs.
        truth: the result in float64 from these inputs, widened.
        what: what the error calls the result.
        grad: use the gradients' factor.
        terms: magnitude of the numbers that cancel in the result, where they are larger than the result itself; four float32
            roundings of it are granted too. 0 is none.
    """
    if got.dtype != math.dtype:
        raise AssertionError(f"{what}: dtype is {got.dtype}, torch's is {math.dtype}")
    if not got.shape == math.shape == truth.shape:
        raise AssertionError(f"{what}: shape is {tuple(got.shape)}, torch's {tuple(math.shape)}, truth's {tuple(truth.shape)}")
    if got.numel() == 0:
        return
    got, truth, math = (t.detach() for t in (got, truth, math))
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda text: f"{what}: {text}")
        return
    expected = truth.to(got.dtype)
    usual = expected.isfinite()  # elsewhere overflow, infinity or NaN is the right answer
    torch.testing.assert_close(
        torch.where(usual, torch.zeros_like(got), got),
        torch.where(usual, torch.zeros_like(got), expected),
        rtol=0.0,
        atol=0.0,
        equal_nan=True,
        msg=lambda text: f"{what}: infinities or NaNs differ from the truth's\n{text}",
    )
    wide = torch.where(usual, truth.double(), 0.0)
    error = torch.where(usual, got.double() - wide, 0.0)
    if not error.isfinite().all():
        wrong = int((~error.isfinite()).sum())
        raise AssertionError(f"{what}: {wrong} of {error.numel()} elements are not finite where the truth is")
    other = (math.double() - wide).where(usual & math.isfinite(), torch.zeros_like(wide))

    info, row = torch.finfo(got.dtype), TOLERANCE[got.dtype]
    roundoff, subnormal = info.eps / 2, info.smallest_normal * info.eps
    cancelled = 4 * torch.finfo(torch.float32).eps / 2 * terms
    factor = GRADIENT_FACTOR if grad else FORWARD_FACTOR
    luck = row.peak * roundoff * _peak(wide) + cancelled + subnormal
    shared = row.rms * roundoff * _rms(wide) + cancelled
    for kind, measure, granted in (("RMS", _rms, luck / got.numel() ** 0.5 + shared), ("largest", _peak, luck)):
        limit = factor * measure(other) + granted
        if measure(error) > limit:
            at = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
            raise AssertionError(
                f"{what} ({got.dtype}, {tuple(got.shape)}): {kind} error {measure(error):.3e} exceeds {limit:.3e}, which is "
                f"{factor} x torch's {measure(other):.3e} + {granted:.3e} granted; worst at {at}: "
                f"got {got[at].item():.9g}, torch {math[at].item():.9g}, truth {wide[at].item():.9g}"
            )


def _rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()


def _peak(t: torch.Tensor) -> float:
    return t.abs().max().item()


def check_numerics(
    fn: Callable,
    reference: Callable,
    math: Callable,
    inputs: Mapping[str, torch.Tensor | None],
    *,
    through: Sequence[int] | None = None,
    gradients: bool = True,
    terms: Mapping[str, float] | None = None,
) -> None:
    """Runs fn, and compares its outputs and its gradients for every floating input by assert_close_to_reference.

    Args:
        fn, math: called with inputs by name; a tensor or a tuple of tensors. math is torch's own way in the same dtypes.
        reference: called with the inputs widened to float64.
        through: numbers of the outputs that the gradient comes through; None is all.
        gradients: False compares outputs alone.
        terms: for an output's number ("0", "1") or an input's name (its gradient), assert_close_to_reference's terms.
    """
    terms = terms or {}
    wide = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}
    seeds: list[torch.Tensor] = []
    want, want_grads = _evaluate(math, inputs, through, gradients, seeds)
    truth, truth_grads = _evaluate(reference, wide, through, gradients, seeds)
    got, got_grads = _evaluate(fn, inputs, through, gradients, seeds)
    if len(got) != len(want):
        raise AssertionError(f"{len(got)} outputs, torch's way has {len(want)}")
    for i, (g, t, m) in enumerate(zip(got, truth, want)):
        assert_close_to_reference(g, m, t, terms=terms.get(str(i), 0.0), what=f"output {i}")
    for name, m in want_grads.items():
        g, t = got_grads[name], truth_grads[name]
        if (g is None) != (m is None):
            raise AssertionError(f"gradient of {name}: {'missing' if g is None else 'given'}, torch's is not")
        if g is not None:
            assert_close_to_reference(g, m, t, grad=True, terms=terms.get(name, 0.0), what=f"gradient of {name}")


def _evaluate(fn, inputs, through, gradients, seeds):
    """fn's outputs and gradients for the fixed output gradients `seeds`, which the first call draws."""
    leaves = {n: t.detach() if t is not None else None for n, t in inputs.items()}
    wanted = [n for n, t in leaves.items() if t is not None and t.is_floating_point()] if gradients else []
    for n in wanted:
        leaves[n].requires_grad_()
    out = fn(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    if not wanted:
        return out, {}
    if not seeds:
        seeds.extend(torch.randn(o.shape, device=o.device).to(o.dtype) for o in out)
    used = [i for i in (range(len(out)) if through is None else through) if out[i].requires_grad]
    grads = torch.autograd.grad(
        [out[i] for i in used], [leaves[n] for n in wanted], [seeds[i].to(out[i].dtype) for i in used], allow_unused=True
    )
    return out, dict(zip(wanted, grads))


LAYOUTS = ("contiguous", "sliced", "strided", "transposed", "expanded")


def make_input(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str | torch.device = "cpu",
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Normal random numbers in one of the memory layouts that users hand to an op.

    "sliced": part of a wider last dimension, at an odd offset. "strided": every second element of the last dimension.
    "transposed": the first dimension is the fastest. "expanded": the first dimension has stride 0.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"make_input: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(size, device=device) * std + mean).to(dtype)

    if not shape or layout == "contiguous":
        return draw(*shape)
    *lead, last = shape
    if layout == "sliced":
        return draw(*lead, last + 3)[..., 1 : 1 + last]
    if layout == "strided":
        return draw(*lead, 2 * last)[..., ::2]
    if layout == "transposed":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    return draw(1, *shape[1:]).expand(shape)


_ISAS = ("scalar", "avx2", "avx512")


def available(op: str, device: str | None = None) -> list[str]:
    """The implementations of op that this machine can run: "cpu[scalar]", "cpu[avx2]", ..., "cuda", "triton", "reference".

    device: only those for tensors on such a device ("cpu", "cuda").
    """
    names = []
    for backend in BACKENDS:
        if backend == "reference":
            names.append(backend)
        elif backend in SUPPORT[op] and unusable(backend) is None:
            levels = _ISAS[: _ISAS.index(_C.best_isa()) + 1]
            names += [f"cpu[{isa}]" for isa in levels] if backend == "cpu" else [backend]
    return [name for name in names if device in (None, device_of(name).type)]


def ways(op: str, extension: str) -> list[str]:
    """available(op, "cpu") but the reference, and "cpu[avx512] without <extension>", what machines without it run."""
    levels = [name for name in available(op, "cpu") if name.startswith("cpu")]
    return levels + [f"{name} without {extension}" for name in levels if "avx512" in name]


def dtypes_of(op: str, name: str) -> list[torch.dtype]:
    """The floating dtypes that an implementation of available(op) takes, widest first."""
    backend = name.split("[")[0]
    order = [torch.float64, *TOLERANCE]
    served = frozenset(order) if backend == "reference" else SUPPORT[op][backend]
    if backend == "triton" and interpreting():
        served = served - {torch.bfloat16}  # Triton's interpreter computes bfloat16 wrongly
    return [d for d in order if d in served]


def cases(op: str, device: str | None = None) -> list[tuple[str, torch.dtype]]:
    """Every (implementation, dtype) of op here, for tensors on `device`: the first axis of a test matrix."""
    return [(name, dtype) for name in available(op, device) for dtype in dtypes_of(op, name)]


def device_of(name: str) -> torch.device:
    """Where an implementation of available(op) wants its tensors."""
    on_cuda = name == "cuda" or (name == "triton" and not interpreting())
    return torch.device("cuda" if on_cuda else "cpu")


@contextlib.contextmanager
def use(name: str) -> Iterator[str]:
    """Runs the block with an implementation of available() or ways(): forces its ISA level, and gives what to pass as impl=."""
    name, _, forbidden = name.partition(" without ")
    backend, _, level = name.rstrip("]").partition("[")
    if forbidden:
        _C.allow(forbidden, False)
    try:
        with isa(level) if level else contextlib.nullcontext():
            yield backend
    finally:
        if forbidden:
            _C.allow(forbidden, True)


@contextlib.contextmanager
def isa(level: str) -> Iterator[None]:
    """Forces the ISA level ("scalar", "avx2", "avx512") of the CPU kernels within the block. One thread at a time."""
    before = _C.isa()
    _C.set_isa(level)
    try:
        yield
    finally:
        _C.set_isa(before)


def check_op(handle: torch._ops.OpOverload, args: Sequence) -> None:
    """Checks a registered op with example arguments: torch.library.opcheck, and that the fake's outputs have the real strides.

    Gradients belong to the public function (check_public): the op itself gets detached tensors.
    """
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(handle, args)
    real = handle(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = handle(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    for i, (r, f) in enumerate(zip(_tuple(real), _tuple(fake), strict=True)):
        for what in ("shape", "dtype", "device"):
            if getattr(r, what) != getattr(f, what):
                raise AssertionError(f"{handle}: output {i} has {what} {getattr(r, what)}, its fake {getattr(f, what)}")
        if r.stride() != f.stride():
            raise AssertionError(f"{handle}: output {i} has strides {r.stride()}, its fake {f.stride()}")


def check_public(fn: Callable, args: Sequence, *others: Sequence, export: bool = True) -> None:
    """Checks that fn compiles as one graph, forward and backward, and exports, with results equal to eager's bit by bit.

    Args:
        fn: a public function of positional tensors (or None, or constants); gradients are taken where an argument asks.
        args: arguments; every dimension of a tensor is dynamic.
        others: arguments of other shapes, which the same graph must serve. Sizes 0 and 1 are graphs of their own in torch.
        export: also torch.export.export, for inference.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for a in (args, *others):
        _assert_same(_with_gradients(compiled, a), _with_gradients(fn, a), "compiled")
        graphs.append(counter.frame_count)
    if len(set(graphs)) != 1:
        raise AssertionError(f"graphs after each set of arguments: {graphs}; the first ones must serve every shape")
    if export:
        auto = torch.export.Dim.AUTO
        dynamic = tuple([auto] * a.dim() if isinstance(a, torch.Tensor) else None for a in args)
        program = torch.export.export(_Module(fn), tuple(args), dynamic_shapes=(dynamic,)).module()
        for a in (args, *others):
            _assert_same(_tuple(program(*a)), _tuple(fn(*a)), "exported")


class _Module(torch.nn.Module):
    def __init__(self, fn: Callable) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def _tuple(out) -> tuple:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _with_gradients(fn, args):
    out = _tuple(fn(*args))
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    recorded = [o for o in out if o.requires_grad]
    if not leaves or not recorded:
        return out
    seeds = [torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in recorded]
    return out + torch.autograd.grad(recorded, leaves, seeds, allow_unused=True)


def _assert_same(got, want, how: str) -> None:
    if len(got) != len(want):
        raise AssertionError(f"{how}: {len(got)} results, eager has {len(want)}")
    for i, (g, w) in enumerate(zip(got, want)):
        torch.testing.assert_close(g, w, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda text, i=i: f"{how}, result {i}: {text}")
