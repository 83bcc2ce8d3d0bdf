"""Codebooks of a convolutional net on CIFAR-10, step by step, as `benchmarks.jlcm` for lfm2-tiny.

    python -m benchmarks.cifar.train mobilenet --data DATA --out DIR      (trains the net once)
    python -m benchmarks.jlcm_conv DIR/mobilenet.safetensors --data DATA
        [--rows cb3 ...] [-o benchmarks/results/jlcm-mobilenet.json]

Weights alone: every convolution is a matrix of its patches `[out, in * height * width]`; depthwise
ones, whose rows have nine weights, are int8 in each row. What calibrates are training pictures,
what is scored are test pictures: accuracy, and the divergence from the float net's classes.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar.data import DEFAULT_CACHE, load, normalise
from benchmarks.cifar.train import load_net
from benchmarks.jlcm import CODEBOOKS, METHODS, run, wanted
from benchmarks.machine import facts
from benchmarks.report import table
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.gptq import Inputs
from edgekit.quantize.schemes.names import parse_scheme

ROWS = ("rtn:float", "mse:w4") + tuple(
    f"{method}:{scheme}" for scheme in ("cb4", "cb3", "cb2") for method in CODEBOOKS
)
POSITIONS = 64
"""Patches of each picture that are seen in calibration."""


def patches(layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return what the matrix of a layer is multiplied with, `[n, columns]`."""
    if isinstance(layer, nn.Linear):
        return x
    assert isinstance(layer, nn.Conv2d)
    found = nn.functional.unfold(
        x, layer.kernel_size, layer.dilation, layer.padding, layer.stride
    ).transpose(1, 2)
    places = torch.randperm(found.shape[1], generator=generator)[:POSITIONS]
    return found[:, places].flatten(0, 1)


def inputs_of(net: nn.Module, name: str, images: Tensor) -> Tensor:
    """Run a net and return what one of its layers sees."""
    seen: list[Tensor] = []
    layer = net.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        net(images)
    finally:
        hook.remove()
    return patches(layer, seen[0], torch.Generator().manual_seed(0))


def quantize(net: nn.Module, row: str, images: Tensor) -> tuple[nn.Module, float]:
    """Return a net with a row's weights, layer after layer, and its bits per weight."""
    method, _, name = row.partition(":")
    made, scheme = copy.deepcopy(net), parse_scheme(name)
    stored, count = 0, 0
    for place, layer in made.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        count += layer.weight.numel()
        weight = layer.weight.detach().flatten(1)
        small = isinstance(layer, nn.Conv2d) and layer.groups > 1
        kind = parse_scheme("w8") if small and not scheme.is_float else scheme
        if kind.is_float:
            stored += kind.nbytes(tuple(weight.shape))
            continue
        choose = METHODS[method]
        if choose is None or small:
            codes = quantize_weight(kind, weight, "minmax" if method == "rtn" else None)
        else:
            inputs = Inputs(weight.shape[1])
            inputs.add_inputs(inputs_of(made, place, images), inputs_of(net, place, images))
            codes = choose(weight, inputs, kind)
        stored += codes.nbytes
        layer.weight.data = codes.dequantize().view_as(layer.weight)
    return made, 8 * stored / count


@torch.inference_mode()
def measured(net: nn.Module, row: str, images: Tensor, test: Any, batch: int) -> dict[str, Any]:  # noqa: ANN401
    """Quantize a row's way and score it."""
    made, bits = quantize(net, row, images)
    right, kld = 0, 0.0
    for x, labels in test.batches(batch):
        exact, found = (torch.log_softmax(each(x).double(), 1) for each in (net, made))
        right += int((found.argmax(1) == labels).sum())
        kld += float((exact.exp() * (exact - found)).sum())
    return {
        "row": row,
        "bits_per_weight": bits,
        "accuracy": right / len(test),
        "kld": kld / len(test),
        "pictures": len(test),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    cells = [
        [
            *reversed(row["row"].split(":")),
            f"{row['bits_per_weight']:.3f}",
            f"{100 * row['accuracy']:.2f} %",
            f"{row['kld']:.4f}",
        ]
        for row in rows
    ]
    return table(("scheme", "method", "bits per weight", "accuracy", "mean KLD"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("net", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10/cifar10-jpg.zip"))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument("--calibrate", type=int, default=256, help="Training pictures")
    parser.add_argument("--score", type=int, default=10_000, help="Test pictures")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load(arguments.data, arguments.cache)
    net = load_net(arguments.net).eval()
    images = normalise(data.train.images[:: max(1, len(data.train) // arguments.calibrate)])
    test = type(data.test)(
        data.test.images[:: 10_000 // arguments.score],
        data.test.labels[:: 10_000 // arguments.score],
    )
    record: dict[str, Any] = {"machine": facts(), "net": arguments.net.stem, "rows": []}
    run(
        wanted(arguments.rows),
        lambda row: measured(net, row, images, test, 250),
        markdown,
        record,
        arguments.output,
    )


if __name__ == "__main__":
    main()
