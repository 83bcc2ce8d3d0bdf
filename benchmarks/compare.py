"""Measures edgekit's files and the peers' in one interleaved run.

    python -m benchmarks.compare --shape lfm2-350m --files FOLDER --llama-bench PATH \\
        [-r 5] [-t 2] [--only LABEL ...]

Each round reads memory bandwidth and then runs every contender of plan.toml once, each in its own
process; every other round goes backwards, so a drift of the machine favours none. A ratio is taken
within a round, where both sides met the same machine. All raw samples go to
benchmarks/results/NAME.json and the table made of them (benchmarks/report.py) to NAME.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.contenders import Contender, Settings, file_facts, measure
from benchmarks.measure import run
from benchmarks.report import markdown

HERE = Path(__file__).parent
QUIET_DEADLINE_SECONDS = 120


def load_plan(
    path: Path, places: dict[str, str], only: list[str]
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """Return the plan's contenders, `only` those if given, and the ratios among them."""
    plan = tomllib.loads(path.read_text())
    contenders = [
        Contender(row["label"], row["kind"], Path(row["path"].format(**places)))
        for row in plan["contender"]
        if not only or row["label"] in only
    ]
    labels = {contender.label for contender in contenders}
    if unknown := set(only) - labels:
        raise SystemExit(f"no contender {sorted(unknown)} in {path}")
    ratios = [row for row in plan["ratio"] if {row["of"], row["to"]} <= labels]
    for row in ratios:
        for bar in ("at_least", "at_most"):
            if isinstance(row.get(bar), dict):
                row[bar] = row[bar].get(places["shape"])
    return contenders, ratios


def compile_bandwidth(folder: Path) -> Path:
    """Compile read_bandwidth.c for this machine into `folder`."""
    program = folder / "read_bandwidth"
    source = HERE / "read_bandwidth.c"
    flags = ["-O3", "-march=native", "-pthread"]
    subprocess.run(["cc", *flags, str(source), "-o", str(program)], check=True)
    return program


def one_round(
    contenders: list[Contender], settings: Settings, llama_bench: Path, bandwidth: Path
) -> dict[str, Any]:
    """Measure memory and every contender once, in the order given."""
    busy = machine.wait_until_quiet(QUIET_DEADLINE_SECONDS)
    read = json.loads(run([str(bandwidth), str(settings.threads)]).stdout)
    samples = {}
    for contender in contenders:
        print(f"  {contender.label}", file=sys.stderr)
        samples[contender.label] = asdict(measure(contender, settings, llama_bench))
    return {"busy_share_before": busy, "bandwidth": read, "samples": samples}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the record of the whole run."""
    places = {"shape": arguments.shape, "files": str(arguments.files)}
    contenders, ratios = load_plan(arguments.plan, places, arguments.only)
    if missing := [str(c.path) for c in contenders if not c.path.exists()]:
        raise SystemExit("missing, make them or choose with --only: " + ", ".join(missing))
    settings = Settings(arguments.prompt, arguments.generate, arguments.threads)
    record: dict[str, Any] = {
        "schema": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": arguments.shape,
        "settings": asdict(settings),
        "machine": machine.facts(),
        "llama_cpp": _llama_version(arguments.llama_bench),
        "contenders": {c.label: {"kind": c.kind, **file_facts(c)} for c in contenders},
        "ratios": ratios,
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        bandwidth = compile_bandwidth(Path(folder))
        for number in range(arguments.repetitions):
            print(f"round {number + 1} of {arguments.repetitions}", file=sys.stderr)
            order = contenders if number % 2 == 0 else contenders[::-1]
            record["rounds"].append(one_round(order, settings, arguments.llama_bench, bandwidth))
    return record


def _llama_version(llama_bench: Path) -> str | None:
    """Return what build_llamacpp.sh wrote: a build from an sdist knows no commit."""
    note = llama_bench.parent.parent / "version.txt"
    return note.read_text().strip() if note.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True, choices=["lfm2-350m", "lfm2-1.2b"])
    parser.add_argument("--files", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH")
    parser.add_argument("--plan", type=Path, default=HERE / "plan.toml")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    record = compare(arguments)
    output: Path = arguments.output or HERE / "results" / f"{arguments.shape}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(record)
    output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
