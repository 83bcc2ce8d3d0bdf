"""The two nets of the benchmark, for pictures of 32 x 32.

`mobilenet` is the whitepaper's hard case: depthwise-separable blocks, each convolution followed by
batch norm and ReLU6 (arXiv 1704.04861, table 1, cut to 32 x 32 pictures). `resnet` is its easy one:
residual blocks of two 3 x 3 convolutions with batch norm and ReLU (arXiv 1512.03385).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.cifar.data import CLASSES
from edgekit.errors import EdgekitError

IMAGE = (3, 32, 32)


class DepthwiseSeparable(nn.Sequential):
    """A depthwise 3 x 3 convolution, then a pointwise one."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a projection, or beside nothing where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.skip = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.skip.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.skip.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm_one(self.one(x)))
        result: Tensor = self.relu(self.norm_two(self.two(y)) + self.skip(x))
        return result


class Net(nn.Module):
    """A stem at 32 x 32, blocks at 16, 8 and 4, a linear layer.

    `blocks` are output channels at width 1, and stride.
    """

    def __init__(
        self,
        width: float,
        stem: int,
        activation: nn.Module,
        block: Callable[[int, int, int], nn.Module],
        blocks: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        channels = int(stem * width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), activation
        )
        made = []
        for base, stride in blocks:
            made.append(block(channels, int(base * width), stride))
            channels = int(base * width)
        self.blocks = nn.Sequential(*made)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return result


class MobileNet(Net):
    """Seven separable blocks."""

    BLOCKS = ((32, 2), (32, 1), (64, 2), (64, 1), (64, 1), (128, 2), (128, 1))

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width, 16, nn.ReLU6(), DepthwiseSeparable, self.BLOCKS)


class ResNet(Net):
    """Three residual blocks."""

    BLOCKS = ((24, 2), (48, 2), (96, 2))

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width, 24, nn.ReLU(), Residual, self.BLOCKS)


NETS: dict[str, Callable[[float], nn.Module]] = {"mobilenet": MobileNet, "resnet": ResNet}


def make_net(name: str, width: float = 1.0) -> nn.Module:
    """Return a net of random weights, from torch's generator."""
    if name not in NETS:
        raise EdgekitError(f"unknown net {name!r:.40}: allowed are {', '.join(NETS)}")
    return NETS[name](width)
