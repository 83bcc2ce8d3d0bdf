"""The whitepaper's table on the benchmark's nets: top-1 in torch and in the exported files.

    python -m benchmarks.cifar.table mobilenet --data cifar10-jpg.zip --out FOLDER \\
        --record benchmarks/results/cifar-mobilenet.json [--row w8a8 ...]

FOLDER holds the float net of `benchmarks.cifar.train`. A row quantizes it, or trains it through
quantization first (`benchmarks.cifar.finetune`); then it takes the top-1 of the simulation over the
10,000 test pictures, exports it to ExecuTorch and ONNX and takes the top-1 of those files in their
engines. Each row stands in the record as soon as it is measured; `--row` measures only those named.
Prints the table of the whole record.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import edgekit
from benchmarks import machine
from benchmarks.cifar.data import Cifar, Split, load
from benchmarks.cifar.finetune import finetune
from benchmarks.cifar.nets import NETS
from benchmarks.cifar.train import add_data_options, load_net
from edgekit.common.files import new_file
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.network_target import find_module_target
from edgekit.quantize.traced.calibrate import calibrate
from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
from edgekit.workflows.export_network import export_network, place_module


@dataclass(frozen=True)
class Row:
    """A scheme, reached by training through quantization or after training."""

    label: str
    scheme: str
    trained: bool = False


ROWS = {
    "float": Row("float", "float"),
    "w8a8-tensor-affine": Row("W8A8 PTQ, per layer, asymmetric", "w8a8-tensor-affine"),
    "w8a8-tensor": Row("W8A8 PTQ, per layer, symmetric", "w8a8-tensor"),
    "w8a8": Row("W8A8 PTQ, per channel, symmetric", "w8a8"),
    "w8a8-affine": Row("W8A8 PTQ, per channel, asymmetric", "w8a8-affine"),
    "qat-w8a8": Row("W8A8 QAT, per channel, symmetric", "w8a8", trained=True),
    "w4a8-tensor-affine": Row("W4A8 PTQ, per layer, asymmetric", "w4a8-tensor-affine"),
    "w4a8": Row("W4A8 PTQ, per channel, symmetric", "w4a8"),
    "qat-w4a8": Row("W4A8 QAT, per channel, symmetric", "w4a8", trained=True),
}
TARGETS = ("executorch", "onnx")
BATCH = 100
"""Pictures that a file takes at once."""


def quantize(net: nn.Module, row: Row, data: Cifar) -> QuantizedNetwork:
    """Return the net as a row has it; the net is left trained where the row trains it."""
    if row.trained:
        return finetune(net, row.scheme, data, BATCH)
    placement = place_module(net, (data.calibration()[0],), row.scheme, BATCH)
    ranges = calibrate(placement, data.calibration()) if placement.edges else None
    return quantize_module(placement, ranges)


def measure(
    network: QuantizedNetwork, name: str, row: Row, data: Cifar, folder: Path
) -> dict[str, Any]:
    """Return the top-1 in torch and in each engine, or why an engine cannot hold the scheme."""
    found: dict[str, Any] = {"torch": top1(lambda x: network.simulate(x)[0], data.test)}
    for target in TARGETS:
        try:
            find_module_target(target).check_network(network)
        except EdgekitError as error:
            found[target] = str(error)
            continue
        artifact = export_network(
            network,
            (data.calibration()[0],),
            folder / f"{name}-{target}",
            target=target,
            name=folder.name,
            recipe=row.scheme,
            force=True,
        )
        with edgekit.load_module(target, artifact.model_path, torch.get_num_threads()) as engine:
            found[target] = top1(
                lambda x: torch.from_numpy(np.asarray(engine.run([x.numpy()])[0])),
                data.test,
            )
    return found


def top1(run: Callable[[Tensor], Tensor], split: Split) -> float:
    """Return the share of pictures to which `run` gives their label first."""
    right = sum(int((run(x).argmax(1) == labels).sum()) for x, labels in split.batches(BATCH))
    return right / len(split)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown, in the order of `ROWS`; `of float` is in points."""
    lines = [
        "| | torch | of float | ExecuTorch file | ONNX file |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in ROWS.items():
        if name in rows:
            top = rows[name]["torch"]
            compared = name != "float" and "float" in rows
            loss = f"{100 * (top - rows['float']['torch']):+.2f}" if compared else ""
            cells = [_cell(rows[name][target]) for target in TARGETS]
            lines.append(f"| {row.label} | {top:.2%} | {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: float | str) -> str:
    return "cannot hold it" if isinstance(found, str) else f"{found:.2%}"


def read_record(path: Path) -> dict[str, Any]:
    """Return what earlier calls measured."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", choices=sorted(NETS))
    add_data_options(parser)
    parser.add_argument("--record", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        data = load(arguments.data, arguments.cache)
        folder = arguments.out / arguments.net
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.row or ROWS:
            net = load_net(arguments.out / f"{arguments.net}.safetensors")
            started = time.perf_counter()
            network = quantize(net, ROWS[name], data)
            found = measure(network, name, ROWS[name], data, folder)
            print(
                f"{arguments.net}: {name}: {found}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            record = read_record(arguments.record)
            record |= {"net": arguments.net, "machine": machine.facts()}
            record["rows"][name] = found
            with new_file(arguments.record) as scratch:
                scratch.write_text(json.dumps(record, indent=1) + "\n")
    except EdgekitError as error:
        raise SystemExit(f"error: {error}") from error
    print(table(read_record(arguments.record)["rows"]))


if __name__ == "__main__":
    main()
