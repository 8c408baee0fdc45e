"""The raw binding mlcore._C: what it lends to a kernel, and what it refuses. One test a guard, each on both ways in (the
DLPack exchange API, and pointers for a torch without it), with rms_norm, the smallest op, as the kernel.
"""

import threading
import time

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlcore import _C

ROWS, COLS, EPS = 5, 37, 1e-6
CANARY = 123.0


@pytest.fixture(params=["exchange", "pointer"], autouse=True)
def way_in(request):
    """Every test runs with the exchange API and with the pointer path."""
    _C._force_pointer_path(request.param == "pointer")
    yield request.param
    _C._force_pointer_path(False)


def outputs(rows=ROWS, cols=COLS, dtype=torch.float32):
    return torch.full((rows, cols), CANARY, dtype=dtype), torch.full((rows,), CANARY)


def run(x, y=None, rstd=None, *, residual=None, weight=None, s=None, eps=EPS):
    """rms_norm_fwd on x; returns y."""
    if y is None:
        y, rstd = outputs(*x.shape, dtype=x.dtype)
    _C.rms_norm_fwd(x, residual, weight, eps, y, s, rstd)
    return y


def expected(x):
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def assert_refused(error, match, x, **others):
    """The call raises one line that matches, and writes nothing."""
    y, rstd = outputs()
    with pytest.raises(error, match=match) as caught:
        run(x, y, rstd, **others)
    assert "\n" not in str(caught.value)
    assert (y == CANARY).all() and (rstd == CANARY).all()


class WrapperTensor(torch.Tensor):
    """As DTensor: a global shape outside, the data inside."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("the binding must not dispatch")


class PlainSubclass(torch.Tensor):
    pass


def test_plain_tensor():
    x = torch.randn(ROWS, COLS)
    torch.testing.assert_close(run(x), expected(x))


# 1. Tensors that pass the exchange API without memory of their own.


def test_fake_tensor_is_refused():
    with FakeTensorMode():
        fake = torch.empty(ROWS, COLS)
    assert_refused(TypeError, "FakeTensor.*no data of its own.*mlcore.ops", fake)


def test_fake_output_is_refused():
    with FakeTensorMode():
        fake = torch.empty(ROWS)
    y, _ = outputs()
    with pytest.raises(TypeError, match="argument 6 is a FakeTensor"):
        run(torch.randn(ROWS, COLS), y, fake)
    assert (y == CANARY).all()


def test_wrapper_subclass_is_refused():
    assert_refused(TypeError, "WrapperTensor.*no data of its own", WrapperTensor(torch.randn(ROWS, COLS)))


def test_plain_subclass_is_read_as_its_data():
    x = torch.randn(ROWS, COLS)
    torch.testing.assert_close(run(x.as_subclass(PlainSubclass)), expected(x))


# 2. State that reading the memory would lose: gradients, negation, conjugation.


def test_requires_grad_is_refused_while_grad_is_recorded():
    x = torch.randn(ROWS, COLS, requires_grad=True)
    assert_refused(TypeError, "argument 0 requires grad", x)
    assert_refused(TypeError, "argument 0 requires grad", torch.nn.Parameter(x.detach()))
    assert_refused(TypeError, "argument 2 requires grad", x.detach(), weight=torch.ones(COLS, requires_grad=True))
    with torch.no_grad():
        torch.testing.assert_close(run(x), expected(x.detach()))
    with torch.inference_mode():
        torch.testing.assert_close(run(x), expected(x.detach()))


def test_launchers_bind_below_autograd():
    """_C.launch holds the same functions for mlcore's launchers: what the dispatcher has settled is not asked again."""
    x, (y, rstd) = torch.randn(ROWS, COLS, requires_grad=True), outputs()
    _C.launch.rms_norm_fwd(x, None, None, EPS, y, None, rstd)
    torch.testing.assert_close(y, expected(x.detach()))
    with FakeTensorMode():
        fake = torch.empty(ROWS, COLS)
    with pytest.raises(TypeError, match="no data of its own"):
        _C.launch.rms_norm_fwd(fake, None, None, EPS, y, None, rstd)
    with pytest.raises(ValueError, match="x must be given"):
        _C.launch.rms_norm_fwd(None, None, None, EPS, y, None, rstd)


