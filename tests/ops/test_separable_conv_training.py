"""mlcore.ops.separable_conv2d and batch_norm2d with norms by the batch's moments: against float64, and against torch's own
norms in float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mlcore import _C, testing
from mlcore.ops import BatchNorm, _separable, batch_norm2d, separable_conv2d

F32 = torch.float32


def compare_with_float64(ours, stock, leaves, seed, channels):
    """Results, running moments of `channels` and gradients: at most three times the error of torch's own in float32."""

    def run(fn, wide):
        own = [t.to(wide).detach().requires_grad_() for t in leaves]
        mean, var = torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide)
        y = fn(*own, mean, var)
        return y.detach(), mean, var, *torch.autograd.grad(y, own, seed.to(wide))

    for g, f, w in zip(run(ours, F32), run(stock, F32), run(stock, torch.float64), strict=True):
        error, theirs = ((t.double() - w).norm() / w.norm().clamp_min(1e-3) for t in (g, f))
        assert error <= 3 * theirs + 2e-6, (error, theirs)


@pytest.mark.parametrize("name", testing.available("separable_conv"))
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_training_norm(name, offset, shape=(5, 34, 9, 8)):
    """Batch moments, running moments and all gradients through them, also where the mean is large."""
    N, C, H, W = shape
    x = torch.randn(N, H, W, C).movedim(-1, 1) + offset
    depthwise, pointwise = torch.randn(C, 1, 3, 3) / 3 + 0.2, torch.randn(20, C, 1, 1) / 6
    leaves = [x, depthwise, pointwise, torch.rand(C) + 0.5, torch.randn(C)]

    def stock(x, depthwise, pointwise, weight, bias, mean, var):
        h = F.batch_norm(F.conv2d(x, depthwise, None, 1, 1, 1, C), mean, var, weight, bias, True, 0.3)
        return F.conv2d(F.silu(h), pointwise)

    with testing.use(name) as impl:

        def ours(x, depthwise, pointwise, weight, bias, mean, var):
            norm = BatchNorm(weight, bias, mean, var, True, 0.3)
            return separable_conv2d(x, depthwise, pointwise, None, None, 1, 1, norm=norm, activation="silu", impl=impl)

        compare_with_float64(ours, stock, leaves, torch.randn(N, 20, H, W), C)


@pytest.mark.parametrize("name", testing.available("separable_conv"))
@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("shape, J", [((5, 34, 9, 8), 70), ((4, 16, 2, 1), 5), ((3, 65, 33, 5), 130)], ids=str)
def test_training_norm_behind_the_product(name, depthwise, shape, J):
    """The second norm by moments that the product takes while it makes them, its activation and the residual."""
    N, C, H, W = shape
    x = torch.randn(N, H, W, C).movedim(-1, 1)
    leaves = [x, torch.randn(C, 1, 3, 3) / 3, torch.randn(J, C, 1, 1) / C**0.5, torch.rand(J) + 0.5, torch.randn(J)]
    leaves += [torch.randn(J), torch.randn(N, H, W, J).movedim(-1, 1)]

    def stock(x, filters, pointwise, weight, bias, before, residual, mean, var):
        h = F.conv2d(x, filters, None, 1, 1, 1, C) if depthwise else x + 0 * filters.sum()
        z = F.conv2d(h, pointwise, before)
        return F.silu(F.batch_norm(z, mean, var, weight, bias, True, 0.3)) + residual

    with testing.use(name) as impl:

        def ours(x, filters, pointwise, weight, bias, before, residual, mean, var):
            words = {"pointwise_norm": BatchNorm(weight, bias, mean, var, True, 0.3), "pointwise_activation": "silu"}
            words |= {"residual": residual, "impl": impl}
            if depthwise:
                return separable_conv2d(x, filters, pointwise, None, before, 1, 1, **words) + 0 * before.sum()
            return separable_conv2d(x, None, pointwise, None, before, **words) + 0 * (filters.sum() + before.sum())

        compare_with_float64(ours, stock, leaves, torch.randn(N, J, H, W), J)


def whole_block(x, filters, pointwise, *rest, impl=None, words=("relu6", "silu"), numbers=(1, 1)):
    first, last = BatchNorm(*rest[:2], training=True), BatchNorm(*rest[2:4], training=True)
    names = {"norm": first if filters is not None else None, "pointwise_norm": last, "residual": rest[4], "impl": impl}
    names |= {"activation": words[0] if filters is not None else None, "pointwise_activation": words[1]}
    return separable_conv2d(x, filters, pointwise, None, None, *(numbers if filters is not None else ()), **names)


