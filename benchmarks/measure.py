"""Runs a command to its end and tells what it cost: wall time and peak memory of the whole tree."""

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Cost:
    """What one finished command took."""

    wall_s: float
    cpu_s: float
    peak_process_bytes: int  # the largest single process, by the kernel's own high-water mark
    peak_tree_bytes: int  # sampled sum while there were several at once; 0 if never or not watched

    @property
    def peak_bytes(self) -> int:
        """The larger of the two: sampling misses short peaks, the mark misses sums."""
        return max(self.peak_process_bytes, self.peak_tree_bytes)


@dataclass(frozen=True)
class Finished:
    stdout: str
    cost: Cost


class CommandFailed(RuntimeError):
    """The command ended with a status other than 0."""


def run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    log: Path | None = None,
    watch_tree: bool = False,
) -> Finished:
    """Run `command`; its stderr goes to the file `log`, or to ours.

    `watch_tree` samples the memory of all its processes, which takes time from what is run: for
    costs, not for speeds. Raises CommandFailed with the command and its status.
    """
    errors = log.open("w") if log else None
    try:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=errors)
        tree = _TreePeak(process.pid) if watch_tree else None
        assert process.stdout is not None
        with process.stdout:
            stdout = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        peak_tree = tree.stop() if tree else 0
    finally:
        if errors:
            errors.close()
    if process.returncode:
        where = f", see {log}" if log else ""
        raise CommandFailed(f"status {process.returncode}{where}: {' '.join(command)}")
    cost = Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak_tree)
    return Finished(stdout, cost)


class _TreePeak:
    """Samples a process tree's memory in a thread until stopped."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        before = 0
        while not self._done.wait(SAMPLE_SECONDS):
            now = _tree_bytes(self._root)
            # a child between vfork and exec shows its parent's memory as its own: for some
            # milliseconds, so never in two samples
            self._peak = max(self._peak, min(before, now))
            before = now


def _tree_bytes(root: int) -> int:
    """Return the memory of several processes together; 0 for one, whose peak the kernel keeps."""
    processes = _descendants(root)
    return sum(map(_proportional_bytes, processes)) if len(processes) > 1 else 0


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        # `pid (command) state parent ...`, and the command may hold spaces and brackets
        fields = _read(status).rpartition(")")[2].split()
        if fields:
            children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found = [root]
    for parent in found:  # grows while it is walked: breadth first
        found.extend(children.get(parent, ()))
    return found


def _proportional_bytes(pid: int) -> int:
    """Return PSS + swap: a page that n processes share counts 1/n in each."""
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("Pss:", "SwapPss:")))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process ended between listing and reading
        return ""