def test_lazily_negated_view_is_refused():
    z = torch.randn(ROWS, COLS, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    assert_refused(TypeError, "lazily negated view", x)
    torch.testing.assert_close(run(x.resolve_neg()), expected(-z.imag))


@pytest.mark.parametrize("conj", [False, True])
def test_complex_is_refused(conj):
    z = torch.randn(ROWS, COLS, dtype=torch.complex64)
    assert_refused(ValueError, "x must be float32, bfloat16, float16; got an unknown dtype", z.conj() if conj else z)


# 3. Tensors without readable memory; memory that is shared until written.


def test_meta_is_refused():
    assert_refused(TypeError, "argument 0 .*meta", torch.empty(ROWS, COLS, device="meta"))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_is_refused(layout):
    assert_refused(TypeError, "argument 0 can't be read: ", torch.eye(4).to_sparse(layout=layout))


def test_tensor_inside_vmap_is_refused():
    y, rstd = outputs()

    def row(t):
        run(t, y, rstd)
        return t

    with pytest.raises(TypeError, match="argument 0 can't be read: "):
        torch.func.vmap(row)(torch.randn(3, ROWS, COLS))
    assert (y == CANARY).all() and (rstd == CANARY).all()


def test_copy_on_write_input_is_read_and_output_is_split():
    x = torch.randn(ROWS, COLS)
    torch.testing.assert_close(run(torch._lazy_clone(x)), expected(x))
    base, rstd = outputs()
    y = torch._lazy_clone(base)
    run(x, y, rstd)
    torch.testing.assert_close(y, expected(x))
    assert (base == CANARY).all(), "writing a lazy clone must not reach its source"


# 4. Shapes and strides.


def test_zero_dimensional_is_refused():
    assert_refused(ValueError, r"x must have at least 1 dimension; got shape \(\)", torch.tensor(1.0))


def test_strides_of_size_one_dimensions_mean_nothing():
    x = torch.empty_strided((1, COLS), (987654321, 1)).normal_()
    torch.testing.assert_close(run(x), expected(x))
    x = torch.empty_strided((ROWS, 1), (1, 12345)).normal_()
    torch.testing.assert_close(run(x), expected(x))


def test_expanded_rows_are_read_with_stride_zero():
    x = torch.randn(COLS).expand(ROWS, COLS)
    torch.testing.assert_close(run(x), expected(x))


def test_expanded_columns_are_refused():
    assert_refused(
        ValueError, "x must be contiguous in its last dimension; got stride 0", torch.randn(ROWS, 1).expand(ROWS, COLS)
    )


def test_transposed_is_refused():
    x = torch.randn(COLS, ROWS).t()
    assert_refused(ValueError, f"x must be contiguous in its last dimension; got stride {ROWS}", x)


def test_storage_offset_and_row_stride():
    base = torch.randn(ROWS + 2, COLS + 9)
    x = base[2:, 5 : 5 + COLS]
    wide = torch.full((ROWS, COLS + 9), CANARY)
    run(x, wide[:, 3 : 3 + COLS], torch.empty(ROWS))
    torch.testing.assert_close(wide[:, 3 : 3 + COLS], expected(x))
    assert (wide[:, :3] == CANARY).all() and (wide[:, 3 + COLS :] == CANARY).all(), "wrote outside of the view"


@pytest.mark.parametrize("shape", [(0, COLS), (ROWS, 0), (0, 0)])
def test_empty(shape):
    run(torch.empty(shape))


def test_too_many_dimensions_are_refused():
    assert_refused((ValueError, TypeError), "more than 8 dimensions|9 dimensions; at most 8", torch.zeros((1,) * 9))


# 5. Dtypes are an explicit list.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_table(dtype):
    x = torch.randn(ROWS, COLS).to(dtype)
    torch.testing.assert_close(run(x), expected(x))


OTHER_DTYPES = [
    (torch.float64, "float64"),
    (torch.bool, "bool"),
    (torch.int8, "int8"),
    (torch.uint8, "uint8"),
    (torch.int16, "int16"),
    (torch.int32, "int32"),
    (torch.int64, "int64"),
    (torch.uint64, "uint64"),
    (torch.uint16, "an unknown dtype"),
    (torch.float8_e4m3fn, "an unknown dtype"),
    (torch.float8_e5m2, "an unknown dtype"),
    (torch.complex64, "an unknown dtype"),
]


@pytest.mark.parametrize("dtype, name", OTHER_DTYPES, ids=str)
def test_other_dtypes_are_refused_by_name(dtype, name):
    assert_refused(ValueError, f"x must be float32, bfloat16, float16; got {name}", torch.empty(ROWS, COLS, dtype=dtype))


def test_packed_dtypes_are_refused():
    """Their exchange reports other bits or lanes than one number an element."""
    for name in ("uint4", "float4_e2m1fn_x2"):
        if hasattr(torch, name):
            assert_refused(
                (TypeError, ValueError),
                "argument 0|x must be",
                torch.zeros(ROWS, COLS, dtype=torch.uint8).view(getattr(torch, name)),
            )


# 6. Objects that are no tensors, and tensors left out.


@pytest.mark.parametrize(
    "other", [np.ones((ROWS, COLS), np.float32), [[1.0]], 1.0, "x", object()], ids=lambda o: type(o).__name__
)
def test_other_objects_are_refused(other):
    assert_refused(TypeError, f"rms_norm_fwd: argument 0 must be a torch.Tensor; got {type(other).__name__}", other)


def test_left_out_tensors_are_refused_where_needed():
    """NULL reaches C as an argument left out: an error where the kernel needs it, never a crash."""
    assert_refused(ValueError, "rms_norm: x must be given", None)
    x, (y, rstd) = torch.randn(ROWS, COLS), outputs()
    with pytest.raises(ValueError, match="y must be given"):
        _C.rms_norm_fwd(x, None, None, EPS, None, None, rstd)
    with pytest.raises(ValueError, match="s must be given"):
        _C.rms_norm_fwd(x, x, None, EPS, y, None, rstd)
    assert (y == CANARY).all() and (rstd == CANARY).all()


KERNELS = sorted({f"{op}_{pass_name}" for op, pass_name, backend, _ in _C.table() if backend == "cpu"})


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_refuses_to_run_without_tensors(name):
    """All arguments None or 0: whatever the kernel needs first is named. The number of arguments is read from the signature."""
    function = getattr(_C, name)
    signature = function.__doc__.split(")", 1)[0]
    kinds = [part.split(":")[1].strip() for part in signature.split("(", 1)[1].split(",") if ":" in part]
    arguments = [None if kind in ("handle", "object") else 0 for kind in kinds]
    with pytest.raises(ValueError, match="must be given") as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


# 7. Values: checked before anything is written, in one line that names op, argument, rule and value.


def test_errors_name_the_argument_the_rule_and_the_value():
    x = torch.randn(ROWS, COLS)
    assert_refused(ValueError, r"rms_norm: eps must not be negative; got -1", x, eps=-1.0)
    assert_refused(ValueError, r"rms_norm: weight must be \(C\) = \(37\); got \(38\)", x, weight=torch.ones(COLS + 1))
    assert_refused(ValueError, r"rms_norm: weight must be float32; got float64", x, weight=torch.ones(COLS).double())
    assert_refused(
        ValueError, r"rms_norm: residual must have x's shape \(5, 37\); got \(37, 5\)", x, residual=torch.ones(COLS, ROWS)
    )


# 8. Threads.


def test_gil_is_released_while_a_kernel_runs():
    """Another Python thread goes on while one kernel call works on 4 GB that share one row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _C.set_isa("scalar")
    rows, cols = 1_000_000, 1024
    x, y, rstd = torch.randn(cols).expand(rows, cols), torch.empty(cols).expand(rows, cols), torch.empty(rows)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    worker = threading.Thread(target=tick)
    worker.start()
    try:
        begin = time.perf_counter()
        run(x, y, rstd)
        end = time.perf_counter()
    finally:
        stop.set()
        worker.join()
        _C.set_isa("")
        torch.set_num_threads(threads)
    inside = sum(begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin) for t in ticks)
    assert inside >= 3, f"{inside} ticks in a call of {end - begin:.3f} s"


def test_calls_from_many_threads():
    """The caches of the caster are shared: first calls with new types, from threads that start together, all succeed."""
    count = 8
    kinds = [type(f"Kind{i}", (torch.Tensor,), {}) for i in range(count)]
    x = torch.randn(ROWS, COLS)
    barrier, failures = threading.Barrier(count), []

    def work(i):
        barrier.wait()
        try:
            for step in range(200):
                kind = kinds[(i + step) % count]
                if not torch.allclose(run(x.as_subclass(kind)).as_subclass(torch.Tensor), expected(x)):
                    failures.append(f"thread {i}, step {step}: wrong numbers")
                with pytest.raises(ValueError, match=f"got -{i + 1}$"):  # each thread reads its own last error
                    run(x, eps=-float(i + 1))
        except Exception as error:
            failures.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]


# 9. Both ways in lend the same memory.


def test_pointer_path_gives_the_same_bits():
    base = torch.randn(64, 300)
    cases = [base, base[3:, 7:207], base[:1], torch.randn(300).expand(8, 300), base.bfloat16(), base.half()[:, ::1][5:]]
    for x in cases:
        results = []
        for pointer in (False, True):
            _C._force_pointer_path(pointer)
            y, rstd = outputs(*x.shape, dtype=x.dtype)
            run(x, y, rstd)
            results.append((y, rstd))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


# 10. The question before the direct way.


def watch(*tensors):
    return _C.watch(*tensors)


def test_watch_lets_plain_tensors_through():
    x, w = torch.randn(ROWS, COLS), torch.nn.Parameter(torch.randn(COLS))
    assert watch(x) == 1 and watch(x, None, x.bfloat16(), x.half()) == 1 and watch() == 1
    assert watch(x, w) == 2 and watch(None, w) == 2
    with torch.no_grad():
        assert watch(x, w) == 1


def test_watch_sends_what_a_kernel_cannot_take_the_general_way():
    x = torch.randn(ROWS, COLS)
    negated = torch.randn(4, 4, dtype=torch.complex64).conj().imag

    class Subclass(torch.Tensor):
        pass

    others = [x.t(), x[:, ::2], x.double(), x.long(), negated.contiguous().detach()._neg_view(), x.as_subclass(Subclass)]
    others += [x.to("meta"), x.to_sparse(), torch.randn(COLS).expand(ROWS, COLS), 1.0, "x"]
    with FakeTensorMode():
        others.append(torch.empty(2, 2))
    for other in others:
        assert watch(x, other) == 0, type(other)


def test_watch_sees_who_follows_the_call():
    x, seen = torch.randn(ROWS, COLS), []

    def ask(t):
        seen.append(watch(x))
        return t * 1

    torch.func.vmap(ask)(x)
    torch.func.grad(lambda t: ask(t).sum())(x)
    torch.jit.trace(ask, x, check_trace=False)  # the check runs it once more, unwatched
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        seen.append(watch(x))
    assert seen and not any(seen)
    assert watch(x) == 1
