"""Files that a user names: what is written is whole or absent, what is read is bounded."""

import codecs
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgekit.common.last_words import half_written
from edgekit.errors import EdgekitError, one_line

_PARTIAL = ".partial"


def os_reason(error: OSError) -> str:
    """Return what the system says, in words for a user."""
    if error.errno == errno.ENOSPC:
        return "no space left on the device"
    if error.errno == errno.EDQUOT:
        return "the quota is used up"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open (`ulimit -n` says how many may be)"
    return error.strerror or str(error)


def check_file(path: Path, hint: str = "") -> None:
    """Raise EdgekitError where `path` is no regular file; `hint` follows where there is none."""
    refuse_irregular(path)
    if not path.is_file():
        there = "is a folder, not a file" if path.is_dir() else f"no such file{hint}"
        raise EdgekitError(f"{path}: {there}")


def refuse_irregular(path: Path) -> None:
    """Raise EdgekitError for a pipe, a device or a socket, which may have no writer or no end.

    A folder, and a name of nothing, say so by themselves when they are opened.
    """
    if not {_kind(path)} <= {None, stat.S_IFREG, stat.S_IFDIR}:
        raise EdgekitError(f"{path}: is no regular file")


def is_pipe(path: Path) -> bool:
    """Whether what `path` names can be read but once, as `<(command)` of a shell."""
    return _kind(path) == stat.S_IFIFO


