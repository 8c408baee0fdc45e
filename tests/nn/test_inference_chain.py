"""nn.InferenceChain and ChainedBlocks: when one op serves modules, that it computes what they do, how it follows changes."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from mlcore.models import cnn
from mlcore.nn import ChainedBlocks, ConvNorm2d, DepthwiseConv2d, DepthwiseSeparableConv2d, PointwiseConv2d

SMALL = cnn.MobileNetConfig(width=0.35, classes=7)


def randomised(model):
    """Norms away from their first values; with means of both signs."""
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.dim() == 1:
            t.normal_(std=0.2) if name.endswith(("bias", "mean")) else t.uniform_(0.5, 1.5)
    return model.eval()


def blocks():
    stem = ConvNorm2d(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
    plain = DepthwiseSeparableConv2d(8, 8, norm=None, bias=True, residual=True)
    last = ChainedBlocks(cnn.InvertedResidual(20, 20, 1, 3))
    return randomised(ChainedBlocks(stem, plain, nn.Sequential(PointwiseConv2d(8, 20)), last, nn.Sequential()))


def packed(model):
    """The chain that serves this model now, or None."""
    return model._chain._kept[2]


def one_by_one(model, x):
    """What the modules say without a chain: a hook on one of them makes them run one by one."""
    calls = []
    with next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(lambda *a: calls.append(1)):
        y = model(x)
    assert calls
    return y


@pytest.mark.parametrize("kind", [cnn.MobileNetV1, cnn.MobileNetV2])
def test_mobilenets_run_as_one_op(kind):
    model, x = randomised(kind(SMALL)), torch.randn(3, 3, 65, 47)
    with torch.no_grad():
        got = model(x)
        assert packed(model) is not None
        torch.testing.assert_close(got, one_by_one(model, x), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), got) and packed(model) is not None
        torch.testing.assert_close(model.half().float()(x), got, rtol=0.05, atol=0.05)
        assert model(x[:0]).shape == (0, 7)


def test_blocks():
    model, x = blocks(), torch.randn(2, 3, 30, 31)
    with torch.no_grad():
        got = model(x)
        assert packed(model) is not None and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, nn.Sequential.forward(model, x), rtol=1e-5, atol=1e-5)
    assert not [name for name in model.state_dict() if "chain" in name]
    assert model[1:3](got.new_ones(1, 8, 5, 5)).shape == (1, 20, 5, 5)


def test_changes_are_noticed():
    model, x = blocks(), torch.randn(2, 3, 20, 20)

    def follows():
        before = model(x)
        yield
        after = model(x)
        assert packed(model) is not None and not torch.equal(before, after)
        torch.testing.assert_close(after, nn.Sequential.forward(model, x), rtol=1e-5, atol=1e-5)
        yield

    def change(do):
        step = follows()
        next(step), do(), next(step)

    with torch.no_grad():
        change(lambda: model[1].pointwise.weight.mul_(1.5))
        change(lambda: setattr(model[1].depthwise, "weight", nn.Parameter(torch.randn(8, 1, 3, 3))))
        change(lambda: model[0][1].running_mean.add_(1))
        change(lambda: setattr(model[0][1], "eps", 0.5))
        change(lambda: setattr(model[3][0], "residual", False))
        change(lambda: setattr(model[2][0], "pointwise_activation", nn.Identity()))
        change(lambda: model.load_state_dict(blocks().state_dict()))
        change(lambda: model[2].append(PointwiseConv2d(20, 20).eval()))
        change(lambda: model[4].append(PointwiseConv2d(20, 20).eval()))


@pytest.mark.parametrize("make", [blocks, lambda: blocks()[1], lambda: blocks()[0]], ids=["chain", "block", "convolution"])
def test_writes_that_torch_does_not_count(make):
    """Other memory under a parameter is seen at once, a write through .data after the next eval()."""
    model = make()
    weight = next(model.parameters())
    x = torch.randn(1, weight.shape[1] if weight.shape[1] > 1 else 8, 17, 16)
    with torch.no_grad():
        seen = [model(x)]

        def check():
            seen.append(model(x))
            torch.testing.assert_close(seen[-1], copy.deepcopy(model)(x))
            assert not torch.equal(*seen[-2:])

        old = weight.data
        weight.data = weight.data * 2
        check()
        weight.data = old
        check()
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * 1.5, model.parameters())
        check()
        weight.data.mul_(2)
        model.eval()
        check()


def test_tensors_of_inference_mode():
    """They have no version; and a network in bfloat16 doesn't take float32, chain or not."""
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        model = randomised(cnn.MobileNetV2(SMALL))
        y = model(x)
        assert packed(model) is not None
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
        torch.testing.assert_close(one_by_one(model, x), y, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="BFloat16"):
            randomised(cnn.MobileNetV2(SMALL)).bfloat16()(x)


