"""Files of users: outputs whole or absent, and nothing read that has no writer or no end."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError
from edgekit.exporters.imatrix import Imatrix
from edgekit.files import check_file, check_output_file, new_file, read_text
from edgekit.models.checkpoint import read_header
from edgekit.models.config import load_json_object
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.recipe import Recipe
from edgekit.quantize.storage import load_quantized


def test_a_new_file_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with new_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    expected = EdgekitError if error is OSError else error
    with pytest.raises(expected), new_file(path) as scratch:
        scratch.write_text("half")
        raise error("broken")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for place in ("file/f", "absent/f", "folder"):
        with (
            pytest.raises(EdgekitError, match=f"{place}: cannot be written: "),
            new_file(tmp_path / place) as scratch,
        ):
            scratch.write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_place_that_only_looks_writable_is_refused_before_any_work() -> None:
    with pytest.raises(EdgekitError, match="/proc: is not writable .*, so x cannot be made in it"):
        check_output_file(Path("/proc/x"), force=False)


def test_an_output_is_refused_before_any_work(tmp_path: Path) -> None:
    file, link, dangling = tmp_path / "file", tmp_path / "link", tmp_path / "dangling"
    file.touch()
    link.symlink_to(file)
    dangling.symlink_to(tmp_path / "nothing")
    check_output_file(tmp_path / "new", force=False)
    check_output_file(file, force=True)
    for path, force, words in (
        (file, False, "exists; give --force"),
        (tmp_path, True, "is a folder"),
        (link, True, "is no regular file, so --force does not replace it"),
        (dangling, False, "exists; give --force"),
        (dangling, True, "is no regular file, so --force does not replace it"),
        (tmp_path / "absent" / "f", False, "does not exist, so f cannot be made in it"),
        (file / "f", False, "does not exist, so f cannot be made in it"),
    ):
        with pytest.raises(EdgekitError, match=words):
            check_output_file(path, force)


READERS: list[Callable[[Path], object]] = [
    read_text,
    check_file,
    load_quantized,
    read_header,
    load_json_object,
    Calibration.load,
    Recipe.load,
    Imatrix.load,
]


@pytest.mark.parametrize("read", READERS)
def test_a_pipe_without_a_writer_is_not_waited_for(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    said = "is a pipe that nobody writes to" if read is read_text else "is no regular file"
    with pytest.raises(EdgekitError, match=f"pipe.json: {said}"):
        read(pipe)


@pytest.mark.parametrize("read", READERS)
def test_a_device_is_not_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(EdgekitError, match=r"zero\.json: is no regular file"):
        read(tmp_path / "zero.json")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match=f"{tmp_path}: is a folder, not a file"):
        check_file(tmp_path)
    with pytest.raises(EdgekitError, match="none: no such file; make one"):
        check_file(tmp_path / "none", "; make one")


def test_a_text_may_come_through_a_pipe_that_somebody_writes_to(tmp_path: Path) -> None:
    """As `<(command)` of a shell, whose name is `/dev/fd/N`; the writer may take its time."""
    script = "import time; time.sleep(0.3); print('once upon a time' * 9000)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        path = Path(f"/dev/fd/{writer.stdout.fileno()}")
        assert read_text(path) == "once upon a time" * 9000 + "\n"
        assert writer.wait() == 0
    (tmp_path / "text").write_text("a file")
    with (tmp_path / "text").open() as file:
        assert read_text(Path(f"/dev/fd/{file.fileno()}")) == "a file"
