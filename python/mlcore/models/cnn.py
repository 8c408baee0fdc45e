"""Convolutional networks: the lectures' CNN, AlphaGo's policy network, VGG, MobileNet V1 and V2, ConvNeXt's block.

Images are (N, channels, H, W); every network returns logits, and probabilities() their softmax. For inference call
model.eval() under torch.no_grad(): norms are folded and pointwise weights packed by the blocks themselves, once, and a
MobileNet is one op (nn.InferenceChain). Weights of torchvision and timm are read by load_weights (_cnn_weights.py); what a unit
sees of the image says receptive_field (_receptive_field.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..nn import (
    ConvNorm2d,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    InferenceChain,
    LayerNorm,
    PointwiseConv2d,
    pool2d,
)
from ._cnn_weights import load_weights, rename_weights
from ._receptive_field import Field, receptive_field

__all__ = [
    "VGG",
    "AlphaGoConfig",
    "AlphaGoPolicy",
    "ConvNeXtBlock",
    "Field",
    "LectureCNN",
    "LectureCNNConfig",
    "MobileNetConfig",
    "MobileNetV1",
    "MobileNetV2",
    "VGGConfig",
    "load_weights",
    "receptive_field",
    "rename_weights",
]


class _Classifier(nn.Module):
    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Softmax of the logits, (N, classes)."""
        return self(x).softmax(-1)


@dataclass(frozen=True)
class LectureCNNConfig:
    image: tuple[int, int, int] = (1, 28, 28)  # channels, H, W
    channels: tuple[int, ...] = (32, 64)  # filters of each convolution
    kernel_size: int = 3
    pool: int = 2  # 1: no pooling
    pooling: str = "max"  # or "mean", "min"
    hidden: int = 128  # of the fully connected layer
    classes: int = 10
    separable: bool = False  # after the first convolution depthwise-separable ones, with batch norm
    dropout: float = 0.0  # before the last layer


