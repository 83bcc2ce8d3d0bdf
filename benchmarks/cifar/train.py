"""Train one of the benchmark's nets on CIFAR-10, in float.

    python -m benchmarks.cifar.train mobilenet --data cifar10-jpg.zip --out FOLDER

Writes FOLDER/mobilenet.safetensors. Killed and started again it goes on after the last whole epoch;
every batch is a function of the seed, the epoch and the step, so a resumed run computes what an
uninterrupted one does. Progress goes to stderr.

The recipe is the ordinary one for such nets: SGD with Nesterov momentum, one cycle of the learning
rate, weight decay on every parameter, label smoothing, crops and flips.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.cifar.data import DEFAULT_CACHE, SIZE, Cifar, Split, load, normalise
from benchmarks.cifar.nets import NETS, make_net
from edgekit.common.files import new_file
from edgekit.errors import EdgekitError

BATCH = 64
PAD = 4
WARM_UP = 0.25
"""Share of the steps in which the learning rate rises to its peak."""
TEST_BATCH = 500


@dataclass(frozen=True)
class Training:
    """How a net is trained; the defaults are those of the table."""

    epochs: int = 12
    peak: float = 0.4
    momentum: float = 0.9
    decay: float = 7.5e-4
    smoothing: float = 0.1
    seed: int = 0
    width: float = 1.0


def augmented(split: Split, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of whole batches: shuffled, shifted by up to 4 pixels, half of them mirrored.

    The last pictures that fill no batch are left out.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    for chosen in order.split(BATCH)[: len(split) // BATCH]:
        padded = F.pad(split.images[chosen], [PAD] * 4)
        tops, lefts = torch.randint(2 * PAD + 1, (2, BATCH, 1), generator=generator)
        mirrored = torch.rand(BATCH, 1, generator=generator) < 0.5
        rows = tops + torch.arange(SIZE)
        columns = lefts + torch.where(mirrored, torch.arange(SIZE).flip(0), torch.arange(SIZE))
        which = torch.arange(BATCH)[:, None, None]
        crops = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        yield normalise(crops.permute(0, 3, 1, 2)), split.labels[chosen]


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Return the rate of a step: up in a line, down in a line to nearly 0."""
    done = (step + 1) / (steps + 1)
    share = done / WARM_UP if done < WARM_UP else (1 - done) / (1 - WARM_UP)
    return training.peak * share


def decayed(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the parameters for an optimizer: all decay but depthwise filters and their norms.

    Those have few weights and want little or no decay (arXiv 1704.04861, section 3.2).
    """
    spared: set[int] = set()
    parts = list(net.modules())
    for part, following in pairwise(parts):
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            spared |= {id(p) for p in [*part.parameters(), *following.parameters()]}
    return [
        {"params": [p for p in net.parameters() if id(p) not in spared], "weight_decay": decay},
        {"params": [p for p in net.parameters() if id(p) in spared], "weight_decay": 0.0},
    ]


def accuracy(net: nn.Module, split: Split) -> float:
    """Return the share of pictures that the net, in inference form, gives its label first."""
    net.eval()
    with torch.inference_mode():
        right = sum(
            int((net(images).argmax(1) == labels).sum())
            for images, labels in split.batches(TEST_BATCH)
        )
    return right / len(split)


def train(name: str, training: Training, data: Cifar, folder: Path) -> nn.Module:
    """Train, or go on from what `folder` holds; write and return the net."""
    torch.manual_seed(training.seed)
    net = make_net(name, training.width)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    optimizer = torch.optim.SGD(
        decayed(net, training.decay), training.peak, training.momentum, nesterov=True
    )
    partial = folder / f"{name}.partial.safetensors"
    first = _resume(net, optimizer, partial, training) if partial.exists() else 0
    for epoch in range(first, training.epochs):
        started = time.perf_counter()
        loss = _epoch(net, optimizer, training, data.train, epoch)
        _checkpoint(net, optimizer, partial, training, epoch + 1)
        print(
            f"{name}: epoch {epoch + 1} of {training.epochs}: loss {loss:.3f}, "
            f"test {accuracy(net, data.test):.2%}, {time.perf_counter() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    save_net(net, folder / f"{name}.safetensors", name, training.width)
    partial.unlink(missing_ok=True)
    return net


def save_net(net: nn.Module, path: Path, name: str, width: float) -> None:
    """Write a net's weights, with what `load_net` needs to make it again."""
    with new_file(path) as scratch:
        save_file(_contiguous(net.state_dict()), scratch, {"net": name, "width": str(width)})


def load_net(path: Path) -> nn.Module:
    """Return the net that `save_net` wrote, in inference form."""
    if not path.is_file():
        raise EdgekitError(f"{path}: does not exist; benchmarks.cifar.train makes it")
    with safe_open(path, "pt") as file:
        described = file.metadata() or {}
    if not {"net", "width"} <= described.keys():
        raise EdgekitError(f"{path}: was not written by benchmarks.cifar.train")
    net = make_net(described["net"], float(described["width"]))
    net.load_state_dict(load_file(path))
    return net.eval()


def _epoch(
    net: nn.Module, optimizer: torch.optim.SGD, training: Training, split: Split, epoch: int
) -> float:
    """Train one epoch; return the mean loss."""
    net.train()
    each = len(split) // BATCH
    total = 0.0
    for number, (images, labels) in enumerate(augmented(split, training.seed, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, epoch * each + number, training.epochs * each)
        scores = net(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(scores, labels, label_smoothing=training.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return total / each


def _checkpoint(
    net: nn.Module, optimizer: torch.optim.SGD, path: Path, training: Training, epochs: int
) -> None:
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        state[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    with new_file(path) as scratch:
        save_file(_contiguous(state), scratch, {"training": repr(training), "epochs": str(epochs)})


def _resume(net: nn.Module, optimizer: torch.optim.SGD, path: Path, training: Training) -> int:
    """Load what `_checkpoint` wrote; return how many epochs it has seen."""
    with safe_open(path, "pt") as file:
        described = file.metadata() or {}
    if described.get("training") != repr(training):
        raise EdgekitError(
            f"{path}: is of other settings, {described.get('training')}: delete it or give those"
        )
    state = load_file(path)
    net.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})
    for name, parameter in net.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = state[f"momentum.{name}"]
    return int(described["epochs"])


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().contiguous() for key, value in state.items()}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command of this package takes."""
    parser.add_argument("--data", type=Path, required=True, metavar="ZIP", help="CIFAR-10 as JPEGs")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, metavar="FOLDER",
        help="for the decoded pixels (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="for checkpoints and exported files; outside the repository",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", choices=sorted(NETS))
    add_data_options(parser)
    defaults = Training()
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--peak", type=float, default=defaults.peak, help="learning rate")
    parser.add_argument("--decay", type=float, default=defaults.decay, help="of the weights")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--width", type=float, default=defaults.width)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    training = Training(
        epochs=arguments.epochs, peak=arguments.peak, decay=arguments.decay,
        seed=arguments.seed, width=arguments.width,
    )  # fmt: skip
    try:
        train(arguments.net, training, load(arguments.data, arguments.cache), arguments.out)
    except EdgekitError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
