"""A small convolutional net and made-up data for it, to export without writing a line of code:

    edgekit export examples/small_cnn.py:make_net --example-shape 1x3x32x32 --target executorch \\
        --calibrate examples/small_cnn.py:calibration

The weights are random but seeded: the commands can be tried, the answers mean nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CLASSES = 10


class Block(nn.Module):
    """Depthwise-separable as in MobileNetV2: expand, filter, project, and add what came in."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = _convolution(channels, wide, 1)
        self.filter = _convolution(wide, wide, 3, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return `[batch, channels, height, width]`."""
        result: Tensor = x + self.project(self.filter(self.expand(x)))
        return result


class SmallCNN(nn.Module):
    """Images `[batch, 3, 32, 32]` to logits `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, 3, stride=2)
        self.blocks = nn.Sequential(Block(32), _convolution(32, 64, 3, stride=2), Block(64))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.pool(self.blocks(self.stem(images)))
        result: Tensor = self.head(torch.flatten(x, 1))
        return result


def make_net() -> nn.Module:
    """Return the net; batch norms have seen data, as after training."""
    torch.manual_seed(0)
    net = SmallCNN()
    with torch.no_grad():
        for images in calibration():
            net(images)
    return net.eval()


def calibration() -> Iterator[Tensor]:
    """Yield eight mini-batches; real ones would be images like those that the net will see."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        yield torch.randn(32, 3, 32, 32, generator=generator)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())
