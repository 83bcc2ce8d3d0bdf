"""Small nets with each operator of a traced module, seeded, with trained-looking batch norms."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgekit.quantize.traced.calibrate import calibrate
from edgekit.quantize.traced.fold import fold_batch_norms
from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
from edgekit.quantize.traced.placement import place
from edgekit.quantize.traced.schemes import LayerRecipe
from edgekit.quantize.traced.trace import TracedModule, trace


class Separable(nn.Module):
    """Depthwise-separable as in MobileNet: batch norm and ReLU6 after each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 8, 3, stride=2, padding=1)
        self.depthwise = _block(8, 8, 3, padding=1, groups=8)
        self.pointwise = _block(8, 12, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.pointwise(self.depthwise(self.stem(x))))
        result: Tensor = self.head(torch.flatten(x, 1))
        return result


class Residual(nn.Module):
    """Two residual blocks, the second with a projection: additions followed by ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.norm(self.one(x)))
        x = self.relu(self.two(x) + self.skip(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Sequence(nn.Module):
    """Convolutions over time: causal and depthwise, dilated, strided."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.dilated = nn.Conv1d(6, 8, 3, dilation=2, padding="same")
        self.norm = nn.BatchNorm1d(8)
        self.strided = nn.Conv1d(8, 4, 4, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.depthwise(functional.pad(x, (2, 0))))
        result: Tensor = self.strided(torch.relu(self.norm(self.dilated(x))))
        return result


class Joined(nn.Module):
    """Branches that are joined, pooled by maximum and average, and hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Conv2d(10, 4, 3, dilation=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([torch.relu(self.left(x)), functional.hardswish(self.right(x))], 1)
        x = self.last(functional.max_pool2d(x, 2))
        return x, functional.avg_pool2d(x, 2)


class Upsampling(nn.Module):
    """Transposed convolutions: strided with odd padding, and grouped in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, 2, (2, 3), stride=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.narrow(x))
        result: Tensor = self.last(functional.relu6(self.norm(self.up(x))))
        return result


class Tokens(nn.Module):
    """An embedding, a layer norm that stays float, linear layers over three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return result


def _block(inputs: int, outputs: int, kernel: int, **options: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


IMAGES = (3, 16, 16)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "separable": (Separable, IMAGES),
    "residual": (Residual, IMAGES),
    "sequence": (Sequence, (6, 20)),
    "joined": (Joined, IMAGES),
    "upsampling": (Upsampling, IMAGES),
    "tokens": (Tokens, (7,)),
}


def make_net(name: str) -> nn.Module:
    """Return a net whose batch norms have seen data, in inference form."""
    torch.manual_seed(0)
    factory, _ = NETS[name]
    net = factory()
    net.train()
    with torch.no_grad():
        for seed in range(5):
            net(batch_for(name, 8, seed) if name == "tokens" else batch_for(name, 8, seed) * 1.5)
    return net.eval()


def batch_for(name: str, size: int, seed: int = 0) -> Tensor:
    """Return seeded inputs `[size, ...]` of a net."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (size, *NETS[name][1])
    if name == "tokens":
        return torch.randint(0, 20, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@lru_cache
def quantized(name: str, scheme: str, max_batch: int = 16) -> QuantizedNetwork:
    """Return a net quantized with one scheme, calibrated on four mini-batches."""
    placement = place(_folded(name, max_batch), LayerRecipe.uniform(scheme))
    batches = [batch_for(name, 8, seed) for seed in range(4)]
    return quantize_module(placement, calibrate(placement, batches) if placement.edges else None)


@lru_cache
def _folded(name: str, max_batch: int) -> TracedModule:
    return fold_batch_norms(trace(make_net(name), (batch_for(name, 4),), max_batch))


def steps_apart(network: QuantizedNetwork, actual: list[NDArray[Any]], inputs: Tensor) -> Tensor:
    """Return how many steps of the outputs' codes engine and simulation differ by, flat."""
    found = []
    simulated = network.simulate(inputs)
    for node, ours, theirs in zip(network.traced.outputs, simulated, actual, strict=True):
        assert theirs.shape == tuple(ours.shape)
        edge = network.edges.get(node.name)
        step = edge.scale if edge else float(ours.abs().max()) / 255
        found.append((torch.from_numpy(theirs) - ours).abs().flatten() / step)
    return torch.cat(found)
