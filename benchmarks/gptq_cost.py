"""What GPTQ of a whole model costs: CPU seconds for each kind of layer, and peak memory.

    python -m benchmarks.gptq_cost --files FOLDER --text TEXT [--layers 3]

Runs what `edgekit quantize FOLDER/lfm2-1.2b-hf --int4 --calibrate TEXT` runs, in a process of its
own and on one thread, on a Hugging Face folder of random bfloat16 weights, which is made before the
clock starts. Of a text of 500,000 characters the calibration takes all that it ever takes, 128
chunks of 256 tokens; a shorter one costs less. `--layers` shortens the model: three layers have one
of attention. Seconds are those of the one thread's CPU, on a free core the wall time.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.measure import run
from benchmarks.peers.shapes import LAYERS, SHAPES
from benchmarks.report import machine_lines, table

HERE = Path(__file__).parent


def quantize_and_time(folder: Path, text: Path, output: Path) -> None:
    """Quantize and print, as JSON, at which CPU second each step began: the measured process."""
    from edgekit.models.source import resolve_model
    from edgekit.quantize.recipe import preset
    from edgekit.workflows.calibrate import quantize_calibrated, read_texts, workspace_of

    start = time.process_time()
    begun: dict[str, float] = {}
    source = resolve_model(str(folder))
    texts = read_texts(source, text)
    with workspace_of(output) as workspace:
        quantize_calibrated(
            source,
            preset("int4"),
            texts,
            "gptq",
            output,
            workspace,
            lambda done, total, label: begun.setdefault(label, time.process_time() - start),
        )
    print(
        json.dumps(
            {
                "calibration_tokens": sum(map(len, texts.calibration)),
                "held_out_tokens": sum(map(len, texts.held_out)),
                "begun": [*begun.items(), ("end", time.process_time() - start)],
            }
        )
    )


def measure(folder: Path, text: Path) -> dict[str, Any]:
    """Quantize the folder in a process of its own; return the figures of the record."""
    output = folder.with_suffix(".safetensors")
    command = [sys.executable, "-m", "benchmarks.gptq_cost", "--one", str(folder)]
    os.environ["OMP_NUM_THREADS"] = "1"
    finished = run([*command, "--text", str(text), "--files", str(output)])
    figures: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    figures["cost"] = asdict(finished.cost)
    figures["file_bytes"] = output.stat().st_size
    return figures


def markdown(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    figures = record["figures"]
    begun = dict(figures["begun"])
    starts = [begun[f"layer {index + 1}"] for index in range(len(record["layer_types"]))]
    ends = [*starts[1:], begun["layers"]]
    seconds: dict[str, list[float]] = {}
    for kind, start, end in zip(record["layer_types"], starts, ends, strict=True):
        seconds.setdefault(kind, []).append(end - start)
    rows = [
        [f"a layer ({kind})", str(len(each)), f"{median(each):.0f}", f"{sum(each):.0f}"]
        for kind, each in seconds.items()
    ]
    rows += [
        ["before the layers", "1", "", f"{starts[0]:.0f}"],
        ["measuring rtn, mse, gptq; writing", "1", "", f"{begun['end'] - begun['layers']:.0f}"],
    ]
    cost = figures["cost"]
    items = [
        *machine_lines(record["machine"]),
        record["model"],
        f"{record['made']}, one thread",
        f"calibrated on {figures['calibration_tokens']:,} tokens",
        f"measured on {figures['held_out_tokens']:,} tokens",
        f"in all: wall {cost['wall_s']:.0f} s, CPU {cost['cpu_s']:.0f} s",
        f"peak memory {cost['peak_process_bytes'] / 1e9:.2f} GB",
    ]
    if record["busy_share_before"] > machine.QUIET_SHARE:
        items.append("**not a quiet machine**: others slow the memory down")
    lines = "\n".join(f"- {item}" for item in items)
    columns = ("", "times", "median CPU s", "all CPU s")
    return f"## Cost of GPTQ\n\n{lines}\n\n{table(columns, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", choices=SHAPES, default="lfm2-1.2b")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "gptq_cost.json")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        quantize_and_time(arguments.one, arguments.text, arguments.files)
        return
    shape = replace(SHAPES[arguments.model], layers=arguments.layers)
    whole = shape.layers == LAYERS
    folder = arguments.files.resolve() / f"{shape.name}{'' if whole else f'-{shape.layers}'}-hf"
    if not (folder / "model.safetensors").exists():
        # in a process of its own: a child's peak memory would begin at ours
        this = (sys.executable, "-m", "benchmarks.peers.convert_hf", "prepare", shape.name)
        run([*this, "--layers", str(shape.layers), "-o", str(folder)])
    record = {
        "schema": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "busy_share_before": machine.busy_share(),
        "model": f"{shape.name}, {shape.layers} layers of {LAYERS}, random weights",
        "layer_types": shape.layer_types,
        "figures": measure(folder, arguments.text),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
