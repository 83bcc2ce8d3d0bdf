"""Files of users: outputs whole or absent, and nothing read that has no writer or no end."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.common.files import (
    check_file,
    check_output_file,
    load_json_object,
    new_file,
    not_written,
    read_text,
    remove_unfinished,
    unfinished,
)
from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.llama.imatrix import Imatrix
from edgekit.models.checkpoint import read_header
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
    for place, words in (("file/f", "file: cannot be made: "), ("folder", "cannot be written: ")):
        with (
            pytest.raises(EdgekitError, match=words),
            new_file(tmp_path / place) as scratch,
        ):
            scratch.write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_folders_above_a_file_are_made_and_stay_only_with_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    wanted = tmp_path / "there" / "a" / "b" / "file"
    with pytest.raises(ValueError), new_file(wanted) as scratch:
        scratch.write_text("half")
        raise ValueError
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]
    with new_file(wanted) as scratch:
        scratch.write_text("whole")
    assert wanted.read_text() == "whole"
    assert [path.name for path in wanted.parent.iterdir()] == ["file"]


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
    check_output_file(tmp_path / "absent" / "below" / "f", force=False)
    check_output_file(file, force=True)
    for path, force, words in (
        (file, False, "exists; give `force`"),
        (tmp_path, True, "is a folder"),
        (link, True, "is no regular file, so `force` does not replace it"),
        (dangling, False, "exists; give `force`"),
        (dangling, True, "is no regular file, so `force` does not replace it"),
        (file / "f", False, "file: is no folder, so f cannot be made in it"),
        (file / "below" / "f", False, "file: is no folder, so f cannot be made in it"),
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


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\xef\xbb\xbfa\r\nb", "a\r\nb"), ("ä".encode(), "ä"), (b"a\xef\xbb\xbf", "a\ufeff")],
)
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "t").write_bytes(data)
    assert read_text(tmp_path / "t") == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t").write_bytes("a text".encode(encoding))
    with pytest.raises(EdgekitError, match="t: is not UTF-8 but UTF-16 or UTF-32: save it as"):
        read_text(tmp_path / "t")


def test_what_is_unfinished_goes_where_a_library_ends_the_process(tmp_path: Path) -> None:
    with unfinished(tmp_path / "file") as file, unfinished(tmp_path / "folder") as folder:
        file.touch()
        (folder / "deep").mkdir(parents=True)
        assert len(list(tmp_path.iterdir())) == 2
        remove_unfinished()
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_by_whose_file_had_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name tells it; else the fuller of two disks, and they may be one."""
    temporary, out = tmp_path / "temporary", tmp_path / "outputs" / "out"
    temporary.mkdir()
    out.parent.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def said(number: int, file: Path | int | None) -> str:
        return str(not_written(out, OSError(number, os.strerror(number), file)))

    there = f"{temporary}: no space left on the device, and temporary files are kept there: "
    here = f"{out}: cannot be written: "
    assert said(errno.ENOSPC, temporary / "x").startswith(there)
    assert "set TMPDIR to another folder" in said(errno.ENOSPC, temporary / "x")
    assert said(errno.ENOSPC, out / "x") == f"{here}no space left on the device"
    assert said(errno.ENOSPC, None) == f"{here}no space left on the device"
    assert said(errno.ENOSPC, 7) == f"{here}no space left on the device"
    assert said(errno.EDQUOT, temporary / "x").startswith(f"{temporary}: the quota is used up, and")
    assert said(errno.EROFS, temporary / "x") == f"{here}Read-only file system"
    assert said(errno.EMFILE, None).startswith(f"{here}too many files are open (`ulimit -n`")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["export", "lfm2-tiny", "--target", "executorch", "-o"],
            "no space left on the device, and",
        ),
        (["export", "lfm2-tiny", "--target", "onnx", "-o"], "could not write the profile of a run"),
    ],
)
def test_a_full_tmpdir_is_named(tmp_path: Path, arguments: list[str], words: str) -> None:
    """A real one: a file system with room for an empty file, mounted for that process alone."""
    full, out = tmp_path / "full", tmp_path / "outputs" / "out"
    full.mkdir()
    out.parent.mkdir()
    script = (
        'mount -t tmpfs -o size=1m none "$0" && { head -c 1040000 /dev/zero >"$0/fill"; } '
        '2>/dev/null; exec "$@"'
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(full)]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("this system lets no user mount a file system of their own")
    done = subprocess.run(
        [*command, sys.executable, "-m", "edgekit", *arguments, str(out)],
        env=os.environ | {"TMPDIR": str(full)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith(f"edgekit: {full}: ")
    assert words in last
    assert "set TMPDIR to another folder" in last
    assert list(out.parent.iterdir()) == []
