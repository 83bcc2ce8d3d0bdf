"""The artifact folder: complete or absent, and refused where its manifest cannot be trusted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.common.files import sha256_of
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import from_json
from edgekit.formats.artifact.parts import FileFacts
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.artifact.write import (
    check_output,
    copy_tokenizer,
    new_artifact,
    write_manifest,
)

MANIFEST: dict[str, Any] = {
    "model": {"id": "some/model", "revision": None, "sha256": "00"},
    "target": "executorch",
    "file": "model.pte",
    "tensors": [{"tensor": "w", "scheme": "w8", "shape": [2, 3], "bytes": 14}],
    "versions": {"edgekit": "0"},
    "context": 16,
    "bos_id": 1,
    "eos_ids": [7, 9],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small sound artifact; its model file is no program, which only an engine looks at."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.pte").write_bytes(b"weights" * 100)
    (folder / "tokenizer.json").write_text("{}")
    put_manifest(folder)
    return folder


def put_manifest(folder: Path, **changes: object) -> None:
    """Write a manifest that lists what is in the folder."""
    write_manifest(folder, from_json({"format_version": 1, "files": {}} | MANIFEST | changes))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "edgekit.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def assert_refused(folder: Path, words: str) -> None:
    with pytest.raises(EdgekitError, match=words) as raised:
        Artifact.open(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_what_was_written_is_read_back(folder: Path) -> None:
    artifact = Artifact.open(str(folder))
    assert artifact.target == "executorch"
    assert artifact.model_path == folder / "model.pte"
    assert (artifact.context, artifact.bos_id, artifact.eos_ids) == (16, 1, (7, 9))
    assert set(artifact.manifest.files) == {"model.pte", "tokenizer.json"}
    assert artifact.manifest.files["model.pte"] == FileFacts(700, sha256_of(folder / "model.pte"))
    assert artifact.damaged_files() == []


def test_a_changed_byte_is_found_by_the_full_check_alone(folder: Path) -> None:
    (folder / "model.pte").write_bytes(b"weighta" + b"weights" * 99)
    assert Artifact.open(folder).damaged_files() == ["model.pte"]


def test_a_folder_that_is_not_there_and_a_file(folder: Path) -> None:
    assert_refused(folder / "none", "none: does not exist; make one with `edgekit export`")
    assert_refused(folder / "model.pte", "model.pte: is a file, not an artifact folder")


def test_no_manifest(folder: Path) -> None:
    (folder / "edgekit.json").unlink()
    assert_refused(folder, "holds no edgekit.json, so it is no artifact; name a model file in it, ")
    (folder / "onnx").mkdir()
    (folder / "model.pte").rename(folder / "onnx" / "model_q4.onnx")
    assert_refused(folder, "such as .*/artifact/onnx/model_q4.onnx")
    (folder / "onnx" / "model_q4.onnx").unlink()
    assert_refused(folder, "make one with `edgekit export`")


def test_what_is_no_file_and_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, place in (("a.gguf", "/dev/null"), ("b.gguf", tmp_path / "pipe")):
        (tmp_path / name).symlink_to(place)
        assert_refused(tmp_path / name, "is no regular file: neither an artifact folder nor a")


def test_ids_beyond_the_vocabulary(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10}))
    put_manifest(folder)
    assert Artifact.open(folder).eos_ids == (7, 9)
    for change in ({"bos_id": 1 << 40}, {"bos_id": 10}, {"eos_ids": [7, 10]}):
        put_manifest(folder, **change)
        assert_refused(folder, "must be token ids below 10, the vocabulary of config.json, got ")


def test_a_manifest_that_is_a_folder(folder: Path) -> None:
    (folder / "edgekit.json").unlink()
    (folder / "edgekit.json").mkdir()
    assert_refused(folder, "edgekit.json: cannot be read")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b'{"a": ' * 50_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON: NaN is no finite number"),
        (b'{"a": [-Infinity]}', "not valid JSON: -Infinity is no finite number"),
        (b'{"a": 1e999}', "not valid JSON: 1e999 is no finite number"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "not valid JSON: its lists and objects are"),
        (b"[]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object, got NoneType"),
        (b"{}", "format_version must be an integer"),
    ],
)
def test_a_manifest_that_is_no_object(folder: Path, content: bytes, words: str) -> None:
    (folder / "edgekit.json").write_bytes(content)
    assert_refused(folder, words)


@pytest.mark.parametrize("key", ["format_version", "files", *MANIFEST])
@pytest.mark.parametrize("value", [None, True, "x" * 1000, -1, [[]], {"a": 1}, 1.5, [{}], "\n"])
def test_any_key_of_any_type(folder: Path, key: str, value: object) -> None:
    """Refused in one line, or of the right type after all; never another exception."""
    edit(folder, lambda manifest: manifest.update({key: value}))
    try:
        opened = Artifact.open(folder)
    except EdgekitError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
    else:
        assert type(opened.manifest.to_json()[key]) is type(MANIFEST[key])


@pytest.mark.parametrize("bytes_", [0, -1, True, 1.0, 10**400])
@pytest.mark.parametrize("shape", [[2, 3], [], [0], [10**400], [True], [1] * 9])
def test_a_tensor_of_impossible_size(folder: Path, bytes_: object, shape: list[int]) -> None:
    row = {"tensor": "w", "scheme": "w8", "shape": shape, "bytes": bytes_}
    edit(folder, lambda manifest: manifest.update(tensors=[row]))
    assert_refused(folder, "edgekit.json: tensors must hold tensor, scheme, shape, bytes")


@pytest.mark.parametrize("key", ["format_version", "files", *MANIFEST])
def test_a_missing_key(folder: Path, key: str) -> None:
    edit(folder, lambda manifest: manifest.pop(key))
    assert_refused(folder, rf"edgekit.json: {key} must be")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format_version", 0, "format_version must be at least 1, got 0"),
        ("kind", "painting", "kind must be 'module' or absent, got 'painting'"),
        ("recipe", 3, "recipe must be a string, got 3"),
        ("method", ["rtn"], "method must be a string"),
        ("versions", {"edgekit": 1}, "versions: edgekit must be a string, got 1"),
        ("requires", [], "requires must be an object"),
        ("verification", True, "verification must be an object, got True"),
        ("model", {"id": "m", "random_weights": 1}, "model.random_weights must be true or false"),
        ("model", {"id": "m", "sha256": 1}, "model.sha256 must be a string"),
        ("model", {"id": "m", "adapter": {"name": "a"}}, "model.adapter.sha256 must be a string"),
        ("tensors", [{**MANIFEST["tensors"][0], "same_as": 1}], "tensors: same_as must be a str"),
        ("context", 0, "context 0 is out of range"),
        ("context", 1 << 40, "out of range"),
        ("bos_id", -1, "token ids, got -1"),
        ("eos_ids", ["7"], "token ids, got '7'"),
        ("eos_ids", [True], "token ids, got True"),
        ("model", {}, "model.id must be a string"),
        ("tensors", [{"tensor": "w"}], "tensors must hold"),
        ("tensors", [{**MANIFEST["tensors"][0], "shape": [0]}], "tensors must hold"),
        ("tensors", [7], "tensors must hold"),
        ("file", "other.pte", "'other.pte' is not in files"),
    ],
)
def test_values_out_of_range(folder: Path, key: str, value: object, words: str) -> None:
    edit(folder, lambda manifest: manifest.update({key: value}))
    assert_refused(folder, words)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "..", ".", "", "a\\b", "a\0b", "/"]
)
def test_no_path_leaves_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"s")
    facts = {"bytes": 1, "sha256": sha256_of(folder.parent / "secret")}
    edit(folder, lambda manifest: manifest["files"].update({name: facts}))
    edit(folder, lambda manifest: manifest.update({"file": name}))
    assert_refused(folder, "could leave the folder")


@pytest.mark.parametrize("name", ["x" * 256, "é", "\ud800", "\udc80" * 300, "a\nb", "a\n", ".x"])
def test_a_name_that_no_artifact_uses(folder: Path, name: str) -> None:
    edit(folder, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": ""}}))
    assert_refused(folder, "could leave the folder")


def in_a_folder_below(folder: Path, name: str) -> None:
    """List a file under a name and make it the model."""
    facts = {"bytes": 1, "sha256": sha256_of(folder / name)}
    edit(folder, lambda manifest: manifest["files"].update({name: facts}))
    edit(folder, lambda manifest: manifest.update({"file": name}))


def test_a_file_may_lie_one_folder_below(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"m")
    in_a_folder_below(folder, "onnx/model.onnx")
    artifact = Artifact.open(folder)
    assert artifact.model_path == folder / "onnx" / "model.onnx"
    assert artifact.damaged_files() == []


def test_a_folder_below_that_is_a_link_leaves_the_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "model.onnx").write_bytes(b"m")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")
    in_a_folder_below(folder, "onnx/model.onnx")
    assert_refused(folder, "could leave the folder")


@pytest.mark.parametrize(
    "name", ["a/b/c", "onnx//x", "onnx/", "/x", "onnx/../x", "onnx/..", "./x", "onnx/.x", "a\\b/c"]
)
def test_no_other_place_below(folder: Path, name: str) -> None:
    edit(folder, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": ""}}))
    assert_refused(folder, "could leave the folder")


@pytest.mark.parametrize("facts", [None, [], {}, {"bytes": "1", "sha256": ""}, {"bytes": 1}])
def test_a_file_without_facts(folder: Path, facts: object) -> None:
    edit(folder, lambda manifest: manifest["files"].update({"model.pte": facts}))
    assert_refused(folder, "must hold bytes and sha256")


def test_a_truncated_and_a_missing_file(folder: Path) -> None:
    (folder / "model.pte").write_bytes(b"weights")
    assert_refused(folder, "has 7 bytes, edgekit.json says 700: it is truncated")
    (folder / "model.pte").unlink()
    assert_refused(folder, "model.pte: is missing")


def test_a_file_whose_place_a_folder_takes(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    assert_refused(folder, "tokenizer.json: is missing")


def test_only_the_tokenizers_files_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "train.py"):
        (source / name).write_text(name)
    copy_tokenizer(source, target)
    assert sorted(file.name for file in target.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
    ]


def fill(output: Path, force: bool, text: str = "new") -> None:
    with new_artifact(output, force) as staging:
        (staging / "model.pte").write_text(text)
        put_manifest(staging)
        assert not output.exists() or force


def test_the_folder_appears_at_the_end_and_alone(tmp_path: Path) -> None:
    fill(tmp_path / "out", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Artifact.open(tmp_path / "out").model_path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, EdgekitError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    expected = EdgekitError if error is OSError else error
    with pytest.raises(expected), new_artifact(tmp_path / "out", force=False) as staging:
        (staging / "half").write_text("half")
        raise error("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_artifact_that_was_there(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(RuntimeError), new_artifact(folder, force=True) as staging:
        (staging / "model.pte").write_text("half")
        raise RuntimeError
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_force_replaces_an_artifact_whole(folder: Path) -> None:
    (folder / "left over").write_text("old")
    fill(folder, force=True)
    assert sorted(file.name for file in folder.iterdir()) == ["edgekit.json", "model.pte"]
    assert (folder / "model.pte").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_what_exists_is_not_replaced_without_force(folder: Path) -> None:
    with pytest.raises(EdgekitError, match="give `force` to replace it or another `output`"):
        check_output(folder, force=False)


def test_force_replaces_no_folder_that_is_not_an_artifact(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(EdgekitError, match="is no edgekit artifact"):
        check_output(precious, force=True)
    (precious / "thesis.tex").unlink()
    check_output(precious, force=True)  # empty: nothing to lose


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_an_export_is_kept(tmp_path: Path, force: bool) -> None:
    output = tmp_path / "out"
    with pytest.raises(EdgekitError, match="exists; give|no edgekit artifact"):  # noqa: SIM117
        with new_artifact(output, force) as staging:
            (staging / "model.pte").write_text("new")
            output.mkdir()
            (output / "thesis.tex").write_text("years")
    assert (output / "thesis.tex").read_text() == "years"
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_killed_export_replaced_is_put_back_and_kept(folder: Path) -> None:
    """Killed between its two renames; the next export, without --force, must not replace it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder.rename(folder.with_name(f".artifact.{ended.pid}.partial.old"))
    check_output(folder, force=False)
    with pytest.raises(EdgekitError, match="exists; give `force`"), new_artifact(folder, False):
        pytest.fail("the work began")
    assert Artifact.open(folder).damaged_files() == []


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_link_in_the_way(folder: Path, force: bool) -> None:
    file, link, dangling = (folder.parent / name for name in ("file", "link", "dangling"))
    file.write_text("x")
    link.symlink_to(folder)
    dangling.symlink_to(folder.parent / "nowhere")
    for path in (file, link, dangling):
        with pytest.raises(EdgekitError, match="exists and is no folder"):
            check_output(path, force)


