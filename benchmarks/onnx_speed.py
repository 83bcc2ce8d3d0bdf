"""Prefill and decode speed of ONNX folders, in edgekit's engine and in onnxruntime-genai's own.

    python -m benchmarks.onnx_speed FOLDER [FOLDER ...] -p 512 -n 128 -r 5 -t 2 [--engine genai]

By llama-bench's rules: prefill is one prompt of random tokens into an empty cache, decode is N
single random tokens from an empty cache; no tokenizing and no sampling is in the time. Each round
runs every folder in every engine once, each in a process of its own after an untimed call of both
shapes; every other round goes backwards, so a drift of the machine favours nobody.

onnxruntime-genai takes half the CPUs by default; here both get `-t` threads. It decodes in two
ways, by append_tokens as our loop does, and by generate_next_token, which adds a greedy choice;
`decode_ns` is the first and `generate_ns` the second. Prints JSON with the raw samples.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.measure import run

ENGINES = ("edgekit", "genai")
QUIET_DEADLINE_SECONDS = 120


class Model(Protocol):
    """A loaded model; `begin` empties its cache and is never timed."""

    vocabulary: int

    def begin(self) -> None: ...

    def feed(self, tokens: Sequence[int]) -> None: ...


class Edgekit:
    """edgekit's onnx engine."""

    def __init__(self, folder: Path, positions: int, threads: int) -> None:
        from edgekit.formats.onnx.genai_config import GenaiConfig
        from edgekit.runtime.engines.onnx.decoder import OnnxEngine

        self._engine = OnnxEngine(GenaiConfig.open(folder).model_path, threads)
        if self._engine.context < positions:
            raise SystemExit(f"{folder}: has a context of {self._engine.context}, not {positions}")
        self.vocabulary = self._engine.vocab_size

    def begin(self) -> None:
        self._engine.reset()

    def feed(self, tokens: Sequence[int]) -> None:
        self._engine.prefill(tokens)


class Genai:
    """onnxruntime-genai's Generator."""

    def __init__(self, folder: Path, positions: int, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        options = {"session_options": {"intra_op_num_threads": threads}}
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = onnxruntime_genai.Model(config)
        self._positions = positions
        described = json.loads((folder / "genai_config.json").read_text())
        self.vocabulary = int(described["model"]["vocab_size"])

    def begin(self) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        # below min_length no end of text can stop the generation
        parameters.set_search_options(
            max_length=self._positions, min_length=self._positions, do_sample=False
        )
        self._generator: Any = self._genai.Generator(self._model, parameters)

    def feed(self, tokens: Sequence[int]) -> None:
        self._generator.append_tokens(tokens)

    def generate(self, count: int) -> None:
        for _ in range(count):
            self._generator.generate_next_token()


def load(engine: str, folder: Path, positions: int, threads: int) -> Model:
    return (Genai if engine == "genai" else Edgekit)(folder, positions, threads)


def timed_ns(work: Callable[[], None]) -> int:
    start = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start


def measure(model: Model, prompt: int, generate: int) -> dict[str, int]:
    """Return one sample of each kind in ns."""
    draw = random.Random(0)
    tokens = [draw.randrange(model.vocabulary) for _ in range(max(prompt, generate))]

    def decode() -> None:
        for token in tokens[:generate]:
            model.feed([token])

    model.begin()
    model.feed(tokens[:prompt])
    model.feed(tokens[:1])
    model.begin()
    samples = {"prefill_ns": timed_ns(lambda: model.feed(tokens[:prompt]))}
    model.begin()
    samples["decode_ns"] = timed_ns(decode)
    if isinstance(model, Genai):
        model.begin()
        model.feed(tokens[:1])
        samples["generate_ns"] = timed_ns(lambda: model.generate(generate))
    return samples


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one folder in one engine, in this process."""
    positions = max(arguments.prompt, arguments.generate) + 2
    engine, folder = arguments.engine[0], arguments.folder[0]
    model = load(engine, folder, positions, arguments.threads)
    return measure(model, arguments.prompt, arguments.generate)


def interleave(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the record of all rounds."""
    contenders = [(e, f) for f in arguments.folder for e in arguments.engine or ENGINES]
    record: dict[str, Any] = {
        "machine": machine.facts(),
        "versions": {p: version(p) for p in ("onnxruntime", "onnxruntime-genai")},
        "prompt": arguments.prompt,
        "generate": arguments.generate,
        "threads": arguments.threads,
        "busy_share_before": [],
        "samples": {f"{folder.name} in {engine}": [] for engine, folder in contenders},
    }
    for number in range(arguments.repetitions):
        record["busy_share_before"].append(machine.wait_until_quiet(QUIET_DEADLINE_SECONDS))
        for engine, folder in contenders if number % 2 == 0 else contenders[::-1]:
            label = f"{folder.name} in {engine}"
            print(f"round {number + 1}: {label}", file=sys.stderr)
            finished = run(
                [
                    *(sys.executable, "-m", "benchmarks.onnx_speed", str(folder), "--one"),
                    *("--engine", engine, "-p", str(arguments.prompt)),
                    *("-n", str(arguments.generate), "-t", str(arguments.threads)),
                ]
            )
            peak = {"peak_bytes": finished.cost.peak_process_bytes}
            record["samples"][label].append(json.loads(finished.stdout) | peak)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="one folder, one engine, one sample")
    arguments = parser.parse_args()
    record = one(arguments) if arguments.one else interleave(arguments)
    print(json.dumps(record, indent=None if arguments.one else 1))


if __name__ == "__main__":
    main()
