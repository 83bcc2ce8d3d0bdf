"""The first load of an engine's library: tried in a process of its own, for it may not survive it.

A library that was compiled wrongly, or for another CPU, ends the process at an instruction: some
at their import, some in the first product. So a small model of `trial_models/` is loaded and run
in a child before the library comes into this process. That a library survived is kept in the
user's cache, by what the library's files and the CPU are; what dies is tried again each time, for
it may be mended meanwhile.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from edgekit.common.files import cache_folder, new_file
from edgekit.common.process_end import how_it_ended, last_line, quoted
from edgekit.errors import EdgekitError, EngineCrash
from edgekit.runtime.engines.crash import library_of
from edgekit.runtime.engines.registry import ENGINES

_CPUINFO = Path("/proc/cpuinfo")
_MODELS = Path(__file__).with_name("trial_models")
# This very package, wherever the process is started: `-m` would look into the working folder first.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    from edgekit.runtime.engines.first_load import run_trial
    run_trial(sys.argv[2])
except Exception:
    sys.exit(3)
"""
_FAILED = 3
_TIMEOUT = 600  # seconds; the trial takes some, on a machine that swaps many
_FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_PROMPT = list(range(20))  # more than one token: products of matrices, and not of vectors alone


@cache  # what raises is not kept
def check_first_load(engine: str) -> None:
    """Raise EngineCrash where an engine's library does not survive to be used here.

    An engine that is not installed, or has no machine code of its own, is no matter of this.
    """
    if not sys.executable or not (code := sorted(_code(engine))):
        return
    key: dict[str, object] = {"engine": engine, "code": code, "cpu": _cpu()}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    try:
        kept = cache_folder() / "first-load" / f"{digest[:32]}.json"
    except RuntimeError:  # a user without a home
        _survives(engine)
        return
    if not _is_kept(kept, key) and _survives(engine):
        with suppress(OSError, EdgekitError):  # then the next process tries again
            kept.parent.mkdir(parents=True, exist_ok=True)
            with new_file(kept) as scratch:
                scratch.write_text(json.dumps(key, indent=1) + "\n")


def run_trial(engine: str) -> None:
    """Load and run a small model in this process, which may be its end."""
    module = ENGINES.load(engine, "decoder")
    with module.open_engine(_MODELS / library_of(engine).trial, 1, None) as opened:
        opened.prefill(_PROMPT)
        opened.decode(0)


def _survives(engine: str) -> bool:
    """Run the trial in a child; EngineCrash where it dies.

    False where it fails without that, which the engine itself will say, or is killed.
    """
    with tempfile.TemporaryFile() as said:
        try:
            status = subprocess.run(
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path), engine],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=_TIMEOUT,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise _failure(engine, f"did not end in {_TIMEOUT} seconds") from error
        said.seek(0)
        last = last_line(said.read().decode(errors="replace"))
    if status in (0, _FAILED) or -status in _FROM_OUTSIDE:
        return status == 0
    raise _failure(engine, f"ended in {how_it_ended(status)}{quoted(last)}")


def _failure(engine: str, how: str) -> EngineCrash:
    library = library_of(engine)
    return EngineCrash(
        f"{library.name} does not work on this machine: running a small model {how}; "
        f"{library.reinstall_command()}"
    )


def _code(engine: str) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of each file with an engine's machine code."""
    for package, pattern in library_of(engine).code:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in Path(folder).glob(pattern):
                with suppress(OSError):
                    facts = file.stat()
                    yield str(file.resolve()), facts.st_size, facts.st_mtime_ns


def _cpu() -> list[str]:
    """Return what the kernel says of the first CPU that does not change while it runs."""
    try:
        block = _CPUINFO.read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return list(os.uname())
    changing = ("cpu MHz", "bogomips", "BogoMIPS")
    return [line for line in block.splitlines() if not line.startswith(changing)]


def _is_kept(kept: Path, key: dict[str, object]) -> bool:
    """Whether the cache says that it survived; a damaged file says nothing."""
    try:
        found: object = json.loads(kept.read_text())
    except (OSError, ValueError):
        return False
    written: object = json.loads(json.dumps(key))  # tuples are lists there
    return found == written