def test_a_parent_that_is_not_there_or_a_file(folder: Path) -> None:
    check_output(folder / "none" / "out", force=False)
    for parent in (folder / "model.pte", folder / "model.pte" / "below"):
        with pytest.raises(EdgekitError, match="model.pte: is no folder, so out cannot be made"):
            check_output(parent / "out", force=False)


def test_a_parent_that_takes_no_folder() -> None:
    with pytest.raises(EdgekitError, match="is not writable|cannot be written") as raised:
        fill(Path("/proc/self/out"), force=False)
    assert "\n" not in str(raised.value)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours, theirs, other = (
        tmp_path / name
        for name in (
            f".out.{ended.pid}.partial",
            f".out.{os.getppid()}.partial",
            f".outer.{ended.pid}.partial",
        )
    )
    for path in (ours, theirs, other):
        path.mkdir()
        (path / "model.pte").write_text("half")
    fill(tmp_path / "out", force=False)
    # Another's that still runs, and one for another output, are not ours to remove.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [theirs.name, other.name, "out"]
    )


def test_a_name_with_the_signs_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / ".outa.1.partial").mkdir()
    fill(tmp_path / "out[ab]*", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outa.1.partial", "out[ab]*"]


def test_a_manifest_that_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "edgekit.json").symlink_to("/dev/zero")
    with pytest.raises(EdgekitError, match="is no regular file"):
        Artifact.open(tmp_path)
