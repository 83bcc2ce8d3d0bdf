"""What an export costs: wall time, peak memory, bytes on disk; edgekit's and export_llm's.

    python -m benchmarks.export_cost --files FOLDER [--model lfm2-350m] [--what int8] ...

Runs each export once, alone, as a user would: `edgekit export MODEL --random-weights ...` in a new
process, and export_llm by benchmarks/peers/export_llm.py, whose random checkpoint is made before
the clock starts (edgekit's draws its weights inside it). Peak memory is the larger of the kernel's
high-water mark of one process and the sampled sum (PSS) over the process tree. Artifacts stay in
FOLDER under the names that plan.toml reads; an artifact already there is replaced.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import Cost, run
from benchmarks.peers import export_llm
from benchmarks.peers.shapes import SHAPES
from benchmarks.report import machine_lines, table

HERE = Path(__file__).parent
QUIET_DEADLINE_SECONDS = 120
EDGEKIT = {
    "int8": ["--int8"],
    "int4": ["--int4"],
    "int4-head4": ["--recipe", str(HERE / "recipes" / "int4-head4.toml")],
    "int4-g128": ["--recipe", str(HERE / "recipes" / "int4-g128.toml")],
}
PEER = "export_llm"


def export_edgekit(model: str, what: str, files: Path, context: int) -> tuple[Cost, Path]:
    """Export `model` into FILES/MODEL-WHAT; return the cost and the folder."""
    folder = files / f"{model}-{what}"
    command = [
        *(sys.executable, "-m", "edgekit", "export", model, "--random-weights"),
        *("--target", "executorch", *EDGEKIT[what], "--context", str(context)),
        *("-o", str(folder), "--force"),
    ]
    return run(command, log=files / f"{model}-{what}.log", watch_tree=True).cost, folder


def export_peer(model: str, files: Path, context: int) -> tuple[Cost, Path]:
    """Run export_llm into FILES; return the cost and the file."""
    exported = export_llm.export(SHAPES[model], files, context)
    return exported.cost, exported.path


def bytes_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def measure(model: str, what: str, files: Path, context: int) -> dict[str, Any]:
    """Run one export; return its row of the record."""
    busy = machine.wait_until_quiet(QUIET_DEADLINE_SECONDS)
    if what == PEER:
        cost, path = export_peer(model, files, context)
    else:
        cost, path = export_edgekit(model, what, files, context)
    model_file = path / "model.pte" if path.is_dir() else path
    return {
        "model": model,
        "what": what,
        "busy_share_before": busy,
        "file_bytes": model_file.stat().st_size,
        "disk_bytes": bytes_on_disk(path),
        "checkpoint_bytes": SHAPES[model].bf16_bytes,
        "cost": {**asdict(cost), "peak_bytes": cost.peak_bytes},
    }


COLUMNS = (
    "model",
    "export",
    "wall s",
    "peak memory MB",
    "of 1.6x bf16 checkpoint + 1 GB",
    "file MB",
    "disk MB",
)


def markdown(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    rows = []
    for row in record["rows"]:
        cost = row["cost"]
        bar = 1.6 * row["checkpoint_bytes"] + 1e9
        quiet = "" if row["busy_share_before"] <= machine.QUIET_SHARE else " (machine not quiet)"
        rows.append(
            [
                row["model"],
                row["what"],
                f"{cost['wall_s']:.0f}{quiet}",
                f"{cost['peak_bytes'] / 1e6:.0f}",
                f"{cost['peak_bytes'] / bar:.0%}",
                f"{row['file_bytes'] / 1e6:.0f}",
                f"{row['disk_bytes'] / 1e6:.0f}",
            ]
        )
    items = "\n".join(f"- {line}" for line in [*machine_lines(record["machine"]), record["made"]])
    return f"## Cost of an export\n\n{items}\n\n{table(COLUMNS, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", action="append", choices=SHAPES)
    parser.add_argument("--what", action="append", choices=[*EDGEKIT, PEER])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "export_cost.json")
    arguments = parser.parse_args()
    files: Path = arguments.files.resolve()
    files.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "context": arguments.context,
        "rows": [],
    }
    for model in arguments.model or SHAPES:
        for what in arguments.what or [*EDGEKIT, PEER]:
            print(f"{model} {what}", file=sys.stderr)
            record["rows"].append(measure(model, what, files, arguments.context))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
