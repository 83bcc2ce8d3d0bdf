"""The benchmark's own process per artifact, `python -m edgekit.runtime.bench.worker`: protocol 1.

The process that measures and the one that asks may be on different machines, and the one that
measures need not be this file: whoever speaks the protocol is a runner. It speaks on stdin and
stdout alone, in lines of UTF-8 that each hold one JSON object. Times are integers of nanoseconds
on a monotonic clock, sizes integers of bytes, rates GB/s of 1e9 bytes. What a system does not tell
is null, never 0. Whoever reads ignores keys that it does not know; a change that breaks a reader
gets another version.

The first line is the runner's and comes unasked, before any library of an engine is loaded:

    {"protocol": 1, "runner": "edgekit 0.1.0", "ops": ["bandwidth", ...],
     "engines": {"decoder": ["onnx", ...], "network": [...]}}

`ops` and `engines` are what it can be asked for. Each further line answers one request, in order.
A request names its `op` and has all the keys of that op:

    {"op": "bandwidth", "threads": 2}
        -> {"gb_per_s", "kernel", "threads", "buffer_bytes", "samples_ns": {KERNEL: [...], ...}}
    {"op": "load_decoder", "engine": "onnx", "model": PATH, "threads": 2, "context": 512}
        -> {"engine", "version", "built", "context", "threads": {"prompt", "decode"}, "affinity",
            "import_ns", "load_ns", "before_load_bytes"}
    {"op": "time_decoder", "kind": "tg", "tokens": 128, "depth": 0, "seed": 0}
        -> {"elapsed_ns", "first_token_ns", "token_ns", "interference"}
    {"op": "load_network", "engine": "onnx", "model": PATH, "threads": 2}
        -> as `load_decoder`, but `threads` is one number, and without `built` and `context`
    {"op": "time_network", "inputs": [{"dtype", "shape"}, ...], "seed": 0, "runs": 5,
     "at_least_ns": 0}
        -> {"run_ns", "interference"}

`bandwidth` reads memory with that many threads; `samples_ns` are the times in which each kernel
read the `buffer_bytes`, and the best time of the best `kernel` is the rate. `load_...` releases
what was loaded before; `model` is a path of the runner's machine; `threads` null leaves them to
the engine, `context` null the positions. The answer says what the engine took: `threads` for
several tokens at once and for one token, `affinity` the CPUs that the process may use. `import_ns`
is the time to load the engine's libraries, `load_ns` then that of the model, `before_load_bytes`
the peak of memory in between; `built` says what the engine was compiled for, `version` which one
it is.

`time_decoder` is one repetition on a fresh state: `pp` takes `tokens` tokens in one call, `tg` one
by one, both after `depth` tokens outside the time. Token i of all these is the i-th of a generator
that `seed` alone determines, uniform over the vocabulary. `token_ns` has a time for each token of
`tg`, which sum to `elapsed_ns`, and none for `pp`, where `first_token_ns` is the time until the
first token of the answer is chosen (null for `tg`). `time_network` runs the network at least
`runs` times and until the runs took `at_least_ns`, once at least, on normal numbers that `seed`
determines and on zeros where inputs are integers; `run_ns` has a time for each run.

`interference` is measured on the runner's side between the first and the last of these times, as
shares: `own` CPU time over time x threads, `other` programs' busy time over time x CPUs, `waited`
the time in which threads were ready but did not run, and `throttled` that in which a quota held
them back, over time x threads.

Each answer has `"memory": {"bytes", "peak_bytes"}`, that of the runner's process, now and the most
in all its life, what is swapped out included. An error is answered by `{"error": "one line"}`
alone, with `"crashed": true` where a library did not survive. The runner goes on after an error,
be it an unknown `op`, a missing key or a line that is no JSON. It ends with status 0 when its
stdin does. A process that dies in the middle of a request closes its stdout: that is its answer,
and its status and the last line on its stderr say why. What libraries print goes to stderr.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TextIO

from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.bandwidth import measure_read_bandwidth
from edgekit.errors import EdgekitError, EngineCrash
from edgekit.formats.artifact.fields import optional, take
from edgekit.runtime.bench.accounting import Clocks, MemoryUse, interference
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.engines.engine import Engine, import_engine, load_engine
from edgekit.runtime.engines.first_load import check_first_load
from edgekit.runtime.engines.network_engine import (
    Array,
    ModuleEngine,
    import_module_engine,
    load_module,
)
from edgekit.runtime.engines.registry import ENGINES
from edgekit.version import __version__

PROTOCOL = 1

_FEWEST_WARM_UPS = 3

Request = dict[str, Any]
Reply = dict[str, Any]


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends this process
    replies = claim_stdout()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    worker = Worker()
    _write(replies, worker.hello())
    for line in sys.stdin:
        _write(replies, worker.answer(line))
    worker.close()


class Worker:
    """Holds at most one open engine and times repetitions on it."""

    def __init__(self) -> None:
        """Start without an engine."""
        self._decoder: Engine | None = None
        self._network: ModuleEngine | None = None
        self._memory = MemoryUse()
        self._ops: dict[str, Callable[[Request], Reply]] = {
            "bandwidth": self._bandwidth,
            "load_decoder": self._load_decoder,
            "time_decoder": self._time_decoder,
            "load_network": self._load_network,
            "time_network": self._time_network,
        }

    def hello(self) -> Reply:
        """Return the first line: the protocol's version, and what may be asked."""
        return {
            "protocol": PROTOCOL,
            "runner": f"edgekit {__version__}",
            "ops": list(self._ops),
            "engines": {kind: ENGINES.names(kind) for kind in ("decoder", "network")},
        }

    def answer(self, line: str) -> Reply:
        """Do what a line asks for; whatever goes wrong becomes one line."""
        try:
            reply = self._do(line)
        except EngineCrash as error:
            return {"error": _one_line(error), "crashed": True}
        except Exception as error:  # noqa: BLE001  (the parent must hear of any failure)
            return {"error": _one_line(error)}
        return reply | {"memory": self._memory.read()}

    def close(self) -> None:
        """Release the engine."""
        for engine in (self._decoder, self._network):
            if engine is not None:
                engine.close()
        self._decoder = self._network = None

    def _do(self, line: str) -> Reply:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EdgekitError(f"a line that is no JSON: {line.strip()!r:.60}") from error
        if not isinstance(request, dict):
            raise EdgekitError(f"a request must be a JSON object, not {line.strip()!r:.60}")
        op = take(request, "op", str)
        if op not in self._ops:
            raise EdgekitError(f"unknown op {op!r:.60}: known are {', '.join(self._ops)}")
        return self._ops[op](request)

    def _bandwidth(self, request: Request) -> Reply:
        return asdict(measure_read_bandwidth(take(request, "threads", int)))

    def _load_decoder(self, request: Request) -> Reply:
        name, model = take(request, "engine", str), Path(take(request, "model", str))
        threads, context = (optional(request, key, int) for key in ("threads", "context"))
        self.close()
        facts = self._import(name, import_engine)
        begin = time.perf_counter_ns()
        engine = self._decoder = load_engine(name, model, threads, context)
        return facts | {
            "load_ns": time.perf_counter_ns() - begin,
            "engine": engine.name,
            "version": engine.version,
            "built": engine.built,
            "context": engine.context,
            "threads": asdict(engine.threads),
        }

    def _load_network(self, request: Request) -> Reply:
        name, model = take(request, "engine", str), Path(take(request, "model", str))
        threads = optional(request, "threads", int)
        self.close()
        facts = self._import(name, import_module_engine)
        begin = time.perf_counter_ns()
        engine = self._network = load_module(name, model, threads)
        return facts | {
            "load_ns": time.perf_counter_ns() - begin,
            "engine": engine.name,
            "version": engine.version,
            "threads": engine.threads,
        }

    def _import(self, name: str, import_it: Callable[[str], object]) -> Reply:
        """Bring an engine's libraries in, so that they are not in the time to load a model."""
        check_first_load(name)
        begin = time.perf_counter_ns()
        import_it(name)
        return {
            "import_ns": time.perf_counter_ns() - begin,
            "before_load_bytes": self._memory.read()["peak_bytes"],
            "affinity": sorted(LOCAL.cpus()),
        }

    def _time_decoder(self, request: Request) -> Reply:
        if self._decoder is None:
            raise EdgekitError("no decoder is loaded")
        tokens, depth, seed = (take(request, key, int) for key in ("tokens", "depth", "seed"))
        return measure(self._decoder, Shape(_kind(request), tokens, depth), seed)

    def _time_network(self, request: Request) -> Reply:
        if self._network is None:
            raise EdgekitError("no network is loaded")
        seed, runs, at_least_ns = (
            take(request, key, int) for key in ("seed", "runs", "at_least_ns")
        )
        arrays = random_inputs(take(request, "inputs", list), seed)
        return time_runs(self._network, arrays, runs, at_least_ns)


