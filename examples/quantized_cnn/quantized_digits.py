"""A binary and a 2-bit CNN learn scikit-learn's digits with straight-through gradients, then are packed: the served networks
count bits, and must give the logits of the trained ones, bit by bit. Data and augmentation are examples/cnn/digits.py's.

    python examples/quantized_cnn/quantized_digits.py
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mlcore.nn import BinaryConv2d, BinaryLinear
from mlcore.ops import binary_conv2d, dorefa_activations, dorefa_weights, pack_binary_conv

sys.path.append(str(Path(__file__).parents[1] / "cnn"))
import digits


class BinaryBlock(nn.Module):
    """A binary convolution and a norm, with Bi-Real Net's shortcut (Liu et al. 2018) where it fits."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = BinaryConv2d(channels, out, 3, padding=1, bias=False, estimator="approx")
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + x if y.shape == x.shape else y


class Conv2Bit(nn.Conv2d):
    """A convolution with DoReFa's 2-bit activations a / 3 (a from 0 to 3) and weights w / 3 (w one of -3, -1, 1, 3)."""

    def forward(self, x):
        a, w = (whole(3 * t) for t in (dorefa_activations(x, 2), dorefa_weights(self.weight, 2)))
        return F.conv2d(a, w, None, self.stride, self.padding) / 9  # the sum is an exact integer

    def pack(self) -> PackedConv2Bit:
        return PackedConv2Bit(self)


def whole(x):
    """x rounded to whole numbers, with the gradient of x."""
    return x + (x.round() - x).detach()


class PackedConv2Bit(nn.Module):
    """The same from signs: w = 2 s1 + s0 and a = (3 + 2 t1 + t0) / 2 with all of them -1 or 1, so that
    sum a w = (3 sum w + sum (2 t1 + t0)(2 s1 + s0)) / 2. Two images of signs meet twice the filters in one binary_conv2d; sum w
    is that of an image of ones, which knows what lies in the padding.
    """

    def __init__(self, conv: Conv2Bit) -> None:
        super().__init__()
        w = (3 * dorefa_weights(conv.weight.detach(), 2)).round()
        high = torch.where(w < 0, -1.0, 1.0)
        self.packed = pack_binary_conv(torch.cat([high, w - 2 * high]), w.new_ones(2 * len(w)))
        self.how = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}

    def forward(self, x):
        a = (3 * dorefa_activations(x, 2)).round()
        high = torch.where(a < 2, -1.0, 1.0)
        signs = torch.cat([high, 2 * a - 3 - 2 * high, torch.ones_like(x[:1])])
        s1, s0 = binary_conv2d(signs, self.packed, **self.how).chunk(2, 1)
        t1, t0, ones = (2 * s1 + s0).split([len(x), len(x), 1])
        return (3 * ones + 2 * t1 + t0) / 2 / 9


def binary_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),  # the first layer sees grey values, the last one gives logits: both real
        nn.BatchNorm2d(32),
        BinaryBlock(32, 64),
        nn.MaxPool2d(2),
        BinaryBlock(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        BinaryLinear(64 * 16, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.Hardtanh(),
        nn.Linear(128, 10),
    )


def two_bit_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        Conv2Bit(32, 64, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(64),
        Conv2Bit(64, 64, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(64),
        Conv2Bit(64, 128, 4, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


NETWORKS = {"binary": (binary_network, 0.96), "2-bit": (two_bit_network, 0.98)}  # and the accuracy to reach


def packed(model: nn.Module) -> nn.Module:
    """A copy in which every layer that can be packed is."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "pack"):
                setattr(module, name, child.pack())
    return model


def check_served(model: nn.Module, x: torch.Tensor) -> None:
    """Raises where the packed network's logits for x differ from the trained one's in any bit."""
    with torch.no_grad():
        trained, served = model.eval()(x), packed(model)(x)
    if not torch.equal(trained, served):
        raise AssertionError(f"served logits differ from the trained network's by up to {(trained - served).abs().max()}")


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Of the layers that are packed: as float32, and packed."""
    layers = [m for m in model.modules() if hasattr(m, "pack")]
    return sum(4 * m.weight.numel() for m in layers), sum(m.pack().packed.nbytes for m in layers)


def train(name: str, train_set, test_set, epochs: int, seed: int = 0):
    """The trained model and its history."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]()
    return model, digits.fit(name, model, train_set, test_set, epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="steps are too short to gain from more")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_set, test_set = digits.digits(options.seed)
    for name in options.networks:
        model, history = train(name, train_set, test_set, options.epochs, options.seed)
        check_served(model, test_set[0])
        accuracy, (real, small) = history[-1][1], weight_bytes(model)
        print(f"{name}: test accuracy {accuracy:.2%} of {len(test_set[1])} images; packed, the same logits to the bit;")
        print(f"  weights of the packed layers: {real} bytes in float32, {small} packed")
        assert accuracy >= NETWORKS[name][1], f"{name}: {NETWORKS[name][1]:.0%} was to be reached"


if __name__ == "__main__":
    main()
