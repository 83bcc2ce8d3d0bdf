"""What can be measured: a .pte or a .gguf, each by one command that prints raw samples."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import run


@dataclass(frozen=True)
class Settings:
    """The shape of one measurement, in llama-bench's words."""

    prompt: int = 512
    generate: int = 128
    threads: int = 2


@dataclass(frozen=True)
class Contender:
    label: str
    kind: str  # "pte" or "gguf"
    path: Path

    def __post_init__(self) -> None:
        if self.kind not in ("pte", "gguf"):
            raise ValueError(f"{self.label}: kind is {self.kind!r}, must be pte or gguf")


@dataclass(frozen=True)
class Sample:
    """One contender in one round."""

    engine: str
    prefill_ns: int
    decode_ns: int
    peak_bytes: int  # of the whole process
    empty_bytes: int  # of the process before it loads the model: Python and torch


def measure(contender: Contender, settings: Settings, llama_bench: Path) -> Sample:
    """Run the contender once in a process of its own."""
    if contender.kind == "gguf":
        return _measure_gguf(contender.path, settings, llama_bench)
    return _measure_pte(contender.path, settings)


def _measure_pte(path: Path, settings: Settings) -> Sample:
    finished = run(
        [
            *(sys.executable, "-m", "benchmarks.pte_speed", str(path), "-r", "1"),
            *("-p", str(settings.prompt), "-n", str(settings.generate)),
            *("-t", str(settings.threads)),
        ]
    )
    found = json.loads(finished.stdout)
    if found["threads"] != settings.threads:
        raise ValueError(f"{path}: ran with {found['threads']} threads, not {settings.threads}")
    return Sample(
        found["engine"],
        found["prefill_ns"][0],
        found["decode_ns"][0],
        finished.cost.peak_process_bytes,
        found["empty_bytes"],
    )


def _measure_gguf(path: Path, settings: Settings, llama_bench: Path) -> Sample:
    finished = run(
        [
            *(str(llama_bench), "-m", str(path), "-r", "1", "-o", "json"),
            *("-p", str(settings.prompt), "-n", str(settings.generate)),
            *("-t", str(settings.threads)),
        ]
    )
    tests = {(test["n_prompt"], test["n_gen"]): test for test in json.loads(finished.stdout)}
    prefill = tests[settings.prompt, 0]
    decode = tests[0, settings.generate]
    return Sample(
        f"llama.cpp {prefill['build_commit']}",
        prefill["samples_ns"][0],
        decode["samples_ns"][0],
        finished.cost.peak_process_bytes,
        0,
    )


def file_facts(contender: Contender) -> dict[str, Any]:
    """Return head, embedding, file_bytes and bytes_per_token of the contender's file.

    A peer's file has them beside it in a .json; edgekit's stand in its manifest.
    """
    manifest = contender.path.parent / "edgekit.json"
    if manifest.exists():
        return _edgekit_facts(contender.path, json.loads(manifest.read_text()))
    beside = contender.path.with_name(contender.path.name + ".json")
    found: dict[str, Any] = json.loads(beside.read_text())
    return found


def _edgekit_facts(model: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    rows = {row["tensor"]: row for row in manifest["tensors"]}
    embedding = rows["model.embed_tokens.weight"]
    return {
        "file": f"{model.parent.name}/{model.name}",
        "made_by": f"edgekit {manifest['versions'].get('edgekit', '')}".strip(),
        "head": rows["lm_head.weight"]["scheme"],
        "embedding": embedding["scheme"],
        "file_bytes": model.stat().st_size,
        # of the embedding table one row is read, of everything else all
        "bytes_per_token": sum(row["bytes"] for row in rows.values()) - embedding["bytes"],
    }
