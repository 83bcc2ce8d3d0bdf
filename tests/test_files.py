"""Output files: refused early where they cannot be, whole or absent afterwards."""

from pathlib import Path

import pytest

from edgekit.errors import EdgekitError
from edgekit.files import check_output_file, new_file


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