class LectureCNN(_Classifier):
    """Convolution, pooling, convolution, pooling, ..., flatten, fully connected, softmax (Hung-yi Lee, lecture "CNN")."""

    def __init__(self, config: LectureCNNConfig = LectureCNNConfig()) -> None:
        super().__init__()
        self.config = config
        before, height, width = config.image
        layers = []
        for i, channels in enumerate(config.channels):
            if config.separable and i > 0:
                layers.append(DepthwiseSeparableConv2d(before, channels, config.kernel_size))
            else:
                layers += [nn.Conv2d(before, channels, config.kernel_size, padding="same"), nn.ReLU()]
            if config.pool > 1:
                layers.append(pool2d(config.pooling, config.pool))
                height, width = height // config.pool, width // config.pool
            before = channels
        if height * width == 0:
            raise ValueError(f"LectureCNN: {len(config.channels)} poolings by {config.pool} leave nothing of {config.image}")
        self.features = nn.Sequential(*layers)
        head = [nn.Linear(before * height * width, config.hidden), nn.ReLU(), nn.Dropout(config.dropout)]
        self.classifier = nn.Sequential(*head, nn.Linear(config.hidden, config.classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


@dataclass(frozen=True)
class AlphaGoConfig:
    board: int = 19
    planes: int = 48
    filters: int = 192
    layers: int = 12  # the first one 5x5, the others 3x3


class AlphaGoPolicy(_Classifier):
    """The policy network of Silver et al. 2016: (N, planes, board, board) -> logits (N, board * board). No pooling: on a board
    half of the points can't be left out. The last 1x1 convolution has one filter and a bias of its own at each point.
    """

    def __init__(self, config: AlphaGoConfig = AlphaGoConfig()) -> None:
        super().__init__()
        self.config = config
        layers = [nn.Conv2d(config.planes, config.filters, 5, padding=2), nn.ReLU()]
        for _ in range(config.layers - 1):
            layers += [nn.Conv2d(config.filters, config.filters, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.policy = nn.Conv2d(config.filters, 1, 1, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(config.board * config.board))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (self.config.board,) * 2:
            raise ValueError(
                f"AlphaGoPolicy: the board must be {self.config.board} x {self.config.board}; got {tuple(x.shape)}"
            )
        return self.policy(self.features(x)).flatten(1) + self.position_bias


@dataclass(frozen=True)
class VGGConfig:
    stages: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # VGG-11
    in_channels: int = 3
    batch_norm: bool = False
    hidden: int = 4096
    classes: int = 1000
    dropout: float = 0.5


class VGG(_Classifier):
    """Simonyan and Zisserman 2014: stages of 3x3 convolutions, each ended by max pooling, then three fully connected layers.
    Modules are numbered as torchvision's are.
    """

    def __init__(self, config: VGGConfig = VGGConfig()) -> None:
        super().__init__()
        self.config = config
        layers, before = [], config.in_channels
        for stage in config.stages:
            for channels in stage:
                layers.append(nn.Conv2d(before, channels, 3, padding=1))
                layers += [nn.BatchNorm2d(channels)] * config.batch_norm + [nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        hidden, drop = config.hidden, config.dropout
        head = [nn.Linear(before * 49, hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(hidden, hidden), nn.ReLU()]
        self.classifier = nn.Sequential(*head, nn.Dropout(drop), nn.Linear(hidden, config.classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@dataclass(frozen=True)
class MobileNetConfig:
    width: float = 1.0  # multiplier of all channels
    in_channels: int = 3
    classes: int = 1000
    dropout: float = 0.2
    divisor: int = 8  # channels are rounded to multiples of it


def _scaled(channels: int, config: MobileNetConfig) -> int:
    """channels * width, rounded to a multiple of the divisor, downwards by a tenth at most, as both papers' code has it."""
    wanted, d = channels * config.width, config.divisor
    rounded = max(d, int(wanted + d / 2) // d * d)
    return rounded + d if rounded < 0.9 * wanted else rounded


class _MobileNet(_Classifier):
    """stem, blocks, mean over the image, classifier; in channels_last, where every layer is at its best. In inference all of it
    is one op where nn.InferenceChain serves it.
    """

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = _scaled(32, config)
        self.stem = ConvNorm2d(
            nn.Conv2d(config.in_channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()
        )
        blocks, last = self._make_blocks(channels)
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(last, config.classes)
        self._chain = InferenceChain()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):  # He et al. 2015; torch's own would make the last layers' outputs vanish
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def train(self, mode: bool = True):
        self._chain.forget()
        return super().train(mode)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and self._pooled.__func__ is _MobileNet._pooled:
            head = (self.dropout, self.classifier) if type(self.classifier) is nn.Linear else ()
            y = self._chain(x, (self.stem, self.blocks, "mean", *head))
            if y is not None:
                return y.flatten(1) if head else self.classifier(self.dropout(y.flatten(1)))
        return self.classifier(self.dropout(self._pooled(x)))


class MobileNetV1(_MobileNet):
    """Howard et al. 2017: thirteen depthwise-separable convolutions."""

    _BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self, config: MobileNetConfig = MobileNetConfig()) -> None:
        super().__init__(config)

    def _make_blocks(self, before: int) -> tuple[list[nn.Module], int]:
        blocks = []
        for channels, stride in self._BLOCKS:
            after = _scaled(channels, self.config)
            blocks.append(DepthwiseSeparableConv2d(before, after, stride=stride, activation=nn.ReLU6))
            before = after
        return blocks, before


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 to `expand` times the channels, depthwise, 1x1 back without an activation, plus x where the
    shapes allow it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = in_channels * expand
        self.expand = PointwiseConv2d(in_channels, inner, activation=nn.ReLU6) if expand != 1 else None
        self.separable = DepthwiseSeparableConv2d(
            inner, out_channels, stride=stride, activation=nn.ReLU6, pointwise_activation=None
        )
        self.residual = stride == 1 and in_channels == out_channels

    def chain_links(self):
        """The layers of an nn.InferenceChain."""
        links = [] if self.expand is None else self.expand.chain_links()
        (pack, _), *_ = self.separable.chain_links()
        return [*links, (pack, 1 + len(links) if self.residual else None)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.expand is None else self.expand(x)
        return self.separable(h, x if self.residual else None)


class MobileNetV2(_MobileNet):
    """Sandler et al. 2018: inverted residuals with linear bottlenecks."""

    _STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, config: MobileNetConfig = MobileNetConfig()) -> None:
        super().__init__(config)

    def _make_blocks(self, before: int) -> tuple[list[nn.Module], int]:
        blocks = []
        for expand, channels, count, stride in self._STAGES:
            for i in range(count):
                after = _scaled(channels, self.config)
                blocks.append(InvertedResidual(before, after, stride if i == 0 else 1, expand))
                before = after
        last = _scaled(1280, self.config) if self.config.width > 1 else 1280
        return [*blocks, PointwiseConv2d(before, last, activation=nn.ReLU6)], last


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: 7x7 depthwise convolution, layer norm over channels, a feed-forward network of four times the width,
    a scale per channel, plus x. Computed in channels_last, where norm and feed-forward network see rows of channels.
    """

    def __init__(self, channels: int, kernel_size: int = 7, expand: int = 4, layer_scale: float = 1e-6) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.norm = LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, expand * channels)
        self.project = nn.Linear(expand * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.depthwise(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))
        h = self.project(nn.functional.gelu(self.expand(h))) * self.layer_scale
        return x + h.permute(0, 3, 1, 2)
