"""separable_conv2d over MobileNet's blocks against its two halves, each by whatever is fastest: torch's convolutions (NCHW,
channels_last) and mlcore's depthwise one; in inference with folded norms, and a training step with batch norms.

The row "mlcore, two ops" is what the fused op has to beat: mlcore's depthwise convolution and torch's pointwise one, both in
channels_last. flops are those of both convolutions; training counts three times as many. extra.saved_bytes is what autograd
keeps between forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from harness import Group, relative_error

from mlcore import ops


@dataclass(frozen=True)
class Block:
    batch: int
    channels: int
    size: int
    out: int
    stride: int = 1

    def __str__(self) -> str:
        shape = f"({self.batch},{self.channels},{self.size},{self.size})"
        return f"{shape} to {self.out}" + f" s{self.stride}" * (self.stride > 1)


SHAPES = [(32, 112, 64, 1), (64, 112, 128, 2), (128, 56, 128, 1), (256, 28, 256, 1), (512, 14, 512, 1), (1024, 7, 1024, 1)]
BLOCKS = [Block(batch, c, s, j, stride) for batch in (1, 8) for c, s, j, stride in SHAPES]


def tensors(block: Block):
    generator = torch.Generator().manual_seed(0)
    C, J = block.channels, block.out
    x = torch.randn(block.batch, C, block.size, block.size, generator=generator)
    depthwise = torch.randn(C, 1, 3, 3, generator=generator) / 3
    pointwise = torch.randn(J, C, 1, 1, generator=generator) / C**0.5
    vectors = [torch.randn(n, generator=generator) / 4 for n in (C, J)]
    return x, depthwise, pointwise, *vectors


def separate(depthwise_conv, block):
    def run(x, depthwise, pointwise, b, c):
        h = depthwise_conv(x, depthwise, b, block.stride, 1)
        return F.conv2d(h.relu_(), pointwise, c).relu_()

    return run


def torch_depthwise(x, weight, bias, stride, padding):
    return F.conv2d(x, weight, bias, stride, padding, 1, x.shape[1])


def inference(block: Block) -> Group:
    given = tensors(block)
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given]
    fused = ops.PackedSeparable(*last[1:], block.stride, 1, activation="relu", pointwise_activation="relu")
    rows = {
        "mlcore": lambda: fused(last[0]),
        "mlcore, two ops": lambda: separate(ops.depthwise_conv2d, block)(*last),
        "torch": lambda: separate(torch_depthwise, block)(*given),
        "torch (channels_last)": lambda: separate(torch_depthwise, block)(*last),
    }
    want = separate(torch_depthwise, block)(*(t.double() for t in given))

    def check(row, got):
        error = relative_error(got, want)
        assert error < 2e-5, f"{row}: relative error {error}"
        return error

    pixels = want.numel() // block.out
    flops = 2 * pixels * block.channels * (9 + block.out)
    return Group({name: torch.no_grad()(call) for name, call in rows.items()}, check, flops=flops)


def saved_bytes(run, leaves) -> int:
    """Bytes of different storages that autograd saves, the leaves' own left out."""
    own, seen = {t.untyped_storage().data_ptr() for t in leaves}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(*leaves)
    del y
    return sum(seen.values())


def training(block: Block) -> Group:
    x, depthwise, pointwise, *_ = tensors(block)
    C, J = block.channels, block.out
    norms = [torch.ones(C), torch.zeros(C), torch.ones(J), torch.zeros(J)]

    def two(depthwise_conv):
        def run(x, depthwise, pointwise, a, b, c, d):
            h = F.relu(F.batch_norm(depthwise_conv(x, depthwise, None, block.stride, 1), None, None, a, b, True))
            return F.relu(F.batch_norm(F.conv2d(h, pointwise), None, None, c, d, True))

        return run

    def one(x, depthwise, pointwise, a, b, c, d):
        words = {"norm": ops.BatchNorm(a, b, training=True), "pointwise_norm": ops.BatchNorm(c, d, training=True)}
        words |= {"activation": "relu", "pointwise_activation": "relu"}
        return ops.separable_conv2d(x, depthwise, pointwise, None, None, block.stride, 1, **words)

    def leaves(last, dtype=torch.float32):
        made = [x, depthwise, pointwise, *norms]
        made = [t.to(memory_format=torch.channels_last) if last and t.dim() == 4 else t for t in made]
        return [t.to(dtype).detach().requires_grad_() for t in made]

    seed = torch.randn(two(torch_depthwise)(x, depthwise, pointwise, *norms).shape, generator=torch.Generator().manual_seed(1))

    def step(run, own):
        grad = seed.to(memory_format=torch.channels_last) if own[0].is_contiguous(memory_format=torch.channels_last) else seed
        return lambda: list(torch.autograd.grad(run(*own), own, grad.to(own[0].dtype)))

    runs = {
        "mlcore": (one, leaves(True)),
        "mlcore, two ops": (two(ops.depthwise_conv2d), leaves(True)),
        "torch": (two(torch_depthwise), leaves(False)),
        "torch (channels_last)": (two(torch_depthwise), leaves(True)),
    }
    want = step(two(torch_depthwise), leaves(False, torch.float64))()

    def check(row, got):
        error = max(relative_error(a, b) for a, b in zip(got[:3], want[:3], strict=True))
        assert error < 1e-2, (
            f"{row}: relative error {error}"
        )  # a relu takes the other side of 0 here and there: 2e-3 in torch too
        return error

    flops = 6 * (seed.numel() // J) * C * (9 + J)
    extra = {name: {"saved_bytes": saved_bytes(*run)} for name, run in runs.items()}
    return Group({name: step(*run) for name, run in runs.items()}, check, flops=flops, extra=extra)


@pytest.mark.parametrize("row", ["mlcore", "mlcore, two ops", "torch", "torch (channels_last)"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_separable_conv(race, block, mode, row):
    race(f"separable_conv float32 {mode} {block}", row, lambda: (inference if mode == "inference" else training)(block))
