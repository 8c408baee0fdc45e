"""The tests that hold for every norm over rows; test_rms_norm.py and test_layer_norm.py run them and add their own.

A subclass names its op, its vectors and torch's own way. Implementations and dtypes come from mlcore.testing.
"""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

import mlcore
from mlcore import _C, testing

SHAPES = [(1, 1), (200, 1), (3, 7), (33,), (5, 1, 129), (200, 33), (2, 64, 1000)]  # more rows than row blocks in three
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class NormSuite:
    op: str
    vectors: tuple[str, ...]  # "weight", "bias"
    eps: float

    @staticmethod
    def math(s, *vectors, eps):
        """torch's own norm of s over its last dimension."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", testing.cases(self.op), ids=lambda c: f"{c[0]}-{str(c[1]).removeprefix('torch.')}")
        if "impl" in metafunc.fixturenames:
            metafunc.parametrize("impl", testing.available(self.op))
        if "vectors" in metafunc.fixturenames:
            metafunc.parametrize("vectors", ["none", "same", "float32"] + ["mixed"] * (len(self.vectors) > 1))
        if "kernel" in metafunc.fixturenames:
            metafunc.parametrize("kernel", [n for n in testing.available(self.op) if n != "reference"])

    @property
    def fn(self):
        return getattr(mlcore.ops, self.op)

    @property
    def handles(self):
        module = importlib.import_module(f"mlcore.ops.{self.op}")
        return module._fwd, module._bwd

    def call(self, x, *vectors, residual=None, **kwargs):
        return self.fn(x, *vectors, residual=residual, eps=self.eps, **kwargs)

    def make(self, shape, dtype, *, residual=False, vectors="same", device="cpu", **kwargs):
        """The op's inputs by name. vectors: "none", "same" as x's dtype, "float32", or "mixed": the last one float32."""
        inputs = {"x": testing.make_input(*shape, dtype=dtype, device=device, **kwargs)}
        for i, name in enumerate(self.vectors):
            wide = vectors == "float32" or (vectors == "mixed" and i == len(self.vectors) - 1)
            vector = testing.make_input(shape[-1], dtype=torch.promote_types(dtype, F32) if wide else dtype, device=device)
            inputs[name] = None if vectors == "none" else vector
        inputs["residual"] = testing.make_input(*shape, dtype=dtype, device=device) if residual else None
        return inputs

    def check(self, inputs, *, impl, through=None):
        """Outputs and gradients by the tolerance rule."""

        def run(how):
            return lambda x, residual, **v: how(x, *(v[n] for n in self.vectors), residual=residual)

        def math(x, *vectors, residual=None):
            s = x if residual is None else x + residual
            given = [v for v in vectors if v is not None]
            wide = s.dtype if all(v.dtype == s.dtype for v in given) else F32  # torch's norms want one dtype
            y = self.math(s.to(wide), *(None if v is None else v.to(wide) for v in vectors), eps=self.eps).to(s.dtype)
            return y if residual is None else (y, s)

        s = inputs["x"].double() if inputs["residual"] is None else (inputs["x"] + inputs["residual"]).double()
        weight = 1.0 if inputs["weight"] is None else inputs["weight"].abs().max().item()
        one = 4 * weight * self.rstd(s).max().item()  # dx is the difference of numbers as large as dy * weight * rstd
        many = (s.numel() / s.shape[-1]) ** 0.5  # dweight and dbias sum numbers of RMS 1 and either sign over the rows
        terms = {"x": one, "residual": one, "weight": many, "bias": many}
        with testing.use(impl) as backend:
            ours = run(functools.partial(self.call, impl=backend))
            testing.check_numerics(ours, run(math), run(math), inputs, through=through, terms=terms)

    @pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_matches_float64(self, case, shape, residual, vectors):
        impl, dtype = case
        self.check(self.make(shape, dtype, residual=residual, vectors=vectors, device=testing.device_of(impl)), impl=impl)

    @pytest.mark.parametrize("through", [(0,), (1,)], ids=["y", "s"])
    def test_gradient_through_one_output(self, case, through):
        impl, dtype = case
        inputs = self.make((3, 5, 70), dtype, residual=True, device=testing.device_of(impl))
        self.check(inputs, impl=impl, through=through)

    def test_large_numbers(self, case):
        impl, dtype = case
        self.check(self.make((7, 300), dtype, std=300.0, device=testing.device_of(impl)), impl=impl)  # squares overflow float16

    @pytest.mark.parametrize("shape", [(0, 5), (4, 0, 5), (4, 0), (0,), (0, 0)], ids=str)
    def test_empty(self, case, shape):
        impl, dtype = case
        inputs = self.make(shape, dtype, residual=True, device=testing.device_of(impl))
        leaves = [t.requires_grad_() for t in inputs.values()]
        with testing.use(impl) as backend:
            y, s = self.call(*leaves[:-1], residual=leaves[-1], impl=backend)
            grads = torch.autograd.grad((y + s).sum(), leaves)
        assert y.shape == s.shape == shape
        for leaf, grad in zip(leaves, grads):
            assert grad.shape == leaf.shape and not grad.any()

    @pytest.mark.parametrize("layout", [n for n in testing.LAYOUTS if n != "contiguous"])
    def test_layouts_give_the_same_bits(self, case, layout):
        impl, dtype = case
        kwargs = {"dtype": dtype, "device": testing.device_of(impl), "layout": layout}
        inputs = [testing.make_input(3, 4, 37, **kwargs) for _ in range(2)]
        inputs += [testing.make_input(37, **kwargs) for _ in self.vectors]
        seeds = [testing.make_input(3, 4, 37, **kwargs) for _ in range(2)]

        def run(change):
            x, residual, *vectors = leaves = [change(t.detach()).requires_grad_() for t in inputs]
            out = self.call(x, *vectors, residual=residual, impl=backend)
            return out + torch.autograd.grad(out, leaves, [change(t) for t in seeds])

        with testing.use(impl) as backend:
            for got, want in zip(run(lambda t: t), run(torch.Tensor.contiguous)):
                if impl == "reference":
                    torch.testing.assert_close(got, want)
                else:
                    assert got.is_contiguous() and torch.equal(got, want)

    def test_same_bits_for_any_thread_count(self, kernel):
        device = testing.device_of(kernel)
        runs = []
        for threads in (1, 2):
            torch.manual_seed(1)
            torch.set_num_threads(threads)
            x, *vectors, residual = (
                t.requires_grad_() for t in self.make((300, 333), F32, residual=True, device=device).values()
            )
            with testing.use(kernel) as backend:
                out = self.call(x, *vectors, residual=residual, impl=backend)
                runs.append(out + torch.autograd.grad([o.sin().sum() for o in out], [x, *vectors, residual]))
        assert all(torch.equal(a, b) for a, b in zip(*runs))

    def test_same_bits_for_a_row_in_any_batch(self, case):
        impl, dtype = case
        inputs = self.make((130, 77), dtype, residual=True, device=testing.device_of(impl))

        def run(rows):
            x, *vectors, residual = inputs.values()
            x, residual = (t[rows].clone().requires_grad_() for t in (x, residual))
            y, s = self.call(x, *vectors, residual=residual, impl=backend)
            return y, s, torch.autograd.grad((y * y * s).sum(), x)[0]

        with testing.use(impl) as backend:
            whole = run(slice(None))
            for rows in (slice(0, 1), slice(64, 65), slice(3, 120), slice(129, 130)):
                for part, all_rows in zip(run(rows), whole):
                    assert torch.equal(part, all_rows[rows])

    def test_bad_rows_stay_alone(self, case):
        impl, dtype = case
        x, *vectors, _ = self.make((4, 50), dtype, device=testing.device_of(impl)).values()
        bad = x.clone()
        bad[1, 3], bad[2, 7] = float("nan"), float("inf")
        with testing.use(impl) as backend:
            good, got = self.call(x, *vectors, impl=backend), self.call(bad, *vectors, impl=backend)
        assert got[1:3].isnan().any(1).all()
        assert torch.equal(got[[0, 3]], good[[0, 3]])

    def test_gradcheck(self):
        x, *vectors, residual = (t.requires_grad_() for t in self.make((3, 5), F64, residual=True).values())
        assert torch.autograd.gradcheck(lambda x, r, *v: self.call(x, *v, residual=r), (x, residual, *vectors))
        assert torch.autograd.gradgradcheck(lambda x, r, *v: self.call(x, *v, residual=r), (x, residual, *vectors))

    def test_second_order(self, case):
        """A gradient penalty, as of WGAN-GP. First-order gradients that carry a graph have the bits of those that don't."""
        impl, dtype = case
        inputs = self.make((6, 40), dtype, residual=True, device=testing.device_of(impl))

        def penalty(backend, wide=False):
            leaves = [t.double() if wide else t.clone() for t in inputs.values()]
            x, *vectors, residual = (t.requires_grad_() for t in leaves)
            y, s = self.call(x, *vectors, residual=residual, impl=backend)
            leaves = [x, *vectors, residual]
            loss = (y.sin() + s.cos()).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)
            plain = torch.autograd.grad((y.sin() + s.cos()).sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(first, plain))
            return second

        with testing.use(impl) as backend:
            got, math, truth = penalty(backend), penalty("reference"), penalty("reference", wide=True)
        for g, m, t in zip(got, math, truth):
            testing.assert_close_to_reference(g, m, t, grad=True, what="second-order gradient")

    def test_ops_are_registered_right(self, kernel):
        fwd, bwd = self.handles
        for vectors, residual in (("same", False), ("none", True), ("float32", True)):
            inputs = self.make((2, 3, 20), BF16, residual=residual, vectors=vectors, device=testing.device_of(kernel))
            x, *vectors, residual = inputs.values()
            with testing.use(kernel) as backend:
                testing.check_op(fwd, (x, residual, *vectors, self.eps, backend))
                y, s, *stats = fwd(x, residual, *vectors, self.eps, backend)
                needs = [v is not None for v in vectors]
                s, ds = (x, None) if residual is None else (s, torch.randn_like(s))
                testing.check_op(bwd, (y, ds, s, *vectors, *stats, *needs, backend))
                testing.check_op(bwd, (y.mT.contiguous().mT, ds, s, *vectors, *stats, *[False] * len(needs), backend))

    @pytest.mark.parametrize("dtype", [F32, BF16, F64])
    @pytest.mark.parametrize("strided", [False, True])
    def test_lean_op(self, dtype, strided):
        """What the public function calls where nothing is asked but y: same bits by the direct way, the op and the kernel."""
        x, *vectors, _ = self.make((6, 5, 20), dtype).values()
        if strided:
            x, vectors = x.mT.contiguous().mT, [v.repeat_interleave(2)[::2] for v in vectors]
        handle = getattr(torch.ops.mlcore, self.op).default
        testing.check_op(handle, (x, *vectors, self.eps))
        want = self.call(x, *vectors, impl="reference" if dtype == F64 else "cpu")
        assert torch.equal(handle(x, *vectors, self.eps), want)
        assert torch.equal(self.call(x, *vectors), want)
        with torch.no_grad():
            testing.check_public(lambda *args: self.call(*args), [x, *vectors])

    def test_lean_way_records_gradients(self):
        x, *vectors, dy = self.make((6, 5, 20), F32, residual=True).values()
        leaves = [t.requires_grad_() for t in (x, *vectors)]
        got, want = (torch.autograd.grad(self.call(x, *vectors, impl=impl), leaves, dy) for impl in (None, "cpu"))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        unused = torch.autograd.grad(self.call(x, *vectors).detach().sum() + x.sum(), leaves, allow_unused=True)
        assert unused[0] is not None and unused[1] is None

    @pytest.mark.graph
    def test_compiles_and_exports(self, impl):
        def arguments(*shape):
            x, *vectors, residual = self.make(shape, F32, residual=True, device=testing.device_of(impl)).values()
            return [t.requires_grad_() for t in (x, residual, *vectors)]

        with testing.use(impl) as backend:

            def plain(x, *vectors):
                return self.call(x, *vectors, impl=backend)

            def both(x, residual, *vectors):
                y, s = self.call(x, *vectors, residual=residual, impl=backend)
                return y * 2, s

            first, second, third = arguments(3, 5, 24), arguments(2, 7, 40), arguments(90, 2, 8)
            testing.check_public(plain, *([x.detach(), *v] for x, _, *v in (first, second, third)))
            testing.check_public(both, first, second, third)
            with torch.no_grad():
                testing.check_public(both, first, second)

    def test_automatic_choice(self):
        x, *vectors, _ = self.make((4, 9), F32).values()
        assert mlcore.explain(self.op, x).chosen == "cpu"
        assert mlcore.explain(self.op, x.double()).chosen == "reference"
        with testing.use(f"cpu[{_C.isa()}]"):
            assert torch.equal(self.call(x, *vectors), self.call(x, *vectors, impl="cpu"))

    def test_explicit_impl_never_falls_back(self):
        x, *vectors, _ = self.make((4, 9), F64).values()
        with pytest.raises(ValueError, match=f"{self.op}: impl='cpu' can't serve this call: torch.float64"):
            self.call(x, *vectors, impl="cpu")
        with pytest.raises(ValueError, match="impl must be one of cpu, cuda, triton, reference or None; got 'fast'"):
            self.call(x, *vectors, impl="fast")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="impl='cuda' can't serve this call"):
                self.call(x.float(), impl="cuda")

    def test_transforms(self):
        """torch.func and forward-mode AD get the reference; a kernel that is asked for by name says that it can't."""
        x, *vectors, _ = self.make((6, 5, 16), F32).values()
        want, jacobian_vector = torch.func.jvp(lambda x: self.call(x, *vectors, impl="reference"), (x,), (x.cos(),))
        torch.testing.assert_close(torch.func.vmap(lambda x: self.call(x, *vectors))(x), want)
        torch.testing.assert_close(torch.func.jvp(lambda x: self.call(x, *vectors), (x,), (x.cos(),))[1], jacobian_vector)
        with torch.autograd.forward_ad.dual_level():
            dual = self.call(torch.autograd.forward_ad.make_dual(x, x.cos()), *vectors)
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, jacobian_vector)
        per_sample = torch.func.vmap(torch.func.grad(lambda v, x: self.call(x, v, *vectors[1:]).square().sum()), (None, 0))
        leaf = vectors[0].clone().requires_grad_()
        for row, got in zip(x, per_sample(vectors[0], x)):
            torch.testing.assert_close(got, torch.autograd.grad(self.call(row, leaf, *vectors[1:]).square().sum(), leaf)[0])
        with pytest.raises(ValueError, match=f"{self.op}: impl='cpu' can't serve torch.func"):
            torch.func.vmap(lambda x: self.call(x, *vectors, impl="cpu"))(x)

    def test_vmap_of_the_registered_op(self):
        x, *vectors, _ = self.make((6, 5, 16), F32).values()
        fwd, _ = self.handles
        got = torch.func.vmap(lambda x: fwd(x, None, *vectors, self.eps, "cpu")[0])(x)
        assert torch.equal(got, self.call(x, *vectors, impl="cpu"))

    def test_autocast(self):
        x, *vectors, residual = self.make((4, 16), F32, residual=True).values()
        low = x.bfloat16()
        with torch.autocast("cpu", dtype=BF16):
            assert self.call(x, *vectors).dtype == F32
            y, s = self.call(low, *vectors, residual=residual)  # promoted as low + residual is
            assert y.dtype == s.dtype == F32 and torch.equal(s, low + residual)
            assert self.call(low, *vectors).dtype == BF16

    def test_lazy_negation_and_inference_mode(self):
        x, *vectors, _ = self.make((4, 16), F32).values()
        want = self.call(-x, *vectors)
        assert torch.equal(self.call(torch._neg_view(x), *vectors), want)
        with torch.inference_mode():
            assert torch.equal(self.call(-x, *vectors), want)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"x": torch.tensor(1.0)}, "x must have at least one dimension; got shape ()"),
            ({"x": torch.ones(4, 9, dtype=torch.int64)}, "x must be a floating-point tensor; got torch.int64"),
            ({"weight": torch.ones(8)}, "weight must have shape (9,), x's last dimension; got (8,)"),
            ({"weight": torch.ones(1, 9)}, "weight must have shape (9,), x's last dimension; got (1, 9)"),
            ({"weight": torch.ones(9, dtype=F16)}, "weight must be torch.float32 as x, or torch.float32; got torch.float16"),
            ({"weight": torch.ones(9, device="meta")}, "weight must be on cpu as x; got meta"),
            ({"residual": torch.ones(9)}, "residual must have x's shape (4, 9); got (9,)"),
            (
                {"residual": torch.ones(4, 9, dtype=BF16)},
                "residual must be torch.float32 on cpu as x; got torch.bfloat16 on cpu",
            ),
            ({"eps": -1.0}, "eps must not be negative; got -1.0"),
            ({"eps": float("nan")}, "eps must not be negative; got nan"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_bad_arguments(self, change, message):
        with pytest.raises(ValueError) as error:
            self.fn(**{"x": torch.ones(4, 9), **change})
        assert str(error.value) == f"{self.op}: {message}"

    def raw_arguments(self, pass_name):
        """The raw binding's arguments in order, by name: outputs full of 7s."""
        rows, stats = torch.ones(4, 9), {n: torch.full((4,), 7.0) for n in ("mean", "rstd")}
        vectors = {n: torch.ones(9) for n in self.vectors}
        stats = stats if "bias" in vectors else {"rstd": stats["rstd"]}
        if pass_name == "fwd":
            outputs = {"y": torch.full((4, 9), 7.0), "s": torch.full((4, 9), 7.0), **stats}
            return {"x": rows, "residual": rows, **vectors, "eps": 1e-5, **outputs}, outputs
        partial = torch.full((2, 4, 9) if "bias" in vectors else (4, 9), 7.0)
        outputs = {"dx": torch.full((4, 9), 7.0), **{f"d{n}": torch.full((9,), 7.0) for n in vectors}, "partial": partial}
        return {"dy": rows, "ds": rows, "s": rows, "weight": vectors["weight"], **stats, **outputs}, outputs

    @staticmethod
    def wrong_values(name, value, pass_name):
        """(value, what the refusal must say) for one argument of the raw binding."""
        if name == "eps":
            return [(-1.0, "eps must not be negative; got -1")]
        # x, and s in the backward pass, are what the others are measured by.
        own = "" if name == ("x" if pass_name == "fwd" else "s") else name
        wide, low = torch.cat([value, value], -1), torch.float16
        rows = value.dim() == 2 and name != "partial"
        wrong = [
            (wide, f"{own} must have {'x' if pass_name == 'fwd' else 's'}'s shape" if rows else f"{own} must be ("),
            (value.double(), f"{name} must be float32"),
            (value.to(low), f"{own} must be float"),
        ]
        if rows:
            wrong.append((value.t().contiguous().t(), f"{name} must be contiguous in its last dimension; got stride 4"))
        else:
            wrong.append((wide[..., ::2], f"{name} must be contiguous; got strides"))
        optional = {"residual", "weight", "bias", "ds", "dweight", "dbias"} | (
            {"mean", "rstd"} if pass_name == "fwd" else set()
        )
        if name not in optional:
            wrong.append((None, f"{name} must be given"))
        elif (name, pass_name) == ("weight", "bwd"):
            wrong.append((None, "dweight needs weight"))
        return wrong

    @pytest.mark.parametrize("pass_name", ["fwd", "bwd"])
    def test_raw_binding_refuses_before_it_writes(self, pass_name):
        run = getattr(_C, f"{self.op}_{pass_name}")
        good, _ = self.raw_arguments(pass_name)
        run(*good.values())
        for name, value in good.items():
            for bad, message in self.wrong_values(name, value, pass_name):
                args, outputs = self.raw_arguments(pass_name)
                args[name] = bad
                with pytest.raises(ValueError) as error:
                    run(*args.values())
                text = str(error.value)
                assert text.startswith(f"{self.op}: ") and message in text and "\n" not in text
                assert all(o.eq(7).all() for o in outputs.values()), f"{name}: written before the refusal"