def _kind(path: Path) -> int | None:
    """Return what `path` names, as `stat` counts kinds; None where there is nothing."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return None


def first_bytes(path: Path, count: int) -> bytes:
    """Return the start of a regular file; nothing where it cannot be read."""
    if _kind(path) != stat.S_IFREG:
        return b""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def stand_in(path: Path) -> str | None:
    """Say what stands where a file should be: a pointer to it, a web page, nothing; else None."""
    if _kind(path) != stat.S_IFREG:
        return None
    head = first_bytes(path, 256)
    if not head:
        return "is empty: its download did not finish; download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return (
            "is a Git LFS pointer, not the file itself: run `git lfs install` and `git lfs pull` "
            "in its repository"
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), not the file: download the file itself"
    return None


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LONGEST_TEXT_BYTES = 16 << 20
"""A tokenizer takes some 40 bytes of memory for each byte of a text."""


def read_text(path: Path) -> str:
    """Return a UTF-8 text as it is, line ends included; EdgekitError names what is wrong.

    A byte order mark at its begin is no part of it.

    A text may come through a pipe that somebody writes to, such as `<(command)` of a shell; one
    without a writer is not waited for.
    """
    pipe = is_pipe(path)
    if not pipe:
        refuse_irregular(path)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            data = file.read(LONGEST_TEXT_BYTES + 1)
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
    if len(data) > LONGEST_TEXT_BYTES:
        raise EdgekitError(f"{path}: is longer than {LONGEST_TEXT_BYTES >> 20} MiB; give a part")
    if not data:
        raise EdgekitError(f"{path}: {'is a pipe that nobody writes to' if pipe else 'is empty'}")
    try:
        return decode_text(data)
    except ValueError as error:
        raise EdgekitError(f"{path}: {error}") from error


def decode_text(data: bytes) -> str:
    """Return UTF-8 without the byte order mark that some editors begin it with.

    ValueError says what it is instead, to go on from the name of a file.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError("is not UTF-8 but UTF-16 or UTF-32: save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        at = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ValueError(f"is not UTF-8: {at}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe without a writer is at its end, rather than waiting for one to come."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def check_output_file(path: Path, force: bool) -> None:
    """Raise EdgekitError where `path` cannot become a file, before any work is done for it."""
    if path.is_dir():
        raise EdgekitError(f"{path}: is a folder; give the name of a file", field="output")
    there = os.path.lexists(path)  # a dangling link is something, too
    if there and not force:
        raise EdgekitError(
            f"{path}: exists; give `force` to replace it or another `output`", field="output"
        )
    if there and (path.is_symlink() or not path.is_file()):
        raise EdgekitError(
            f"{path}: is no regular file, so `force` does not replace it", field="output"
        )
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise EdgekitError where nothing can be made at `path`; folders above it may be missing."""
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise EdgekitError(f"{parent}: is no folder, so {path.name} cannot be made in it")
    try:  # of some file systems only the attempt says it: root may write to /proc, by its modes
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise EdgekitError(
            f"{parent}: is not writable ({os_reason(error)}), so {path.name} cannot be made in it"
        ) from error


def make_folder(folder: Path, hint: str = "") -> None:
    """Make a folder and those above it; EdgekitError, with the hint, where the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgekitError(f"{folder}: cannot be made: {os_reason(error)}{hint}") from error


def cache_folder() -> Path:
    """Return edgekit's folder in the user's cache (XDG Base Directory Specification).

    RuntimeError for a user without a home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return home / "edgekit"


def partial_name(path: Path) -> Path:
    """Return the hidden name under which this process makes a file or folder beside `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")


def abandoned(path: Path) -> list[Path]:
    """Return what processes that are no more left under such names, and names that begin so."""
    begin = f".{path.name}."
    try:
        found = sorted(path.parent.glob(f"{glob.escape(begin)}*{_PARTIAL}*"))
    except OSError:
        return []
    pids = [name.name.removeprefix(begin).partition(".")[0] for name in found]
    return [
        each
        for each, pid in zip(found, pids, strict=True)
        if pid.isdigit() and not Path("/proc", pid).exists()
    ]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a hidden name to write; it becomes `path` in one rename, or nothing is left.

    An existing file is replaced, and what killed processes left of the same file is removed.
    EdgekitError where the system refuses.
    """
    for leftover in abandoned(path):
        with suppress(OSError):  # a folder, which is none of ours
            leftover.unlink()
    with unfinished(path) as scratch:
        try:
            yield scratch
            scratch.replace(path)
        except OSError as error:
            raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> EdgekitError:
    """Say why nothing was made at `path`; of a full disk, whether it is that of temporary files."""
    reason = os_reason(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and _was_temporary(path, error):
        return EdgekitError(
            f"{tempfile.gettempdir()}: {reason}, and temporary files are kept there: free some or "
            f"set TMPDIR to another folder; {path} was not written"
        )
    return EdgekitError(f"{path}: cannot be written: {reason}")


def _was_temporary(path: Path, error: OSError) -> bool:
    """Whether it was a temporary file that had no room; where nothing says it, the fuller disk."""
    try:
        temporary, parent = Path(tempfile.gettempdir()), path.absolute().parent
        if error.filename is not None:
            file = Path(os.fsdecode(error.filename)).absolute()
            return file.is_relative_to(temporary) and not file.is_relative_to(parent)
        return shutil.disk_usage(temporary).free < shutil.disk_usage(parent).free
    except (OSError, TypeError):  # a folder that is gone, a file that is a number
        return False


_unfinished: set[Path] = set()


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Give a hidden name beside `path` for a file or a folder; what has it at the end is removed.

    So it is where a library ends the process, by the supervisor or by `remove_unfinished`. Folders
    above `path` that are missing are made, and removed again where nothing comes to be in them.
    """
    scratch = partial_name(path.absolute())
    missing = [folder for folder in scratch.parents if not os.path.lexists(folder)]
    make_folder(scratch.parent)
    _unfinished.add(scratch)
    try:
        with half_written(scratch):
            yield scratch
    finally:
        _remove(scratch)
        _unfinished.discard(scratch)
        for folder in missing:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def remove_unfinished() -> None:
    """Remove what is being written, before the process ends without its `finally` clauses."""
    for scratch in list(_unfinished):
        _remove(scratch)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # there is none after the rename, or it was a folder
        path.unlink()


_MAX_JSON_BYTES = 256 << 20


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose content is an object; anything else is refused naming the file."""
    try:
        refuse_irregular(path)
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise EdgekitError(f"{path}: too large for a JSON file of a model")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        what = stand_in(path) or f"not valid JSON: {one_line(error, 120)}"
        raise EdgekitError(f"{path}: {what}") from error
    if not isinstance(content, dict):
        raise EdgekitError(f"{path}: must hold a JSON object")
    return content
