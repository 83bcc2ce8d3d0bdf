"""What a GGUF costs: edgekit's export against convert_hf_to_gguf.py and llama-quantize.

    python -m benchmarks.gguf_export_cost --files FOLDER --llama LLAMA [--model lfm2-1.2b]

LLAMA is the folder that benchmarks/peers/build_llamacpp.sh filled: its llama-quantize, and the
converter of the same llama.cpp. Both ways begin at the same Hugging Face folder of random bfloat16
weights, which is made before the clock starts, and end at a Q8_0 and a Q4_K_M file. Each step runs
once, alone, in a process of its own.

edgekit's time includes what the peers do not do: the comparison of the file's logits and token ids
with the model's. "to the file" leaves that out. Peak memory is the larger of the kernel's
high-water mark of one process and the sampled sum (PSS) over the process tree; of two steps the
larger counts.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import Cost, run
from benchmarks.peers.shapes import SHAPES
from benchmarks.report import machine_lines, table

HERE = Path(__file__).parent
QUIET_DEADLINE_SECONDS = 120
CHECKS = ("computing the reference", "verifying")
"""Beginnings of the stages of an export in which nothing is written."""

RECIPES = ("int8", "Q8_0", "Q4_K_M")
PEERS = ("Q8_0", "Q4_K_M")


def export_and_time(model: str, recipe: str, output: Path) -> None:
    """Export and print, as JSON, the seconds of each stage: what the measured process does."""
    from edgekit.workflows.api import export_model

    marks = [("importing", 0.0), ("planning", time.perf_counter())]
    export_model(
        model,
        output,
        target="gguf",
        recipe=recipe,
        force=True,
        progress=lambda stage: marks.append((stage, time.perf_counter())),
    )
    ends = [*(when for _, when in marks[2:]), time.perf_counter()]
    stages = [(name, end - begin) for (name, begin), end in zip(marks[1:], ends, strict=True)]
    print(json.dumps(stages))


def measure_edgekit(folder: Path, recipe: str, files: Path) -> dict[str, Any]:
    """Export the folder; return its row of the record."""
    busy = machine.wait_until_quiet(QUIET_DEADLINE_SECONDS)
    output = files / f"{folder.name}-gguf-{recipe}"
    command = [
        *(sys.executable, "-m", "benchmarks.gguf_export_cost", "--one", recipe),
        *("--model-folder", str(folder), "--files", str(output)),
    ]
    finished = run(command, log=output.with_suffix(".log"), watch_tree=True)
    stages = json.loads(finished.stdout.splitlines()[-1])
    checks = sum(seconds for name, seconds in stages if name.startswith(CHECKS))
    return {
        "who": "edgekit",
        "what": recipe,
        "busy_share_before": busy,
        "steps": [_step("export", finished.cost)],
        "stages": stages,
        "to_file_s": finished.cost.wall_s - checks,
        "file_bytes": (output / "model.gguf").stat().st_size,
    }


def measure_peer(folder: Path, kind: str, files: Path, llama: Path) -> dict[str, Any]:
    """Convert and quantize the folder; return its row of the record."""
    busy = machine.wait_until_quiet(QUIET_DEADLINE_SECONDS)
    source = next((llama / "sdist").glob("*/vendor/llama.cpp"))
    floats, output = (files / f"{folder.name}-converted-{name}.gguf" for name in ("bf16", kind))
    convert = [
        *(sys.executable, "-m", "benchmarks.peers.convert_hf", "convert", str(folder)),
        *("--llama-cpp", str(source), "-o", str(floats)),
    ]
    quantize = [str(llama / "bin" / "llama-quantize"), str(floats), str(output), kind]
    costs = [
        run(command, log=output.with_suffix(f".{name}.log"), watch_tree=True).cost
        for name, command in (("convert", convert), ("quantize", quantize))
    ]
    floats.unlink()
    return {
        "who": "convert_hf_to_gguf.py, llama-quantize",
        "what": kind,
        "busy_share_before": busy,
        "steps": [_step("convert", costs[0]), _step("quantize", costs[1])],
        "to_file_s": sum(cost.wall_s for cost in costs),
        "file_bytes": output.stat().st_size,
    }


def _step(name: str, cost: Cost) -> dict[str, Any]:
    return {"name": name, **asdict(cost), "peak_bytes": cost.peak_bytes}


COLUMNS = ("", "file", "wall s", "to the file s", "CPU s", "peak memory MB", "file MB")


def markdown(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    items = [*machine_lines(record["machine"]), record["model"], record["made"]]
    rows = []
    for row in record["rows"]:
        steps = row["steps"]
        quiet = "" if row["busy_share_before"] <= machine.QUIET_SHARE else " (machine not quiet)"
        rows.append(
            [
                row["who"],
                row["what"],
                f"{sum(step['wall_s'] for step in steps):.0f}{quiet}",
                f"{row['to_file_s']:.0f}",
                f"{sum(step['cpu_s'] for step in steps):.0f}",
                f"{max(step['peak_bytes'] for step in steps) / 1e6:.0f}",
                f"{row['file_bytes'] / 1e6:.0f}",
            ]
        )
    lines = "\n".join(f"- {item}" for item in items)
    return f"## Cost of a GGUF\n\n{lines}\n\n{table(COLUMNS, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--llama", type=Path, metavar="LLAMA")
    parser.add_argument("--model", choices=SHAPES, default="lfm2-1.2b")
    parser.add_argument(
        "-o", "--output", type=Path, default=HERE / "results" / "gguf_export_cost.json"
    )
    parser.add_argument("--one", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--model-folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        export_and_time(arguments.model_folder, arguments.one, arguments.files)
        return
    if arguments.llama is None:
        parser.error("--llama is needed for the peers")
    files, llama = arguments.files.resolve(), arguments.llama.resolve()
    folder = files / f"{arguments.model}-hf"
    if not (folder / "model.safetensors").exists():
        # in a process of its own: a child's peak memory would begin at ours
        this = (sys.executable, "-m", "benchmarks.peers.convert_hf", "prepare", arguments.model)
        run([*this, "-o", str(folder)])
    record: dict[str, Any] = {
        "schema": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "model": f"{arguments.model}, random weights",
        "rows": [],
    }
    for recipe in RECIPES:
        print(f"edgekit {recipe}", file=sys.stderr)
        record["rows"].append(measure_edgekit(folder, recipe, files))
    for kind in PEERS:
        print(f"llama.cpp {kind}", file=sys.stderr)
        record["rows"].append(measure_peer(folder, kind, files, llama))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
