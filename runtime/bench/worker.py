"""The benchmark's own process per artifact: `python -m edgekit.runtime.bench.worker`.

It reads one JSON request per line from stdin and answers each with one JSON line, and ends when
stdin does. `{"op": "load", "engine", "model", "threads", "context"}` loads an engine;
`{"op": "measure", "kind", "tokens", "depth", "seed"}` times one repetition of a test. Of modules,
`{"op": "load_module", "target", "model", "threads"}` loads one and `{"op": "run_module", "inputs",
"seed", "runs", "at_least_ns"}` times a burst of runs. A failure is answered as
`{"error": "one line"}`, with `"crashed": true` where a library did not survive its first load. One
process per artifact makes load time and peak memory that artifact's own.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from edgekit.errors import EdgekitError, EngineCrash
from edgekit.runtime.bench.accounting import Clocks, interference, peak_bytes
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.engines.engine import Engine, import_engine, load_engine
from edgekit.runtime.engines.first_load import check_first_load
from edgekit.runtime.engines.network_engine import ModuleEngine


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends this process
    replies = claim_stdout()
    worker = Worker()
    for line in sys.stdin:
        replies.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        replies.flush()
    worker.close()


class Worker:
    """Holds at most one loaded engine and times repetitions on it."""

    def __init__(self) -> None:
        """Start without an engine."""
        self._engine: Engine | None = None
        self._module: ModuleEngine | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request; whatever goes wrong becomes one line."""
        try:
            if request["op"] == "load":
                return self._load(
                    request["engine"], request["model"], request["threads"], request["context"]
                )
            if request["op"] == "load_module":
                return self._load_module(request["target"], request["model"], request["threads"])
            if request["op"] == "run_module":
                names = ("inputs", "seed", "runs", "at_least_ns")
                return self._run_module(**{name: request[name] for name in names})
            return self._measure(
                Shape(request["kind"], request["tokens"], request["depth"]), request["seed"]
            )
        except EngineCrash as error:
            return {"error": _one_line(error), "crashed": True}
        except Exception as error:  # noqa: BLE001  (the parent must hear of any failure)
            return {"error": _one_line(error)}

    def close(self) -> None:
        """Release the engine."""
        if self._module is not None:
            self._module.close()
            self._module = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _load(
        self, name: str, model: str, threads: int | None, context: int | None
    ) -> dict[str, Any]:
        check_first_load(name)
        started = time.perf_counter_ns()
        import_engine(name)  # so that the engine's libraries are not in the time to load
        imported = time.perf_counter_ns()
        before = peak_bytes(os.getpid())
        begin = time.perf_counter_ns()
        self._engine = load_engine(name, Path(model), threads, context)
        return {
            "load_ns": time.perf_counter_ns() - begin,
            "import_ns": imported - started,
            "before_load_bytes": before,
            "engine": self._engine.name,
            "version": self._engine.version,
            "built": self._engine.built,
            "context": self._engine.context,
            "threads": asdict(self._engine.threads),
            "affinity": sorted(os.sched_getaffinity(0)),
        }

    def _load_module(self, target: str, model: str, threads: int | None) -> dict[str, Any]:
        from edgekit.runtime.bench.network_worker import load

        self._module, reply = load(target, model, threads)
        return reply

    def _run_module(
        self, inputs: list[dict[str, Any]], seed: int, runs: int, at_least_ns: int
    ) -> dict[str, Any]:
        from edgekit.runtime.bench.network_worker import time_runs

        if self._module is None:
            raise EdgekitError("nothing is loaded")
        return time_runs(self._module, inputs, seed, runs, at_least_ns)

    def _measure(self, shape: Shape, seed: int) -> dict[str, Any]:
        if self._engine is None:
            raise EdgekitError("nothing is loaded")
        return measure(self._engine, shape, seed)


def measure(engine: Engine, shape: Shape, seed: int) -> dict[str, Any]:
    """Time one repetition of a test on a fresh state.

    Token ids are uniform over the vocabulary and the same for every repetition and artifact with
    one seed, so repetitions can be paired. Choosing them and filling the state to the depth are
    outside the time; an end-of-sequence token has no effect.
    """
    tokens = random_tokens(engine.vocab_size, shape.positions, seed)
    engine.reset()
    if shape.depth:
        engine.prefill(tokens[: shape.depth])
    timed = tokens[shape.depth :]
    threads = engine.threads.prompt if shape.kind == "pp" else engine.threads.decode
    before = Clocks.read()
    reply = _prefill(engine, timed) if shape.kind == "pp" else _decode(engine, timed)
    shares = interference(before, Clocks.read(), threads)
    if engine.position != shape.positions:
        raise EdgekitError(
            f"{shape.name}: the engine stands at position {engine.position}, not {shape.positions}"
        )
    return {**reply, "interference": asdict(shares)}


def random_tokens(vocab_size: int, count: int, seed: int) -> list[int]:
    """Return `count` token ids, uniform over the vocabulary, the same for the same seed."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]


def _prefill(engine: Engine, tokens: Sequence[int]) -> dict[str, Any]:
    begin = time.perf_counter_ns()
    logits = engine.prefill(tokens)
    end = time.perf_counter_ns()
    int(logits.argmax())  # the first output token: time to first token ends when it is known
    chosen = time.perf_counter_ns()
    return {"elapsed_ns": end - begin, "first_token_ns": chosen - begin, "token_ns": []}


def _decode(engine: Engine, tokens: Sequence[int]) -> dict[str, Any]:
    marks = [time.perf_counter_ns()]
    for token in tokens:
        engine.decode(token)
        marks.append(time.perf_counter_ns())
    durations = [after - before for before, after in pairwise(marks)]
    return {"elapsed_ns": marks[-1] - marks[0], "first_token_ns": None, "token_ns": durations}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, EdgekitError) else f"{type(error).__name__}: {text}"


def claim_stdout() -> TextIO:
    """Keep fd 1 for replies and send what C++ libraries print there to stderr instead."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


if __name__ == "__main__":
    main()
