"""The parent's end of one benchmark worker: starts it on a host, asks by its protocol, ends it.

The protocol is in the docstring of `worker.py`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from edgekit.common.process_end import how_it_ended, quoted
from edgekit.devices.hosts.host import Host
from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.bandwidth import ReadBandwidth
from edgekit.errors import EdgekitError, EngineCrash
from edgekit.formats.artifact.fields import optional, take
from edgekit.runtime.bench.replies import Loaded, Reply, Times, bandwidth
from edgekit.runtime.bench.worker import PROTOCOL
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.engines.crash import library_of
from edgekit.runtime.engines.registry import ENGINES


class WorkerProcess:
    """A process on a host that speaks the worker's protocol."""

    def __init__(self, label: str, host: Host = LOCAL) -> None:
        """Start the process; `label` names its artifact in errors."""
        self.label = label
        self.peak_bytes: int | None = None
        self._engine: str | None = None
        self._runner: Reply | None = None
        self._process = host.start(worker_command(host))

    def load_decoder(
        self, engine: str, model: str, threads: int | None, context: int | None
    ) -> Loaded:
        """Load a language model's file by its path there; without `threads` the engine chooses."""
        keys = {"engine": engine, "model": model, "threads": threads, "context": context}
        reply = self._load("decoder", engine, keys)
        with self._reading("load_decoder"):
            return Loaded.decoder(reply)

    def load_network(self, engine: str, model: str, threads: int | None) -> Loaded:
        """Load a network's file by its path there; without `threads` the engine chooses."""
        keys = {"engine": engine, "model": model, "threads": threads}
        reply = self._load("network", engine, keys)
        with self._reading("load_network"):
            return Loaded.network(reply)

    def time_decoder(self, shape: Shape, seed: int) -> Times:
        """Time one repetition of a test."""
        asked = {"kind": shape.kind, "tokens": shape.tokens, "depth": shape.depth, "seed": seed}
        reply = self._ask("time_decoder", asked, shape.name)
        with self._reading("time_decoder"):
            return Times.decoder(reply)

    def time_network(
        self, inputs: Sequence[Mapping[str, Any]], seed: int, runs: int, at_least_ns: int
    ) -> Times:
        """Time a burst of runs."""
        asked = {"inputs": list(inputs), "seed": seed, "runs": runs, "at_least_ns": at_least_ns}
        reply = self._ask("time_network", asked, "running the module")
        with self._reading("time_network"):
            return Times.network(reply)

    def read_bandwidth(self, threads: int) -> ReadBandwidth:
        """Measure how fast the host reads memory with a number of threads."""
        reply = self._ask("bandwidth", {"threads": threads}, "measuring the read bandwidth")
        with self._reading("bandwidth"):
            return bandwidth(reply)

    def close(self) -> None:
        """End the process, also in the middle of a computation; nothing is left to save."""
        self._process.kill()

    def _load(self, kind: str, engine: str, keys: Reply) -> Reply:
        doing = "loading the model" if kind == "decoder" else "loading the module"
        runner = self._greeting(doing)
        able = runner["engines"].get(kind) or []
        if engine not in able:
            raise EdgekitError(
                f"{self.label}: {runner['runner']} runs no {kind} in {engine}: it knows "
                f"{', '.join(map(str, able)) or 'no engine'}"
            )
        self._engine = engine
        return self._ask(f"load_{kind}", keys, doing)

    def _ask(self, op: str, keys: Mapping[str, Any], doing: str) -> Reply:
        """Send a request; returns the reply, of which the memory is already checked and kept."""
        runner = self._greeting(doing)
        if op not in runner["ops"]:
            raise EdgekitError(
                f"{self.label}: {doing}: {runner['runner']} cannot {op}: it knows "
                f"{', '.join(map(str, runner['ops'])) or 'nothing'}"
            )
        self._process.send(json.dumps({"op": op, **keys}))
        reply = self._receive(doing)
        if "error" in reply:
            kind = EngineCrash if "crashed" in reply else EdgekitError
            raise kind(f"{self.label}: {doing}: {reply['error']}")
        with self._reading(op):
            peak = optional(take(reply, "memory", dict), "peak_bytes", int)
        self.peak_bytes = self.peak_bytes if peak is None else max(peak, self.peak_bytes or 0)
        return reply

    def _greeting(self, doing: str) -> Reply:
        """Read the runner's first line, once."""
        if self._runner is None:
            said = self._receive(doing)
            if said.get("protocol") != PROTOCOL:
                raise EdgekitError(
                    f"{self.label}: {said.get('runner', 'the runner')!s:.60} speaks version "
                    f"{said.get('protocol')!r:.20} of the worker's protocol, this edgekit "
                    f"{PROTOCOL}: install the same edgekit on both sides"
                )
            with self._reading("the first line"):
                take(said, "runner", str)
                take(said, "ops", list)
                take(said, "engines", dict)
            self._runner = said
        return self._runner

    def _receive(self, doing: str) -> Reply:
        line = self._process.receive()
        if line is None:
            raise self._death(doing)
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise EngineCrash(
                f"{self.label}: {doing}: the runner answered with what is no JSON object: "
                f"{line!r:.60}"
            )
        return reply

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say of a key that is missing or of another type whose it is."""
        try:
            yield
        except EdgekitError as error:
            raise EngineCrash(
                f"{self.label}: the runner answered {what} not as protocol {PROTOCOL} says: {error}"
            ) from error

    def _death(self, doing: str) -> EdgekitError:
        """Say how the process ended: by which signal, or with what last words."""
        end = self._process.wait()
        if end.status is None or end.status >= 0:
            how = "was lost" if end.status is None else f"ended with status {end.status}"
            return EngineCrash(
                f"{self.label}: {doing}: the engine's process {how}: "
                f"{end.last_words or 'no message'}"
            )
        name = how_it_ended(end.status)
        hint = _SIGNAL_HINTS.get(name, "the model file may be damaged: export it again")
        seen = f" (it held {self.peak_bytes / 1e6:.0f} MB before)" if self.peak_bytes else ""
        known = self._engine is not None and ENGINES.can(self._engine, "installed")
        who = library_of(self._engine or "").name if known else "the engine's process"
        said = quoted(end.last_words)
        return EngineCrash(f"{self.label}: {doing}: {who} was ended by {name}{seen}{said}; {hint}")


_SIGNAL_HINTS = {
    "SIGKILL": "the system does this when memory runs out: "
    "bench fewer artifacts at once, or a smaller model or context",
    "SIGTERM": "something outside edgekit asked it to stop",
}


def worker_command(host: Host) -> tuple[str, ...]:
    """Return what starts a worker on a host."""
    if host.python is None:
        raise EdgekitError(f"{host.name} has no Python with edgekit to run a worker in")
    return (*host.python.command, "-m", "edgekit.runtime.bench.worker")


@contextmanager
def worker_processes(labels: Sequence[str], host: Host = LOCAL) -> Iterator[list[WorkerProcess]]:
    """Start one worker per label and end all of them on the way out, whatever happened."""
    with ExitStack() as stack:
        workers = []
        for label in labels:
            worker = WorkerProcess(label, host)
            stack.callback(worker.close)
            workers.append(worker)
        yield workers