def block_leaves(shape, J, filters=True, stride=1):
    N, C, H, W = shape
    x = torch.randn(N, H, W, C).movedim(-1, 1)
    leaves = [x, torch.randn(C, 1, 3, 3) / 3 if filters else None, torch.randn(J, C, 1, 1) / C**0.5]
    leaves += [torch.rand(C) + 0.5, torch.randn(C), torch.rand(J) + 0.5, torch.randn(J)]
    return [*leaves, torch.randn(N, -(-H // stride), -(-W // stride), J).movedim(-1, 1)]


@pytest.mark.parametrize("words", [("relu6", "silu"), ("silu", None)], ids=str)
@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("shape, J, stride", [((2, 130, 24, 23), 100, 1), ((3, 35, 21, 30), 70, 2)], ids=str)
def test_whole_block_between_training_norms(shape, J, stride, filters, words):
    """Both norms, activations and the residual in one function of autograd, its backward in strips and by torch's products."""
    leaves = block_leaves(shape, J, filters, stride if filters else 1)
    numbers, seed = (stride, 1), torch.randn_like(leaves[-1])

    def gradients(wide, impl):
        own = [None if t is None else t.to(wide).detach().requires_grad_() for t in leaves]
        y = whole_block(*own, impl=impl, words=words, numbers=numbers)
        wanted = [t for i, t in enumerate(own) if t is not None and (filters or i not in (3, 4))]
        return y.detach(), *torch.autograd.grad(y, wanted, seed.to(wide))

    want, parts = gradients(torch.float64, "reference"), _separable._LEAST_PARTS
    fused = gradients(F32, "cpu")
    try:
        _separable._LEAST_PARTS = 1 << 30
        apart = gradients(F32, "cpu")
    finally:
        _separable._LEAST_PARTS = parts
    assert torch.equal(fused[0], apart[0]) and not all(map(torch.equal, fused[1:4], apart[1:4]))
    for a, b, w in zip(fused, apart, want, strict=True):
        errors = [((t.double() - w).norm() / w.norm()).item() for t in (a, b)]
        assert errors[0] <= 2 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_block_in_16_bits(dtype):
    leaves = [t.to(dtype) if t.dim() == 4 else t for t in block_leaves((2, 40, 16, 15), 24)]
    seed = torch.randn_like(leaves[-1])

    def gradients(wide, impl):
        own = [t.to(wide(t)).detach().requires_grad_() for t in leaves]
        return torch.autograd.grad(whole_block(*own, impl=impl), own, seed.to(own[0].dtype))

    got, want = gradients(lambda t: t.dtype, "cpu"), gradients(lambda t: torch.float64, "reference")
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= (5e-2 if dtype == torch.bfloat16 else 1e-2) * w.norm()


def test_bits_of_a_training_block_do_not_depend_on_threads():
    leaves = [t.requires_grad_() for t in block_leaves((3, 70, 20, 17), 40)]

    def run():
        y = whole_block(*leaves)
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    assert _separable._parts((True,) * 5, leaves[-1], [*leaves[:2], None, None, leaves[2].view(40, 70)], "cpu") > 1
    want = run()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), want))


