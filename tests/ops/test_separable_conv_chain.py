"""mlcore.ops.PackedChain: every kind of layer against float64 convolutions, batches, threads, residuals and errors."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from mlcore import _C, testing
from mlcore.ops import BatchNorm, PackedChain, PackedConv, PackedSeparable

KERNELS = [name for name in testing.available("separable_conv", "cpu") if name != "reference"]
FUNCTIONS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}


def norm(channels):
    return BatchNorm(torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels) / 4, torch.rand(channels) + 0.5)


class Net:
    """Layers as a PackedChain takes them, and as torch computes them in float64."""

    def __init__(self, channels):
        self.channels, self.packed, self.run, self.residuals = channels, [], [], {}

    def conv(self, J, kernel, *numbers, activation=None):
        weight, bias, n = torch.randn(J, self.channels, *kernel) / 4, torch.randn(J), norm(J)
        self.packed.append(PackedConv(weight, bias, *numbers, norm=n, activation=activation))
        return self._add(J, lambda x: self.normed(F.conv2d(x, weight.double(), bias.double(), *numbers), n, activation))

    def separable(self, J, kernel=None, *numbers, f=None, g=None, normed=True, residual=None):
        C, bias, bias_after = self.channels, torch.randn(self.channels) / 4, torch.randn(J) / 4
        depthwise = None if kernel is None else torch.randn(C, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5
        pointwise, first, last = torch.randn(J, C, 1, 1) / C**0.5, norm(C) if normed else None, norm(J) if normed else None
        if kernel is None:
            first = bias = None
        words = {"norm": first, "pointwise_norm": last, "activation": f, "pointwise_activation": g}
        self.packed.append(PackedSeparable(depthwise, pointwise, bias, bias_after, *numbers, **words))

        def run(x):
            if kernel is not None:
                stride, padding, dilation = (*numbers, *(1, 0, 1)[len(numbers) :])
                if not isinstance(padding, int) and isinstance(padding[0], tuple):
                    x, padding = F.pad(x, (*padding[1], *padding[0])), 0
                x = F.conv2d(x, depthwise.double(), bias.double(), stride, padding, dilation, C)
            x = self.normed(x, first, f)
            return self.normed(F.conv2d(x, pointwise.double(), bias_after.double()), last, g)

        if residual is not None:
            self.residuals[len(self.packed) - 1] = residual
        return self._add(J, run)

    def mean(self):
        self.packed.append("mean")
        return self._add(self.channels, lambda x: x.mean((2, 3), keepdim=True))

    def _add(self, J, run):
        self.channels = J
        self.run.append(run)
        return self

    @staticmethod
    def normed(x, n, activation):
        if n is not None:
            x = F.batch_norm(x, n.running_mean.double(), n.running_var.double(), n.weight.double(), n.bias.double())
        return FUNCTIONS[activation](x)

    def want(self, x):
        made = []
        for i, run in enumerate(self.run):
            x = run(x.double() if i == 0 else x)
            x = x + made[self.residuals[i]] if i in self.residuals else x
            made.append(x)
        return x

    def chain(self):
        return PackedChain(self.packed, self.residuals)


def mobile(width=1):
    """A stem, plain and inverted blocks with and without residuals, a mean and a classifier."""
    net = Net(3).conv(16 * width, (3, 3), 2, 1, activation="relu6")
    net.separable(24 * width, (3, 3), 1, 1, f="relu6", g="relu6")
    net.separable(72 * width, g="relu6").separable(24 * width, (3, 3), 1, 1, f="relu6", residual=1)
    net.separable(144 * width, g="relu").separable(40 * width, (3, 3), 2, 1, f="silu", g="silu")
    net.separable(40 * width, (5, 5), 1, 2, f="relu6", g="silu", residual=5)
    return net.separable(200 * width, g="silu").mean().separable(11, normed=False)


def check(net, x, name=None, tolerance=2e-5):
    want = net.want(x)
    with testing.use(name or f"cpu[{_C.best_isa()}]"):
        got = net.chain()(x)
    assert got.shape == want.shape and got.dtype == torch.float32
    if got.numel():
        error = (got.double() - want).norm() / want.norm()
        assert error < tolerance, error
    return got


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(1, 3, 33, 27), (3, 3, 20, 37), (8, 3, 31, 18), (0, 3, 9, 9)], ids=str)
def test_a_network(name, shape):
    check(mobile(), torch.randn(shape), name)


SINGLES = {
    "one channel": (Net(1).separable(1), (2, 1, 1, 1)),
    "odd channels": (Net(5).separable(7, (3, 3), 1, 1, f="relu"), (2, 5, 13, 11)),
    "wide": (Net(130).separable(203, (3, 3), 1, 1), (3, 130, 7, 7)),
    "deep": (Net(700).separable(70, g="relu6"), (2, 700, 5, 3)),
    "dilated": (Net(24).separable(33, (3, 3), 1, 2, 2), (1, 24, 19, 14)),
    "rectangular": (Net(9).separable(16, (2, 5), (2, 1), (0, 2), (3, 2), f="silu"), (2, 9, 20, 21)),
    "asymmetric": (Net(8).separable(8, (3, 3), 1, ((0, 2), (1, 1))), (2, 8, 6, 30)),
    "norm before a pointwise layer": (Net(17).separable(5, (1, 1), f="relu"), (2, 17, 6, 5)),
    "patches": (Net(2).conv(70, (5, 4), (2, 3), (2, 1), activation="silu"), (3, 2, 17, 40)),
    "patches, stride 1": (Net(3).conv(20, (3, 3), 1, 2, 2), (2, 3, 40, 39)),
    "one row": (Net(40).separable(3, (1, 9), 1, (0, 4)), (1, 40, 1, 300)),
    # Expanded to more than a core's cache holds, which then exists in strips alone.
    "expanded": (Net(5).separable(96, g="relu6").separable(24, (3, 3), 1, 1, f="relu6"), (3, 5, 87, 69)),
    "expanded, stride 2": (Net(8).separable(8).separable(100, g="silu").separable(8, (3, 3), 2, 1), (2, 8, 90, 85)),
    "expanded, dilated": (Net(3).separable(70).separable(9, (5, 3), (1, 2), (4, 0), (3, 2), g="silu"), (1, 3, 90, 131)),
    "expanded, residual": (
        Net(8).separable(16).separable(90, g="relu").separable(16, (3, 3), 1, 1, residual=0),
        (2, 8, 85, 82),
    ),
    "mean": (Net(19).separable(19).mean(), (3, 19, 30, 7)),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", SINGLES)
def test_single_layers(name, case):
    net, shape = SINGLES[case]
    check(net, torch.randn(shape), name)


def test_layouts_of_x():
    for net, shape in (SINGLES["patches"], SINGLES["odd channels"]):
        chain, x = net.chain(), torch.randn(shape)
        want = chain(x)
        assert want.is_contiguous(memory_format=torch.channels_last)
        wide = torch.randn(shape[0], shape[1], shape[2] + 1, 2 * shape[3])
        wide[:, :, 1:, ::2] = x
        for same in (x.contiguous(memory_format=torch.channels_last), wide[:, :, 1:, ::2], x.transpose(2, 3).contiguous().mT):
            assert torch.equal(chain(same), want)
        one = x[:1].expand(shape)
        assert torch.equal(chain(one), chain(one.contiguous()))


@pytest.mark.parametrize("width", [1, 3])
def test_bits_depend_on_nothing_else(width):
    """Neither on threads nor on the batch, over sizes that go through the arena one after the other; of the largest the
    expanded layers exist in strips alone with one thread, and whole with eight.
    """
    chain, threads = mobile(width).chain(), torch.get_num_threads()
    batches = [torch.randn(n, 3, s, s) for n, s in ((19, 33), (1, 60), (5, 17), (2, 171))]
    want = [chain(x) for x in batches]
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert all(torch.equal(chain(x), y) for x, y in zip(batches, want, strict=True))
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(batches, want, strict=True):
        assert torch.equal(torch.cat([chain(x[i : i + 1]) for i in range(len(x))]), y)


def test_nan_stays_in_its_image():
    chain, x = mobile().chain(), torch.randn(4, 3, 33, 20)
    want = chain(x)
    x[2, 1, 5, 5] = float("nan")
    got = chain(x)
    assert got[2].isnan().all() and torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])


def test_two_chains_at_once():
    nets = [mobile().chain(), mobile(2).chain()]
    x = [torch.randn(2, 3, 40, 33), torch.randn(5, 3, 19, 19)]
    want = [chain(t) for chain, t in zip(nets, x, strict=True)]
    for _ in range(3):
        assert all(torch.equal(chain(t), y) for chain, t, y in zip(nets, x, want, strict=True))
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(nets[i](x[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_refusals():
    layer, x = PackedSeparable(None, torch.randn(4, 6, 1, 1)), torch.randn(1, 6, 5, 5)
    conv = PackedConv(torch.randn(6, 3, 3, 3))
    for layers, residuals, text in (
        ([], {}, "there must be layers"),
        (["mean"], {}, 'layer 0 must be packed, or "mean" behind another'),
        ([layer, conv], {}, "layer 1 must be a PackedSeparable, or the first a PackedConv; got PackedConv"),
        ([layer, layer], {}, "layer 1 must take the 4 channels of the one before; got 6"),
        ([layer], {0: 0}, "a residual must come from an earlier layer; got 0: 0 of 1 layers"),
    ):
        with pytest.raises(ValueError, match=f"PackedChain: {text}"):
            PackedChain(layers, residuals)
    chain = PackedChain([layer])
    for wrong, text in (
        (x[:, :5], r"x must be \(N, 6, H, W\); got \(1, 5, 5, 5\)"),
        (x.double(), "x must be torch.float32 on the CPU; got torch.float64 on cpu"),
        (x.clone().requires_grad_(), "it has no gradients"),
    ):
        with pytest.raises(ValueError, match=f"PackedChain: {text}"):
            chain(wrong)
    with pytest.raises(ValueError, match="layer 0: its kernel is larger than its padded input; got 2 x 2"):
        PackedChain([conv])(torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="layer 1: the residual must have its shape; got layer 0"):
        PackedChain([conv, layer], {1: 0})(torch.randn(1, 3, 9, 9))
    assert not chain.serves(x.double()) and chain.serves(x)


def test_the_kernel_checks_its_table():
    chain = PackedChain([PackedSeparable(torch.randn(6, 1, 3, 3), torch.randn(4, 6, 1, 1), padding=1)])
    x, y = (torch.zeros(1, c, 5, 5).contiguous(memory_format=torch.channels_last) for c in (6, 4))
    for field, value, text in (
        (0, 4, "layer 0: the kind must be 0 to 3; got 4"),
        (1, 5, "layer 0: it takes 5 channels; got 6"),
        (5, 0, "layer 0: sizes must be positive and paddings not negative; got 0"),
        (13, 7, "layer 0: an activation must be 0 to 3; got 7"),
        (15, 0, "layer 0: the residual must be an earlier layer; got 0"),
        (18, 8, "layer 0: pointwise must lie within the weights at a multiple of 16; got 8"),
        (19, 1 << 40, "layer 0: bias must lie within the weights"),
    ):
        table = chain._table.clone()
        table[0, field] = value
        with pytest.raises(ValueError, match=f"separable_conv: {text}"):
            _C.separable_conv_chain(x, chain._weights, table, y)
    with pytest.raises(ValueError, match="x must be dense in channels_last"):
        _C.separable_conv_chain(x.contiguous(), chain._weights, chain._table, y)
    with pytest.raises(ValueError, match="layers must be"):
        _C.separable_conv_chain(x, chain._weights, chain._table[:, :19].contiguous(), y)
    with pytest.raises(ValueError, match="weights must be given"):
        _C.separable_conv_reserve(None)
