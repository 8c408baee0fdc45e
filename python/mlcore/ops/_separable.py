"""What separable_conv registers with torch, and its gradients. The public functions are in separable_conv.py, the equations in
kernels/separable_conv/separable_conv.h.

The kernels take x with contiguous channels and the pointwise weights in blocks; a norm reaches them as one scale and shift a
channel. `moments` is (2, C) float32: mean and variance where they are taken, mean and rstd where they are used.
"""

from __future__ import annotations

import torch

from .._registry import create_graph, direct, graph_gradients, kernel, register
from ..kernels.separable_conv import separable_conv_ref as ref

OP = "separable_conv"
_BLOCK, _ROWS = 64, 16  # kBlock and kPartialRows of separable_conv_kernels.h


def blocks_of(matrix):
    """(K, N) as the kernel takes pointwise weights."""
    K, N = matrix.shape
    padded = torch.nn.functional.pad(matrix.to(torch.float32), (0, -N % _BLOCK, 0, -K % _BLOCK))
    return padded.view(-(-K // _BLOCK), _BLOCK, -(-N // _BLOCK), _BLOCK).permute(2, 0, 1, 3).contiguous()


def _weights(matrix, impl):
    """(J, C) as `impl` takes it in a call that isn't repeated: the CPU's kernel brings it into blocks itself."""
    return wide(matrix.detach()) if impl == "cpu" else blocks_of(matrix.detach().t())


def channels_last(t):
    return t if t is None or t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def wide(t):
    return t if t is None or (t.dtype is torch.float32 and t.is_contiguous()) else t.to(torch.float32).contiguous()


def _new(x, shape):
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _floats(x, *shape):
    return x.new_empty(shape, dtype=torch.float32)


def hidden_size(x, depthwise, numbers):
    kernel_size = (1, 1) if depthwise is None else depthwise.shape[1:]
    stride, dilation, pad = numbers[:2], numbers[2:4], numbers[4:]
    return tuple(
        (n + pad[2 * i] + pad[2 * i + 1] - (k - 1) * dilation[i] - 1) // stride[i] + 1
        for i, (n, k) in enumerate(zip(x.shape[2:], kernel_size, strict=True))
    )


def geometry(numbers):
    """What kernels take of numbers: strides, dilations and the padding before."""
    return (*numbers[:4], numbers[4], numbers[6])


#: The numbers of no convolution at all: h is x.
PLAIN = (1, 1, 1, 1, 0, 0, 0, 0)


def _run_fwd(x, depthwise, scale, shift, blocks, bias, residual, channels, numbers, f, g, want_moments, impl):
    x, residual = channels_last(x), channels_last(residual)
    size = hidden_size(x, depthwise, numbers)
    y = _new(x, (x.shape[0], channels, *size))
    partial = moments = None
    if want_moments:
        partial, moments = _floats(x, x.shape[0] * size[0], 3, channels), _floats(x, 2, channels)
    tensors = (x, wide(depthwise), wide(scale), wide(shift), blocks, wide(bias), residual)
    kernel(OP, "fwd", impl)(*tensors, *geometry(numbers), 0, 0, f, g, y, partial, moments)
    return y, x.new_empty(0) if moments is None else moments


def _partial(x, size):
    return _floats(x, -(-x.shape[0] * size[0] // _ROWS), 3, x.shape[1])


def _run_hidden(x, depthwise, scale, shift, residual, numbers, f, impl):
    x, residual, size = channels_last(x), channels_last(residual), hidden_size(x, depthwise, numbers)
    a = _new(x, (*x.shape[:2], *size))
    tensors = (x, wide(depthwise), wide(scale), wide(shift), residual)
    kernel(OP, "hidden", impl)(*tensors, *geometry(numbers), f, *size, a, None, None)
    return a


def _run_moments(x, depthwise, numbers, impl):
    x, size, moments = channels_last(x), hidden_size(x, depthwise, numbers), _floats(x, 2, x.shape[1])
    tensors = (x, wide(depthwise), None, None, None)
    kernel(OP, "hidden", impl)(*tensors, *geometry(numbers), 0, *size, None, _partial(x, size), moments)
    return moments


def _back(da, x, depthwise, scale, shift, moments, numbers, f, impl, d, sums=None):
    """d and the sums; d may be da itself, or None where the sums alone are wanted. Given sums aren't taken."""
    tensors = (da, x, wide(depthwise), wide(scale), wide(shift), moments)
    partial = None if sums is not None else _partial(x, da.shape[2:])
    sums = _floats(x, 4, x.shape[1]) if sums is None else sums
    kernel(OP, "bwd", impl)(*tensors, *geometry(numbers), f, d, sums, partial)
    return d, sums


def _run_bwd(da, x, depthwise, scale, shift, moments, numbers, f, impl):
    x = channels_last(x)
    return _back(channels_last(da), x, depthwise, scale, shift, moments, numbers, f, impl, _new(x, da.shape))


def _fwd_fake(x, depthwise, scale, shift, blocks, bias, residual, channels, numbers, f, g, want_moments, impl):
    y = _new(x, (x.shape[0], channels, *hidden_size(x, depthwise, numbers)))
    return y, _floats(x, 2, channels) if want_moments else x.new_empty(0)


def _hidden_fake(x, depthwise, scale, shift, residual, numbers, f, impl):
    return _new(x, (*x.shape[:2], *hidden_size(x, depthwise, numbers)))


def _moments_fake(x, depthwise, numbers, impl):
    return _floats(x, 2, x.shape[1])


def _bwd_fake(da, x, depthwise, scale, shift, moments, numbers, f, impl):
    return _new(x, da.shape), _floats(x, 4, x.shape[1])


_HIDDEN = "Tensor x, Tensor? depthwise, Tensor? scale, Tensor? shift"
_fwd = register(
    f"separable_conv_fwd({_HIDDEN}, Tensor blocks, Tensor? bias, Tensor? residual, SymInt channels, SymInt[] numbers, int f,"
    " int g, bool want_moments, str impl) -> (Tensor y, Tensor moments)",
    launch=_run_fwd,
    fake=_fwd_fake,
)
_hidden = register(
    f"separable_conv_hidden({_HIDDEN}, Tensor? residual, SymInt[] numbers, int f, str impl) -> Tensor",
    launch=_run_hidden,
    fake=_hidden_fake,
)
_moments = register(
    "separable_conv_moments(Tensor x, Tensor? depthwise, SymInt[] numbers, str impl) -> Tensor",
    launch=_run_moments,
    fake=_moments_fake,
)
_bwd = register(
    f"separable_conv_bwd(Tensor da, {_HIDDEN}, Tensor? moments, SymInt[] numbers, int f, str impl) -> (Tensor d, Tensor sums)",
    launch=_run_bwd,
    fake=_bwd_fake,
)


def forward(x, depthwise, residual, *rest):
    return (_run_fwd if direct(x, depthwise, residual) else _fwd)(x, depthwise, *rest[:3], rest[3], residual, *rest[4:])


def hidden(x, *rest):
    return (_run_hidden if direct(x) else _hidden)(x, *rest)


def moments_of(x, depthwise, numbers, impl):
    return (_run_moments if direct(x, depthwise) else _moments)(x, depthwise, numbers, impl)


def _affine(weight, bias, moments):
    """scale and shift of a norm; without moments weight and bias are these already."""
    if moments is None:
        return weight, bias
    mean, rstd = moments.unbind(0)
    scale = rstd if weight is None else weight * rstd
    return scale, -mean * scale if bias is None else bias - mean * scale


def _to(gradient, like):
    return None if like is None else gradient.to(like.dtype)


class SeparableConv(torch.autograd.Function):
    """z = pointwise * f(scale * h + shift), and z's moments where they are wanted. With `moments` scale and shift are a batch
    norm's, whose weight and bias are given, and gradients pass through the moments too.
    """

    @staticmethod
    def forward(ctx, x, depthwise, weight, bias, pointwise, moments, numbers, f, want_moments, impl):
        scale, shift = _affine(weight, bias, moments)
        ctx.numbers, ctx.f, ctx.impl = numbers, f, impl
        ctx.save_for_backward(x, depthwise, weight, bias, pointwise, scale, shift, moments)
        run = _run_fwd if direct(x, depthwise, pointwise) else _fwd
        blocks = _weights(pointwise, impl)
        z, taken = run(x, depthwise, scale, shift, blocks, None, None, pointwise.shape[0], numbers, f, 0, want_moments, impl)
        ctx.mark_non_differentiable(taken)
        return z, taken

    @staticmethod
    def backward(ctx, dz, _=None):
        if create_graph():
            return *_conv_graph(ctx, dz), *(None,) * 5
        *tensors, scale, shift, moments = ctx.saved_tensors
        affine, words = (scale, shift, moments), (ctx.numbers, ctx.f, ctx.impl)
        parts = _parts(ctx.needs_input_grad, dz, tensors, ctx.impl)
        if parts:
            found = _fused_gradients(ctx.needs_input_grad, parts, dz, (None,) * 4, 0, tensors, affine, *words)
        else:
            found = _gradients(ctx.needs_input_grad, dz, tensors, affine, *words)
        return *found, *(None,) * 5


#: Parts that the sums of dpointwise are cut into: pixels of one at least, and how many parts are worth their memory.
_PART_PIXELS, _LEAST_PARTS, _MOST_PARTS = 64, 4, 16


def _parts(need, dz, tensors, impl):
    """How many parts bwd_product is given; 0 where torch's products serve better: few pixels beside the weights, or gradients
    that aren't wanted."""
    x, *_, pointwise = tensors
    if impl != "cpu" or not need[4] or not any(need[:4]) or not direct(dz, x, pointwise):
        return 0
    (J, C), pixels = pointwise.shape, dz.shape[0] * dz.shape[2] * dz.shape[3]
    parts = min(pixels // _PART_PIXELS, pixels * (J + C) // (4 * J * C), _MOST_PARTS)
    return parts if parts >= _LEAST_PARTS else 0


def _fused_gradients(need, parts, dy, last, g, tensors, affine, numbers, f, impl):
    """Of x, depthwise, weight, bias and pointwise; last: z, its scale and shift, and the sums of its norm, None without one."""
    x, depthwise, weight, bias, pointwise = tensors
    (J, C), size, x = pointwise.shape, dy.shape[2:], channels_last(x)
    scale, shift, moments = affine
    d, sums, dpointwise = _new(x, (x.shape[0], C, *size)), _floats(x, 4, C), _floats(x, J, C)
    partials = _floats(x, x.shape[0] * size[0], 3, C), _floats(x, parts, J, -(-C // 32) * 32)
    given = (x, wide(depthwise), wide(scale), wide(shift), moments, wide(pointwise.detach()))
    kernel(OP, "bwd_product", impl)(channels_last(dy), *last, *given, *geometry(numbers), f, g, d, sums, dpointwise, *partials)
    if moments is not None:
        _back(d, x, depthwise, scale, shift, moments, numbers, 0, impl, d, sums)
    dx, ddepthwise = _hidden_gradients(need, d, x, depthwise, numbers, impl)
    return dx, ddepthwise, _to(sums[0], weight), _to(sums[1], bias), dpointwise.to(pointwise.dtype)


def _gradients(need, dz, tensors, affine, numbers, f, impl):
    """The same by torch's products and passes over all of a and da."""
    x, depthwise, weight, bias, pointwise = tensors
    scale, shift, moments = affine
    plain = direct(dz, x, pointwise)
    same = depthwise is None and scale is None and shift is None and f == 0  # then a is x
    J, C = pointwise.shape
    dz_pixels = channels_last(dz).permute(0, 2, 3, 1).reshape(-1, J)
    dpointwise = a = None
    if need[4]:
        run = _run_hidden if plain else _hidden
        a = channels_last(x) if same else run(x, depthwise, scale, shift, None, numbers, f, impl)
        dpointwise = (dz_pixels.t() @ a.permute(0, 2, 3, 1).reshape(-1, C)).to(pointwise.dtype)
    if not any(need[:4]):
        return *(None,) * 4, dpointwise
    if plain and a is not None and not same:  # a is of no more use: its memory, which is there already, takes its gradient
        da = a
        torch.mm(dz_pixels, pointwise.to(dz.dtype), out=da.permute(0, 2, 3, 1).view(-1, C))
    else:
        da = (dz_pixels @ pointwise.to(dz.dtype)).view(dz.shape[0], *dz.shape[2:], C).permute(0, 3, 1, 2)
    if same:
        return da, None, None, None, dpointwise
    args = (da, x, depthwise, scale, shift, moments, numbers, f, impl)
    d, sums = _back(da, channels_last(x), *args[2:], da) if plain else _bwd(*args)
    dx, ddepthwise = _hidden_gradients(need, d, x, depthwise, numbers, impl)
    return dx, ddepthwise, _to(sums[0], weight), _to(sums[1], bias), dpointwise


def _hidden_gradients(need, d, x, depthwise, numbers, impl):
    """Of x and the depthwise weights from d, the gradient of h."""
    need_x, need_weight = need[:2]
    if depthwise is None:
        return d if need_x else None, None
    stride, dilation = ([1, *n] for n in (numbers[:2], numbers[2:4]))
    args = (d, x, wide(depthwise).unsqueeze(1), stride, dilation, [0, 0, *numbers[4:]], need_x, need_weight, impl)
    dx, dweight, _ = torch.ops.mlcore.depthwise_conv_bwd.default(*args)
    return dx if need_x else None, dweight.squeeze(1).to(depthwise.dtype) if need_weight else None


class NormActivation(torch.autograd.Function):
    """f(weight * (x - mean) * rstd + bias) + residual by the batch's moments, through which gradients pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, moments, f, impl):
        scale, shift = _affine(weight, bias, moments)
        ctx.f, ctx.impl = f, impl
        ctx.save_for_backward(x, weight, bias, residual, scale, shift, moments)
        run = _run_hidden if direct(x, weight, residual) else _hidden
        return run(x, None, scale, shift, residual, PLAIN, f, impl)

    @staticmethod
    def backward(ctx, dy):
        if create_graph():
            return *_norm_graph(ctx, dy), None, None, None
        x, weight, bias, _, scale, shift, moments = ctx.saved_tensors
        dx = sums = None
        if any(ctx.needs_input_grad[:3]):
            run = _run_bwd if direct(dy, x) else _bwd
            dx, sums = run(dy, x, None, scale, shift, moments, PLAIN, ctx.f, ctx.impl)
        needed = [n and t is not None for n, t in zip(ctx.needs_input_grad[1:3], (weight, bias), strict=True)]
        dweight, dbias = (_to(sums[i], t) if n else None for i, (n, t) in enumerate(zip(needed, (weight, bias), strict=True)))
        dresidual = dy if ctx.needs_input_grad[3] else None
        return dx if ctx.needs_input_grad[0] else None, dweight, dbias, dresidual, None, None, None


class SeparableBlock(torch.autograd.Function):
    """SeparableConv with NormActivation behind it, where nothing watches the call: the gradient of z is made while backward
    multiplies it. affine: moments, scale and shift of the first norm, or None; settle: from z's moments those of the last one.
    """

    @staticmethod
    def forward(
        ctx, x, depthwise, weight, bias, pointwise, last_weight, last_bias, residual, affine, numbers, f, g, settle, impl
    ):
        moments, scale, shift = (None, weight, bias) if affine is None else affine
        args = (None, None, pointwise.shape[0], numbers, f, 0, True, impl)
        z, taken = _run_fwd(x, depthwise, scale, shift, _weights(pointwise, impl), *args)
        last_moments, last_scale, last_shift = settle(taken)
        ctx.words, ctx.g = (numbers, f, impl), g
        tensors = (x, depthwise, weight, bias, pointwise, last_weight, last_bias, residual)
        ctx.save_for_backward(*tensors, scale, shift, moments, z, last_scale, last_shift, last_moments)
        return _run_hidden(z, None, last_scale, last_shift, residual, PLAIN, g, impl)

    @staticmethod
    def backward(ctx, dy):
        need, (numbers, f, impl), saved = ctx.needs_input_grad, ctx.words, ctx.saved_tensors
        if create_graph():
            return *_block_graph(ctx, dy), *(None,) * 6
        tensors, (last_weight, last_bias), affine = saved[:5], saved[5:7], saved[8:11]
        z, scale, shift, moments = saved[11:]
        parts = _parts(need, dy, tensors, impl)
        args = (z, None, scale, shift, moments, PLAIN, ctx.g, impl)
        if parts:
            dy = channels_last(dy)
            sums = _back(dy, *args, None)[1]
            found = _fused_gradients(need, parts, dy, (z, scale, shift, sums), ctx.g, tensors, affine, numbers, f, impl)
        else:
            dz, sums = (_run_bwd if direct(dy, z) else _bwd)(dy, *args)
            found = _gradients(need, dz, tensors, affine, numbers, f, impl)
        last = _to(sums[0], last_weight), _to(sums[1], last_bias)
        return *found, *last, dy if need[7] else None, *(None,) * 6


def reference(x, depthwise, weight, bias, pointwise, moments, numbers, f):
    """z as SeparableConv has it, in plain torch, a itself where pointwise is None; moments, if there are any, are taken again
    with their graph.
    """
    fine = torch.promote_types(x.dtype, torch.float32)
    h = ref.hidden(x.to(fine), None if depthwise is None else depthwise.to(fine), numbers[:2], numbers[2:4], numbers[4:])
    if moments is not None:
        mean, variance = ref.batch_norm_moments(h)
        eps = moments[1].to(fine).pow(-2).sub(variance).detach()
        weight, bias = _affine(weight, bias, torch.stack([mean, (variance + eps).rsqrt()]))
    weight, bias, pointwise = (None if t is None else t.to(fine) for t in (weight, bias, pointwise))
    return ref.finish(h, weight, bias, pointwise, None, f, 0, None).to(x.dtype)


def _conv_graph(ctx, dz):
    tensors = ctx.saved_tensors[:5]
    with torch.enable_grad():
        z = reference(*tensors, ctx.saved_tensors[7], ctx.numbers, ctx.f)
        return graph_gradients(ctx.needs_input_grad, tensors, (z,), (dz,))


def _block_graph(ctx, dy):
    saved, (numbers, f, _) = ctx.saved_tensors, ctx.words
    with torch.enable_grad():
        z = reference(*saved[:5], saved[10], numbers, f)
        y = reference(z, None, *saved[5:7], None, saved[14], PLAIN, ctx.g)
        y = y if saved[7] is None else y + saved[7]
        return graph_gradients(ctx.needs_input_grad, saved[:8], (y,), (dy,))


def _norm_graph(ctx, dy):
    x, weight, bias, residual = ctx.saved_tensors[:4]
    with torch.enable_grad():
        y = reference(x, None, weight, bias, None, ctx.saved_tensors[6], PLAIN, ctx.f)
        y = y if residual is None else y + residual
        return graph_gradients(ctx.needs_input_grad, (x, weight, bias, residual), (y,), (dy,))
