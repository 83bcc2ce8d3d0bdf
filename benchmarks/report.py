"""Turns a record of compare.py into Markdown.

python -m benchmarks.report benchmarks/results/lfm2-350m.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import QUIET_SHARE

Record = dict[str, Any]
Round = dict[str, Any]


def markdown(record: Record) -> str:
    """Return the whole report of one run."""
    parts = [_heading(record), _speeds(record), _ratios(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def bandwidth(one: Round) -> float:
    """Return a round's read bandwidth in bytes/s: the best pass, for it stands for the limit."""
    read = one["bandwidth"]
    return float(read["bytes"] / min(read["samples_ns"]) * 1e9)


def paired_ratios(record: Record, row: dict[str, Any]) -> list[float]:
    """Return `of` over `to`, once per round for a speed, once for a file's size."""
    if row["what"] == "file":
        size = {name: facts["file_bytes"] for name, facts in record["contenders"].items()}
        return [size[row["of"]] / size[row["to"]]]
    key = f"{row['what']}_ns"
    return [
        one["samples"][row["to"]][key] / one["samples"][row["of"]][key] for one in _rounds(record)
    ]


def _rounds(record: Record) -> list[Round]:
    rounds: list[Round] = record["rounds"]
    return rounds


def _heading(record: Record) -> str:
    facts, settings = record["machine"], record["settings"]
    read = [bandwidth(one) / 1e9 for one in _rounds(record)]
    busy = max(one["busy_share_before"] for one in _rounds(record))
    lines = [
        *machine_lines(facts),
        f"llama.cpp of {record['llama_cpp'] or 'unknown version'}; {settings['threads']} threads",
        f"read bandwidth {median(read):.1f} GB/s ({min(read):.1f} to {max(read):.1f})",
        f"prefill {settings['prompt']}; decode {settings['generate']} from an empty cache",
        f"medians of {len(read)} interleaved rounds, {record['made']}",
    ]
    if busy > QUIET_SHARE:
        lines.append(f"**not a quiet machine**: others used up to {busy:.0%} of the cores")
    items = "\n".join(f"- {line}" for line in lines)
    return f"## {record['shape']}, random weights\n\n{items}"


def machine_lines(facts: dict[str, Any]) -> list[str]:
    """Return the machine and the versions, in a line each."""
    virtual = " (virtual)" if facts["virtual"] else ""
    packages = [f"{name} {found}" for name, found in facts["packages"].items() if found]
    return [
        f"{facts['cpu']}, {facts['cores']} cores{virtual}, {facts['ram_bytes'] / 2**30:.0f} GiB",
        " ".join(facts["flags"]),
        f"{', '.join(packages)}, Python {facts['python']}, Linux {facts['kernel']}",
    ]


SPEED_COLUMNS = (
    "",
    "head",
    "embedding",
    "file MB",
    "prefill tok/s",
    "decode tok/s",
    "of read bandwidth",
    "memory MB",
)


def _speeds(record: Record) -> str:
    return table(SPEED_COLUMNS, [_speed_row(record, label) for label in record["contenders"]])


def _speed_row(record: Record, label: str) -> list[str]:
    settings, facts = record["settings"], record["contenders"][label]

    def middle(value: Callable[[dict[str, Any]], float]) -> float:
        return median(value(one["samples"][label]) for one in _rounds(record))

    shares = [
        facts["bytes_per_token"]
        * (settings["generate"] / one["samples"][label]["decode_ns"] * 1e9)
        / bandwidth(one)
        for one in _rounds(record)
    ]
    return [
        label,
        facts["head"],
        facts["embedding"],
        f"{facts['file_bytes'] / 1e6:.0f}",
        f"{middle(lambda s: settings['prompt'] / s['prefill_ns'] * 1e9):.0f}",
        f"{middle(lambda s: settings['generate'] / s['decode_ns'] * 1e9):.1f}",
        f"{median(shares):.0%}",
        f"{middle(lambda s: s['peak_bytes'] - s['empty_bytes']) / 1e6:.0f}",
    ]


def _ratios(record: Record) -> str:
    rows = [_ratio_row(record, row) for row in record["ratios"]]
    return table(("ratio", "of", "to", "median", "range", "bar", ""), rows) if rows else ""


def _ratio_row(record: Record, row: dict[str, Any]) -> list[str]:
    found = paired_ratios(record, row)
    spread = f"{min(found):.2f} to {max(found):.2f}" if len(found) > 1 else ""
    bar, met = _bar(row, median(found))
    return [row["what"], row["of"], row["to"], f"{median(found):.2f}x", spread, bar, met]


def _bar(row: dict[str, Any], value: float) -> tuple[str, str]:
    if row.get("at_least") is not None:
        return f">= {row['at_least']:.2f}x", "met" if value >= row["at_least"] else "**missed**"
    if row.get("at_most") is not None:
        return f"<= {row['at_most']:.2f}x", "met" if value <= row["at_most"] else "**missed**"
    return "", ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    print(markdown(json.loads(parser.parse_args().record.read_text())), end="")


if __name__ == "__main__":
    main()
