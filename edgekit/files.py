"""Files that a user names: what is written is whole or absent, what is read is bounded."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekit.errors import EdgekitError


def os_reason(error: OSError) -> str:
    """Return what the system says, in words for a user."""
    if error.errno == errno.ENOSPC:
        return "no space left on the device"
    return error.strerror or str(error)


LONGEST_TEXT_BYTES = 16 << 20
"""A tokenizer takes some 40 bytes of memory for each byte of a text."""


def read_text(path: Path) -> str:
    """Return a UTF-8 file as it is, line ends included; EdgekitError names what is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_TEXT_BYTES + 1)  # a device has no end
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
    if len(data) > LONGEST_TEXT_BYTES:
        raise EdgekitError(f"{path}: is longer than {LONGEST_TEXT_BYTES >> 20} MiB; give a part")
    if not data:
        raise EdgekitError(f"{path}: is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise EdgekitError(f"{path}: is not UTF-8: {at}") from error


def check_output_file(path: Path, force: bool) -> None:
    """Raise EdgekitError where `path` cannot become a file, before any work is done for it."""
    if path.is_dir():
        raise EdgekitError(f"{path}: is a folder; give the name of a file")
    there = os.path.lexists(path)  # a dangling link is something, too
    if there and not force:
        raise EdgekitError(f"{path}: exists; give --force to replace it or another -o")
    if there and (path.is_symlink() or not path.is_file()):
        raise EdgekitError(f"{path}: is no regular file, so --force does not replace it")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise EdgekitError where nothing can be made at `path`."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise EdgekitError(f"{parent}: does not exist, so {path.name} cannot be made in it")
    try:  # of some file systems only the attempt says it: root may write to /proc, by its modes
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise EdgekitError(
            f"{parent}: is not writable ({os_reason(error)}), so {path.name} cannot be made in it"
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a hidden name to write; it becomes `path` in one rename, or nothing is left.

    An existing file is replaced. EdgekitError where the system refuses.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be written: {os_reason(error)}") from error
    finally:
        with suppress(OSError):  # there is none after the rename
            scratch.unlink()
