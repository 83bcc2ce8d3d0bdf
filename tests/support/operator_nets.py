"""One small net for each operator that a traced module may hold, and where engines run it in float.

Most stand between two quantized convolutions, where nothing may be float unless it says so here.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE, SEQUENCE = (3, 12, 12), (3, 16)


@dataclass(frozen=True)
class Case:
    """`layers` run on integers; `onnx` and `executorch` are the engines' own names of the rest.

    `scheme` is one that both engines hold.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: int = 2
    onnx: dict[str, int] = field(default_factory=dict)
    executorch: dict[str, int] = field(default_factory=dict)
    scheme: str = "w8a8"


class Between(nn.Module):
    """A function or a module between two convolutions."""

    def __init__(self, axes: int, channels: int, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        convolution = nn.Conv1d if axes == 1 else nn.Conv2d
        self.first = convolution(3, 6, 3, padding=1)
        self.inner = inner
        self.last = convolution(channels, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.inner(self.first(x)))
        return result


class Lookup(nn.Module):
    """An embedding, a grouped convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.mix = nn.Conv1d(6, 4, 3, groups=2)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.mix(self.table(tokens).transpose(1, 2)))
        return result


def _images(inner: Callable[[Tensor], Tensor], channels: int = 6, **said: object) -> Case:
    return Case(lambda: Between(2, channels, copy.deepcopy(inner)), IMAGE, **said)  # type: ignore[arg-type]


def _sequences(inner: Callable[[Tensor], Tensor], **said: object) -> Case:
    return Case(lambda: Between(1, 6, copy.deepcopy(inner)), SEQUENCE, **said)  # type: ignore[arg-type]


def _chain(shape: tuple[int, ...], *layers: Callable[[], nn.Module], **said: object) -> Case:
    return Case(lambda: nn.Sequential(*(layer() for layer in layers)), shape, **said)  # type: ignore[arg-type]


def _split(x: Tensor) -> Tensor:
    left, right = torch.chunk(x, 2, 1)
    return torch.cat([right, left], 1)


def _last_row(x: Tensor) -> Tensor:
    return x[:, :, -1].unsqueeze(2) + x


_SHAPED = {"aten::unsqueeze_copy.out": 1, "aten::squeeze_copy.dims_out": 1}

CASES = {
    "linear": _chain((10,), lambda: nn.Linear(10, 8), nn.ReLU, lambda: nn.Linear(8, 4)),
    "linear of three axes": _chain((5, 10), lambda: nn.Linear(10, 8), lambda: nn.Linear(8, 4)),
    "conv1d": _chain(
        (6, 30),
        lambda: nn.Conv1d(6, 12, 3, groups=3),
        lambda: nn.Conv1d(12, 12, 3, groups=12),
        lambda: nn.Conv1d(12, 4, 3, dilation=2),
        lambda: nn.Conv1d(4, 4, 4, stride=2, padding=1),
        layers=4,
    ),
    "conv2d": _chain(
        (6, 20, 20),
        lambda: nn.Conv2d(6, 12, 3, groups=3),
        lambda: nn.Conv2d(12, 24, 3, groups=12),
        lambda: nn.Conv2d(24, 4, 3, dilation=2),
        lambda: nn.Conv2d(4, 4, (4, 3), stride=(2, 1), padding=(0, 1)),
        layers=4,
    ),
    "conv_transpose1d": _chain(
        (6, 8),
        lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU,
        lambda: nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2),
        scheme="w8a8-tensor",
    ),
    "conv_transpose2d": _chain(
        (6, 6, 6),
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU6,
        lambda: nn.ConvTranspose2d(4, 3, 2, dilation=2),
    ),
    "grouped conv_transpose2d": _chain(
        (6, 6, 6),
        lambda: nn.ConvTranspose2d(6, 6, 3, stride=2, groups=6),
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1),
        scheme="w8a8-tensor",
    ),
    "embedding": Case(Lookup, (7,), onnx={"Gather": 1, "Cast": 1, "Mul": 1}),
    "folded batch norm": _images(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())),
    "batch norm alone": _images(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6)), layers=3),
    "batch norm over time": _sequences(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6)), layers=3),
    "batch norm of vectors": _chain(
        (10,),
        lambda: nn.Linear(10, 8),
        nn.ReLU,
        lambda: nn.BatchNorm1d(8),
        lambda: nn.Linear(8, 4),
        onnx={"Mul": 1, "Add": 1},
        executorch={"Multiply": 1, "Add": 1},
    ),
    "add": _images(lambda x: x + torch.relu(x)),
    "add, then relu6": _images(lambda x: functional.relu6(x + torch.relu(x))),
    "sub": _images(lambda x: x - torch.relu(x), onnx={"Sub": 1}),
    "mul": _images(lambda x: x * torch.relu(x)),
    "relu6": _images(nn.ReLU6()),
    "clamp": _images(lambda x: torch.clamp(x, min=0)),
    "clamp at one end": _images(lambda x: torch.clamp_max(x.clamp_min(-0.4).clamp(min=-3), 0.5)),
    "clamp above the range": _images(lambda x: functional.max_pool2d(x, 3, 1, 1).clamp(0.1, 9)),
    "silu": _images(
        nn.SiLU(), onnx={"Sigmoid": 1, "Mul": 1}, executorch={"Sigmoid": 1, "Multiply": 1}
    ),
    "hardswish": _images(
        nn.Hardswish(), onnx={"HardSigmoid": 1, "Mul": 1}, executorch={"Hardswish": 1}
    ),
    "sigmoid": _images(nn.Sigmoid(), executorch={"Sigmoid": 1}),
    "average pool": _images(nn.AvgPool2d(2), executorch={"AvgPooling2d": 1}),
    "average over time": _sequences(nn.AvgPool1d(2), executorch={"AvgPooling2d": 1, **_SHAPED}),
    "maximum pool": _images(nn.MaxPool2d(3, 2, 1)),
    "maximum over time": _sequences(nn.MaxPool1d(2), executorch=_SHAPED),
    "adaptive average": _images(
        nn.AdaptiveAvgPool2d(4), executorch={"aten::_adaptive_avg_pool2d.out": 1}
    ),
    "adaptive average over time": _sequences(nn.AdaptiveAvgPool1d(1), executorch=_SHAPED),
    "adaptive maximum": _images(nn.AdaptiveMaxPool2d(4)),
    "global average": _images(nn.AdaptiveAvgPool2d(1)),
    "concat": _images(
        lambda x: torch.cat([x, torch.relu(x), functional.max_pool2d(x, 3, 1, 1)], 1), 18
    ),
    "split": _images(_split, executorch={"aten::slice_copy.Tensor_out": 2}),
    "circular padding": _images(
        lambda x: functional.pad(x, (2, 0, 1, 3), mode="circular")[..., 1:, :],
        executorch={"aten::slice_copy.Tensor_out": 4},
    ),
    "select": _images(_last_row, executorch={"aten::slice_copy.Tensor_out": 1, **_SHAPED}),
}


def trained(name: str) -> nn.Module:
    """Return a net whose batch norms have seen data, in inference form."""
    torch.manual_seed(0)
    net = CASES[name].make().train()
    with torch.no_grad():
        for seed in range(3):
            net(inputs(name, 8, seed))
    return net.eval()


def inputs(name: str, size: int, seed: int = 0) -> Tensor:
    """Return seeded inputs `[size, ...]` of a net."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, *CASES[name].shape)
    if name == "embedding":
        return torch.randint(0, 20, shape, generator=generator)
    return torch.randn(shape, generator=generator)
