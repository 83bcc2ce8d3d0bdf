"""The parent's end of one benchmark worker: starts it, asks, samples its memory, ends it."""

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from edgekit.common.process_end import how_it_ended, last_line, quoted
from edgekit.errors import EdgekitError, EngineCrash
from edgekit.runtime.bench.accounting import peak_bytes
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.engines.crash import library_of

_SAMPLING_S = 0.1  # a reading takes about 0.1 ms: a thousandth of one CPU


class WorkerProcess:
    """One `python -m edgekit.runtime.bench.worker` and the greatest memory it was seen to hold."""

    def __init__(self, label: str) -> None:
        """Start the process; `label` names its artifact in errors."""
        self.label = label
        self.peak_bytes: int | None = None
        self._engine: str | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgekit.runtime.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def load(
        self, engine: str, model: str, threads: int | None, context: int | None
    ) -> dict[str, Any]:
        """Load a model file; returns the worker's reply. Without `threads` the engine chooses."""
        self._engine = engine
        request = {
            "op": "load",
            "engine": engine,
            "model": model,
            "threads": threads,
            "context": context,
        }
        return self._ask(request, "loading the model")

    def measure(self, shape: Shape, seed: int) -> dict[str, Any]:
        """Time one repetition of a test; returns the worker's reply."""
        request = {
            "op": "measure",
            "kind": shape.kind,
            "tokens": shape.tokens,
            "depth": shape.depth,
            "seed": seed,
        }
        return self._ask(request, shape.name)

    def load_module(self, target: str, model: str, threads: int | None) -> dict[str, Any]:
        """Load a module's file; returns the worker's reply."""
        self._engine = target
        request = {"op": "load_module", "target": target, "model": model, "threads": threads}
        return self._ask(request, "loading the module")

    def run_module(
        self, inputs: list[dict[str, Any]], seed: int, runs: int, at_least_ns: int
    ) -> dict[str, Any]:
        """Time a burst of runs; returns the worker's reply."""
        request = {
            "op": "run_module",
            "inputs": inputs,
            "seed": seed,
            "runs": runs,
            "at_least_ns": at_least_ns,
        }
        return self._ask(request, "running the module")

    def close(self) -> None:
        """End the process, also in the middle of a computation; nothing is left to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with suppress(BrokenPipeError):  # a request that nobody reads any more
                if stream is not None:
                    stream.close()

    def _ask(self, request: dict[str, Any], doing: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death(doing) from None
        while not select.select([self._process.stdout], [], [], _SAMPLING_S)[0]:
            self._sample_memory()
        line = self._process.stdout.readline()
        if not line:
            raise self._death(doing)
        self._sample_memory()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = EngineCrash if "crashed" in reply else EdgekitError
            raise kind(f"{self.label}: {doing}: {reply['error']}")
        return reply

    def _sample_memory(self) -> None:
        now = peak_bytes(self.pid)
        if now is not None:
            self.peak_bytes = max(now, self.peak_bytes or 0)

    def _death(self, doing: str) -> EdgekitError:
        """Say how the process ended: by which signal, or with what last words."""
        status = self._process.wait()
        if status >= 0:
            return EngineCrash(
                f"{self.label}: {doing}: the engine's process ended with status {status}: "
                f"{self._last_words() or 'no message'}"
            )
        name = how_it_ended(status)
        hint = _SIGNAL_HINTS.get(name, "the model file may be damaged: export it again")
        seen = f" (it held {self.peak_bytes / 1e6:.0f} MB)" if self.peak_bytes else ""
        who = "the engine's process" if self._engine is None else library_of(self._engine).name
        return EngineCrash(
            f"{self.label}: {doing}: {who} was ended by {name}{seen}{quoted(self._last_words())}; "
            f"{hint}"
        )

    def _last_words(self) -> str:
        self._stderr.seek(0)
        return last_line(self._stderr.read().decode("utf-8", "replace"))


_SIGNAL_HINTS = {
    "SIGKILL": "the system does this when memory runs out: "
    "bench fewer artifacts at once, or a smaller model or context",
    "SIGTERM": "something outside edgekit asked it to stop",
}


@contextmanager
def worker_processes(labels: Sequence[str]) -> Iterator[list[WorkerProcess]]:
    """Start one worker per label and end all of them on the way out, whatever happened."""
    with ExitStack() as stack:
        workers = []
        for label in labels:
            worker = WorkerProcess(label)
            stack.callback(worker.close)
            workers.append(worker)
        yield workers
