"""A float GGUF through llama.cpp's own quantizer.

The file is, byte for byte, what `llama-quantize` of the same llama.cpp makes of this float file.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from edgekit.common.files import new_file
from edgekit.common.install import install_command
from edgekit.common.process_end import how_it_ended, last_line, quoted
from edgekit.common.progress import Progress
from edgekit.errors import EdgekitError, EngineCrash
from edgekit.exporters.gguf.llama.formats import LlamaFormat
from edgekit.formats.gguf.writer import PlannedTensor

# This very package, wherever the process is started: `-m` would look into the working folder first.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from edgekit.exporters.gguf.llama.process import main
main()
"""
_PACKAGE = "llama-cpp-python"
_STEPS = 4  # lines of progress while tensors are quantized


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a quantized file: ggml's name of its type, its shape (rows first), its bytes.

    `instead_of` is the type that the format wanted, where the row's length does not fit it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    instead_of: str | None = None


def quantize_gguf(
    source: Path,
    output: Path,
    form: LlamaFormat,
    progress: Progress,
    *,
    imatrix: Path | None = None,
    threads: int | None = None,
) -> list[StoredTensor]:
    """Write `source`, a float GGUF, to `output` in a format of llama.cpp's; return its tensors.

    `imatrix` must be of this model (`Imatrix.check_model`). Nothing is left after a failure or an
    interrupt, which ends the work at once. EdgekitError with llama.cpp's reason where it refuses.
    """
    with new_file(output) as partial:
        log = _run(source, partial, form, progress, imatrix, threads, dry_run=False)
    return _stored_tensors(log)


def planned_tensors(
    source: Path, form: LlamaFormat, imatrix: Path | None = None
) -> list[StoredTensor]:
    """Return what `quantize_gguf` would store; of `source` the head is read alone."""
    nowhere = Path(os.devnull)
    log = _run(source, nowhere, form, lambda _: None, imatrix, threads=1, dry_run=True)
    return _stored_tensors(log)


def quantizer_version() -> dict[str, str]:
    """Return the version of the package that holds llama.cpp's quantizer."""
    return {_PACKAGE: metadata.version(_PACKAGE)}


def _run(
    source: Path,
    output: Path,
    form: LlamaFormat,
    progress: Progress,
    imatrix: Path | None,
    threads: int | None,
    dry_run: bool,
) -> str:
    """Let the process do the job; return llama.cpp's log."""
    if find_spec("llama_cpp") is None:
        raise EdgekitError(
            f"{form.name} is made by llama.cpp's quantizer: {install_command('gguf')}"
        )
    job = {
        "source": str(source),
        "output": str(output),
        "file_type": form.file_type,
        "threads": threads or len(os.sched_getaffinity(0)),
        "imatrix": None if imatrix is None else str(imatrix),
        "dry_run": dry_run,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        log = _converse(process, json.dumps(job), form.name, progress)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise _failure(process.returncode, log, form, output)
    return log


def _converse(process: "subprocess.Popen[str]", job: str, name: str, progress: Progress) -> str:
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        with suppress(BrokenPipeError):  # it died: its last words and its status say why
            process.stdin.write(job)
            process.stdin.close()
        lines, step = [], -1
        for line in process.stdout:
            lines.append(line)
            place = _COUNTER.match(line)
            if place and (now := _STEPS * (int(place[1]) - 1) // int(place[2])) > step:
                step = now
                progress(f"quantizing to {name} in llama.cpp, {now / _STEPS:.0%}")
    process.wait()
    return "".join(lines)


def _failure(status: int, log: str, form: LlamaFormat, output: Path) -> EdgekitError:
    """Return llama.cpp's reason in one line."""
    reason = log.rpartition("failed to quantize: ")[2] if status > 0 else ""
    if "iostream" in reason or "basic_ios" in reason:  # what std::ofstream says of any failed write
        return EdgekitError(f"{output.parent}: cannot be written to: its device is full or refuses")
    kind = EngineCrash if status < 0 else EdgekitError
    if status < 0:
        said = _assertion(log) or last_line(log)
        reason = f"its process was ended by {how_it_ended(status)}{quoted(said)}"
        if status == -signal.SIGKILL:
            reason += ", as the system does when memory runs out"
    last = (reason or log).strip().rpartition("\n")[2][-300:]
    return kind(f"llama.cpp cannot make {form.name}: {last or 'it gave no reason'}")


def _assertion(log: str) -> str:
    """Return what ggml says before it ends the process, and before the backtrace that follows."""
    return next((line.strip() for line in log.splitlines() if "GGML_ASSERT" in line), "")


_COUNTER = re.compile(r"\[ *(\d+)/ *(\d+)\] ")
_TENSOR = re.compile(
    r"^\[ *\d+/ *(?P<count>\d+)\] (?P<name>\S+) +- \[(?P<shape>[\d, ]+)\], type = +(?P<source>\w+)"
    r", "
    r"(?:converting to (?P<made>\w+) \.\. )?size = [^(\n]*(?:\((?P<planned>\w+)\))?$",
    re.MULTILINE,
)
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+) .*\(required for type +(?P<wanted>\w+)\).* -> falling back to"
)
_REMARK = re.compile(r"\n=+ .*: did not find weights for .*\n")  # in the middle of a tensor's line


def _stored_tensors(log: str) -> list[StoredTensor]:
    """Read the log's line of every tensor (src/llama-quant.cpp, llama_model_quantize_impl)."""
    wanted = {match["name"]: match["wanted"].upper() for match in _FALLBACK.finditer(log)}
    tensors, count = [], None
    for match in _TENSOR.finditer(_REMARK.sub("", log)):
        count = int(match["count"])
        kind = (match["made"] or match["planned"] or match["source"]).upper()
        stored = PlannedTensor(match["name"], kind, _shape(match["shape"]))
        tensors.append(
            StoredTensor(stored.name, kind, stored.shape, stored.nbytes, wanted.get(stored.name))
        )
    if len(tensors) != count:
        raise RuntimeError(f"llama.cpp's log tells of {len(tensors)} tensors out of {count}")
    return tensors


def _shape(text: str) -> tuple[int, ...]:
    """Columns first and padded with ones to four axes, in the log."""
    sizes = [int(size) for size in text.split(",")]
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes.pop()
    return tuple(reversed(sizes))