def test_a_trace_holds_the_layers():
    model, x = randomised(cnn.MobileNetV1(SMALL)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), y, rtol=1e-4, atol=1e-4)
        assert packed(model) is not None
    assert set(dict(traced.named_parameters())) == set(dict(model.named_parameters()))


def test_what_runs_one_by_one():
    model, x = blocks(), torch.randn(1, 3, 18, 18)
    with torch.no_grad():
        want = model(x)
    chain = packed(model)
    assert chain is not None
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert model(x).requires_grad
    torch.testing.assert_close(model(x).detach(), want, **close)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x).detach(), want, **close)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x.double()).float(), want, **close)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - want).norm() < 0.05 * want.norm()
        for hook in ("register_forward_hook", "register_forward_pre_hook"):
            calls = []
            with getattr(model[3][0].separable.pointwise_norm, hook)(lambda *a, calls=calls: calls.append(1)):
                torch.testing.assert_close(model(x), want, **close)
            assert calls == [1]
        with nn.modules.module.register_module_forward_hook(lambda m, *a: calls.append(m)):
            torch.testing.assert_close(model(x), want, **close)
        assert model[3][0].separable in calls
        model[1].forward = lambda t: calls.append("own") or DepthwiseSeparableConv2d.forward(model[1], t)
        torch.testing.assert_close(model(x), want, **close)
        assert calls[-1] == "own"
        del model[1].forward
        model[1].pointwise_activation = nn.GELU()
        assert not torch.equal(model(x), want) and packed(model) is None
        model[1].pointwise_activation = nn.ReLU()
        torch.testing.assert_close(model(x), want, **close)
        assert packed(model) is not None
        model.train()
        model(x)
        assert model[0][1].num_batches_tracked == 1


class Doubled(PointwiseConv2d):
    def forward(self, x, residual=None):
        return 2 * super().forward(x, residual)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Doubled(8, 8),
        lambda: DepthwiseSeparableConv2d(8, 8, multiplier=2),
        lambda: nn.MaxPool2d(2),
        lambda: ConvNorm2d(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: PointwiseConv2d(8, 8, norm=nn.InstanceNorm2d),
        lambda: DepthwiseSeparableConv2d(8, 8, activation=nn.GELU),
    ],
)
def test_modules_that_no_chain_serves(other):
    model = randomised(ChainedBlocks(ConvNorm2d(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), other()))
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
        assert packed(model) is None
    residual_of_x = randomised(ChainedBlocks(DepthwiseSeparableConv2d(3, 3, residual=True)))
    with torch.no_grad():
        torch.testing.assert_close(residual_of_x(x), nn.Sequential.forward(residual_of_x, x))
    assert ChainedBlocks()(x) is x


def test_a_replaced_convolution_keeps_its_padding_mode():
    model, x = blocks(), torch.randn(1, 3, 16, 16)
    model[1].depthwise = DepthwiseConv2d(8, 8, 3, padding=1, padding_mode="circular")
    with torch.no_grad():
        torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
        assert packed(model) is None


def test_copies_and_threads():
    model, x = blocks(), torch.randn(2, 3, 21, 17)
    with torch.no_grad():
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert packed(other) is None and torch.equal(other(x), want)
        fresh, got = copy.deepcopy(model), []

        def run():
            with torch.no_grad():
                got.append(fresh(x))

        threads = [threading.Thread(target=run) for _ in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert len(got) == 4 and all(torch.equal(y, want) for y in got)
