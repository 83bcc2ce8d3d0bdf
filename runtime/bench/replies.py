"""What a worker answers, checked: EdgekitError names what is not as the protocol says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from edgekit.devices.probe.bandwidth import ReadBandwidth
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.fields import optional, take
from edgekit.runtime.bench.record import Interference, Memory
from edgekit.runtime.engines.engine import Threads

Reply = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """What an engine says once a model is in it; `context` is None for a network."""

    engine: str
    version: str | None
    built: str | None
    context: int | None
    threads: Threads
    affinity: tuple[int, ...]
    import_ns: int | None
    load_ns: int
    before_load_bytes: int | None

    @classmethod
    def decoder(cls, reply: Reply) -> Self:
        """Read the answer to `load_decoder`."""
        used = take(reply, "threads", dict)
        threads = Threads(take(used, "prompt", int), take(used, "decode", int))
        return cls._of(reply, threads, take(reply, "context", int))

    @classmethod
    def network(cls, reply: Reply) -> Self:
        """Read the answer to `load_network`."""
        return cls._of(reply, Threads.for_both(take(reply, "threads", int)), None)

    @classmethod
    def _of(cls, reply: Reply, threads: Threads, context: int | None) -> Self:
        return cls(
            engine=take(reply, "engine", str),
            version=optional(reply, "version", str),
            built=optional(reply, "built", str),
            context=context,
            threads=threads,
            affinity=_numbers(reply, "affinity"),
            import_ns=optional(reply, "import_ns", int),
            load_ns=take(reply, "load_ns", int),
            before_load_bytes=optional(reply, "before_load_bytes", int),
        )

    def facts(self, peak: int | None) -> dict[str, Any]:
        """Return the fields of `InProcess`, with the peak of memory."""
        return {
            "engine": self.engine,
            "engine_version": self.version,
            "engine_built": self.built,
            "affinity": self.affinity,
            "import_ns": self.import_ns,
            "load_ns": self.load_ns,
            "memory": Memory(peak=peak, before_load=self.before_load_bytes),
        }


@dataclass(frozen=True)
class Times:
    """What one repetition took, in nanoseconds, and what went on beside it.

    `each` are the tokens of a decode or the runs of a network, none for a prefill, which alone has
    a `first_token`.
    """

    elapsed: int
    each: tuple[int, ...]
    first_token: int | None
    interference: Interference

    @classmethod
    def decoder(cls, reply: Reply) -> Self:
        """Read the answer to `time_decoder`."""
        return cls(
            take(reply, "elapsed_ns", int),
            _numbers(reply, "token_ns"),
            optional(reply, "first_token_ns", int),
            _interference(reply),
        )

    @classmethod
    def network(cls, reply: Reply) -> Self:
        """Read the answer to `time_network`."""
        each = _numbers(reply, "run_ns")
        return cls(sum(each), each, None, _interference(reply))


def bandwidth(reply: Reply) -> ReadBandwidth:
    """Read the answer to `bandwidth`."""
    samples = take(reply, "samples_ns", dict)
    return ReadBandwidth(
        _number(reply, "gb_per_s"),
        take(reply, "kernel", str),
        take(reply, "threads", int),
        take(reply, "buffer_bytes", int),
        {kernel: _numbers(samples, kernel) for kernel in samples},
    )


def _interference(reply: Reply) -> Interference:
    found = take(reply, "interference", dict)
    shares = {
        name: None if found.get(name) is None else _number(found, name)
        for name in ("other", "waited", "throttled")
    }
    return Interference(_number(found, "own"), **shares)


def _number(holder: Mapping[str, Any], key: str) -> float:
    value = holder.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EdgekitError(f"{key} must be a number, got {value!r:.60}")
    return float(value)


def _numbers(holder: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return a list of whole numbers, of nanoseconds or of CPUs."""
    found = take(holder, key, list)
    for each in found:
        if type(each) is not int or each < 0:
            raise EdgekitError(f"{key} must hold whole numbers, got {each!r:.60}")
    return tuple(found)