def test_second_derivatives_of_a_training_block():
    leaves = [t.requires_grad_() for t in block_leaves((2, 6, 8, 9), 5)]

    def penalty(impl):
        y = whole_block(*leaves, impl=impl, words=("silu", "silu"))
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for got, want in zip(penalty("cpu"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2 * want.abs().max().item())


@pytest.mark.parametrize("name", testing.available("separable_conv"))
@pytest.mark.parametrize("shape", [(3, 70, 7, 6), (1, 5, 40, 3), (2, 33, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_batch_norm2d(name, shape, layout):
    N, C, H, W = shape
    x = torch.randn(N, H, W, C).movedim(-1, 1) * 2 + 3
    leaves = [x if layout == "channels_last" else x.contiguous(), torch.rand(C) + 0.5, torch.randn(C), torch.randn(shape)]

    def stock(x, weight, bias, residual, mean, var):
        return F.silu(F.batch_norm(x, mean, var, weight, bias, True, 0.3)) + residual

    with testing.use(name) as impl:

        def ours(x, weight, bias, residual, mean, var):
            return batch_norm2d(
                x, BatchNorm(weight, bias, mean, var, True, 0.3), activation="silu", residual=residual, impl=impl
            )

        compare_with_float64(ours, stock, leaves, torch.randn(shape), C)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm2d_in_16_bits(dtype):
    leaves = [torch.randn(4, 9, 8, 40).movedim(-1, 1).to(dtype), torch.rand(40) + 0.5, torch.randn(40)]
    seed = torch.randn(4, 40, 9, 8)

    def run(fn, wide):
        own = [t.to(wide).detach().requires_grad_() for t in leaves]
        y = fn(*own)
        return y.detach(), *torch.autograd.grad(y, own, seed.to(y.dtype))

    def ours(x, weight, bias):
        return batch_norm2d(x.to(dtype), BatchNorm(weight, bias, training=True), activation="relu6")

    def stock(x, weight, bias):
        return F.relu6(F.batch_norm(x, None, None, weight, bias, True))

    limit = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for g, w in zip(run(ours, F32), run(stock, torch.float64), strict=True):
        assert (g.double() - w).norm() <= limit * w.norm()


def test_bad_arguments_of_batch_norm2d():
    x, norm = torch.ones(2, 3, 4, 4), BatchNorm(training=True)
    for args, words, message in [
        ((x[0], norm), {}, "x must be a floating-point tensor (N, C, H, W); got torch.float32 (3, 4, 4)"),
        ((x, BatchNorm(torch.ones(4), training=True)), {}, "norm.weight must have shape (3,); got (4,)"),
        ((x, BatchNorm(None, None, x[0, :, 0, 0], x[0, :, 0, 0])), {}, "norm must be training; got training=False"),
        ((x, norm), {"residual": x[:1]}, "residual must be torch.float32 (2, 3, 4, 4) as x; got torch.float32 (1, 3, 4, 4)"),
        ((x, norm), {"activation": "tanh"}, "activation must be one of None, 'relu', 'relu6', 'silu'; got 'tanh'"),
        ((x[:1, :, :1, :1], norm), {}, "a training norm needs more than one value a channel; got 1"),
    ]:
        with pytest.raises(ValueError) as error:
            batch_norm2d(*args, **words)
        assert str(error.value) == f"batch_norm2d: {message}"


def test_raw_binding_of_the_fused_backward():
    x, dy, d = (torch.ones(2, 4, 4, c).movedim(-1, 1) for c in (3, 5, 3))
    sums, dw, partial, parts = torch.ones(4, 3), torch.ones(5, 3), torch.ones(8, 3, 3), torch.ones(2, 5, 32)
    good = [dy, None, None, None, None, x, None, None, None, None, torch.ones(5, 3), 1, 1, 1, 1, 0, 0, 0, 0]
    good += [d, sums, dw, partial, parts]
    _C.separable_conv_bwd_product(*good)
    assert d.eq(5).all() and dw.eq(32).all() and sums[1].eq(160).all()
    d.fill_(7)
    for at, value, message in [
        (1, dy, "z, z_scale, z_shift and z_sums must be given together"),
        (18, 1, "g must be 0 (none) without z; got 1"),
        (10, torch.ones(3, 5), "pointwise must be (J, C) = (5, 3); got (3, 5)"),
        (22, None, "partial must be given"),
        (23, torch.ones(2, 5, 3), "dpartial must be (parts, J, C rounded up to 32) = (2, 5, 32); got (2, 5, 3)"),
        (23, torch.ones(0, 5, 32), "dpartial must have parts; got 0"),
    ]:
        args = list(good)
        args[at] = value
        with pytest.raises(ValueError, match="separable_conv: ") as error:
            _C.separable_conv_bwd_product(*args)
        assert message in str(error.value)
        assert d.eq(7).all()
    with pytest.raises(ValueError, match="separable_conv: d or partial must be given"):
        _C.separable_conv_bwd(dy, dy, None, None, None, torch.ones(2, 5), 1, 1, 1, 1, 0, 0, 0, None, torch.ones(4, 5), None)
    with pytest.raises(ValueError, match="separable_conv: without moments d and partial must be given"):
        _C.separable_conv_bwd(dy, dy, None, None, None, None, 1, 1, 1, 1, 0, 0, 0, None, torch.ones(4, 5), torch.ones(1, 3, 5))


def test_raw_binding_of_a_norm():
    taken, running = torch.tensor([[2.0, 0.0], [3.0, 1.0]]), torch.zeros(2)
    used, scale, shift = torch.ones(2, 2), torch.ones(2), torch.ones(2)
    good = [taken, torch.tensor([4.0, 1.0]), None, torch.ones(2), 0.5, 1.0, 4, running, None, used, scale, shift]
    for at, value, message in [
        (0, taken[0], "taken must be (2, C); got shape (2)"),
        (1, torch.ones(3), "weight must be (C) = (2); got (3)"),
        (6, 1, "count must be at least 2; got 1"),
        (9, None, "used must be given"),
        (10, None, "scale must be given"),
    ]:
        args = list(good)
        args[at] = value
        with pytest.raises(ValueError, match="separable_conv: ") as error:
            _C.separable_conv_norm(*args)
        assert message in str(error.value)
    assert running.eq(0).all() and used.eq(1).all()
    _C.separable_conv_norm(*good)
    assert running.tolist() == [1.5, 0.5] and used[0].equal(taken[0])
    assert used[1].equal(torch.tensor([0.5, 2**-0.5])) and scale[0] == 2 and shift[0] == -4


def test_running_moments_show_in_versions():
    """PackedSeparable's owners ask a buffer's version whether it has changed."""
    leaves, buffers = block_leaves((2, 6, 8, 9), 5), (torch.zeros(5), torch.ones(5))
    norm = BatchNorm(*leaves[5:7], *buffers, training=True)
    versions = [t._version for t in buffers]
    separable_conv2d(*leaves[:3], None, None, 1, 1, pointwise_norm=norm)
    assert all(t._version > v for t, v in zip(buffers, versions, strict=True)) and buffers[0].abs().sum() > 0