def _kind(request: Request) -> Literal["pp", "tg"]:
    match kind := take(request, "kind", str):
        case "pp" | "tg":
            return kind
    raise EdgekitError(f"kind must be pp or tg, not {kind!r:.60}")


def measure(engine: Engine, shape: Shape, seed: int) -> Reply:
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


def _prefill(engine: Engine, tokens: Sequence[int]) -> Reply:
    begin = time.perf_counter_ns()
    logits = engine.prefill(tokens)
    end = time.perf_counter_ns()
    int(logits.argmax())  # the first output token: time to first token ends when it is known
    chosen = time.perf_counter_ns()
    return {"elapsed_ns": end - begin, "first_token_ns": chosen - begin, "token_ns": []}


def _decode(engine: Engine, tokens: Sequence[int]) -> Reply:
    marks = [time.perf_counter_ns()]
    for token in tokens:
        engine.decode(token)
        marks.append(time.perf_counter_ns())
    durations = [after - before for before, after in pairwise(marks)]
    return {"elapsed_ns": marks[-1] - marks[0], "first_token_ns": None, "token_ns": durations}


def time_runs(engine: ModuleEngine, arrays: list[Array], runs: int, at_least_ns: int) -> Reply:
    """Run a network `runs` times at least, and until so much time has passed; time each run."""
    fewest = max(runs, _FEWEST_WARM_UPS if at_least_ns else 1)
    durations: list[int] = []
    before = Clocks.read()
    while len(durations) < fewest or sum(durations) < at_least_ns:
        begin = time.perf_counter_ns()
        engine.run(arrays)
        durations.append(time.perf_counter_ns() - begin)
    shares = interference(before, Clocks.read(), engine.threads)
    return {"run_ns": durations, "interference": asdict(shares)}


def random_inputs(inputs: list[dict[str, Any]], seed: int) -> list[Array]:
    """Return seeded normal numbers, and zeros where the network takes integers."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [
        generator.standard_normal(item["shape"], dtype=np.float32)
        if item["dtype"] == "float32"
        else np.zeros(item["shape"], item["dtype"])
        for item in inputs
    ]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, EdgekitError) else f"{type(error).__name__}: {text}"


def claim_stdout() -> TextIO:
    """Keep fd 1 for replies and send what C++ libraries print there to stderr instead."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


def _write(replies: TextIO, reply: Reply) -> None:
    replies.write(json.dumps(reply, allow_nan=False) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
