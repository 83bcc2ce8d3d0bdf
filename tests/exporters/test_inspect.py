"""`edgekit inspect` on the bundled model's artifact, on a bare file and on damaged ones."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.command_line import assert_only_one_line

from edgekit.cli import main
from edgekit.errors import EdgekitError
from edgekit.exporters.inspect.report import inspect
from edgekit.exporters.inspect.tables import TABLES
from edgekit.formats.pte.program import Program


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def run_json(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy"))


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "edgekit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_byte_belongs_to_one_component(tiny_artifact: Path) -> None:
    facts = run_json(tiny_artifact)
    sizes = {part["name"]: part["bytes"] for part in facts["components"]}
    assert sum(sizes.values()) == facts["file_bytes"]
    assert facts["file_bytes"] == (tiny_artifact / "model.pte").stat().st_size
    assert sizes["padding"] < 0.02 * facts["file_bytes"]
    assert all(size > 0 for size in sizes.values())


def test_components_hold_what_the_manifest_says(tiny_artifact: Path) -> None:
    facts = run_json(tiny_artifact)
    sizes = {part["name"]: part["bytes"] for part in facts["components"]}
    rows = {row["tensor"]: row["bytes"] for row in facts["manifest"]["tensors"]}
    del rows["lm_head.weight"]
    embedding = rows.pop("model.embed_tokens.weight")
    matrices = [row["tensor"] for row in facts["manifest"]["tensors"] if len(row["shape"]) == 2]
    linears = sum(size for name, size in rows.items() if name in matrices)
    assert sizes["embedding, int8, and head, int8 per channel"] == embedding
    # Scales that are equal are stored once, so a few bytes may be missing.
    assert 0.999 * linears < sizes["linears, int8 per channel"] <= linears
    assert sizes[TABLES] > 0


def test_weights_are_summed_over_the_layers(tiny_artifact: Path) -> None:
    facts = run_json(tiny_artifact)
    kinds = {row["kind"]: row for row in facts["weights"]}
    table = facts["manifest"]["tensors"]
    assert sum(row["bytes"] for row in facts["weights"]) == sum(row["bytes"] for row in table)
    assert kinds["feed_forward.w1"]["tensors"] == 8
    assert kinds["self_attn.q_proj"]["scheme"] == "w8"
    assert kinds["operator_norm"]["scheme"] == "float"


def test_delegates_operators_metadata_and_verification(tiny_artifact: Path) -> None:
    facts = run_json(tiny_artifact)
    assert set(facts["delegates"]) == {"XnnpackBackend"}
    # 5 convolution layers of 4 (the first as three), 3 attention layers of 4, 8 x 3, the head.
    assert facts["nodes"]["FullyConnected"] >= 5 * 4 + 3 * 4 + 8 * 3 + 1
    assert facts["operators"]["llama::custom_sdpa.out"] == 3
    assert facts["operators"]["quantized_decomposed::embedding_byte.out"] == 1
    assert not any("linear" in name or "mean" in name for name in facts["operators"])
    assert facts["metadata"]["get_max_seq_len"] == facts["manifest"]["context"]
    assert facts["metadata"]["get_eos_ids"] == [7]
    assert facts["manifest"]["verification"]["verified"] is True
    assert facts["planned_bytes"] > 0


def test_tables_say_the_same_as_json(tiny_artifact: Path) -> None:
    facts, done = run_json(tiny_artifact), run(tiny_artifact)
    assert done.exit_code == 0
    for part in facts["components"]:
        assert f"{part['bytes']:,}" in done.stdout
    for words in (
        "lfm2-tiny, recipe int8, context",
        "w8",
        "custom_sdpa",
        "kld_engine_vs_quantized",
    ):
        assert words in done.stdout


def test_a_bare_file_needs_no_manifest(tiny_artifact: Path, tmp_path: Path) -> None:
    bare = tmp_path / "some.pte"
    shutil.copyfile(tiny_artifact / "model.pte", bare)
    alone, whole = run_json(bare), run_json(tiny_artifact)
    assert alone["manifest"] is None
    assert alone["weights"] == []
    for key in ("components", "delegates", "nodes", "operators", "metadata", "planned_bytes"):
        assert alone[key] == whole[key]
    assert run(bare).exit_code == 0


def test_check_accepts_what_was_exported(tiny_artifact: Path) -> None:
    done = run(tiny_artifact, "--check")
    assert done.exit_code == 0
    facts = run_json(tiny_artifact, "--check")
    verdict = f"All {facts['checked_files']} files have the content that was exported."
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == (verdict, verdict)
    assert (facts["ok"], facts["reason"]) == (True, verdict)
    assert facts["checked_files"] >= 4


def test_without_check_there_is_no_verdict(tiny_artifact: Path) -> None:
    facts = run_json(tiny_artifact)
    assert facts["checked_files"] is None
    assert not {"ok", "reason"} & set(facts)
    assert "that was exported" not in run(tiny_artifact).stdout


def test_check_names_every_damaged_file(copy: Path) -> None:
    for name in ("model.pte", "tokenizer.json"):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    assert_only_one_line(
        run(copy, "--check"), "model.pte", "tokenizer.json", "export again", status=1
    )


def test_check_of_a_file_of_another_length_fails(copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])
    assert_only_one_line(run(copy, "--check"), "tokenizer.json: has ", "export again", status=1)
    assert_only_one_line(run(copy), "tokenizer.json: has ", status=2)
    path.unlink()
    assert_only_one_line(run(copy, "--check"), "tokenizer.json: is missing", status=1)


def test_a_model_is_told_from_an_artifact(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text("{}")
    for model in ("lfm2-tiny", tmp_path):
        assert_only_one_line(
            run(model), f"{model}: is a model, not an artifact: give --sensitivity"
        )


def test_check_of_a_bare_file_is_refused(tiny_artifact: Path) -> None:
    assert_only_one_line(run(tiny_artifact / "model.pte", "--check"), "--check needs the artifact")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert_only_one_line(run(tmp_path / "none"), "none: does not exist")


@pytest.mark.parametrize("keep", [0, 7, 40, 3000, 60_000])
def test_a_cut_file(copy: Path, tmp_path: Path, keep: int) -> None:
    bare = tmp_path / "cut.pte"
    bare.write_bytes((copy / "model.pte").read_bytes()[:keep])
    assert_only_one_line(run(bare), "cut.pte")
    shutil.copyfile(bare, copy / "model.pte")
    assert_only_one_line(run(copy), "model.pte", "truncated")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_a_corrupt_manifest(copy: Path, content: bytes) -> None:
    (copy / "edgekit.json").write_bytes(content)
    assert_only_one_line(run(copy), "edgekit.json")


def test_a_manifest_of_another_target(copy: Path) -> None:
    edit_manifest(copy, target="other")
    assert_only_one_line(run(copy), "unknown target 'other': allowed are executorch")


@pytest.mark.parametrize("value", [None, 3, "yes", [1], {"a": {"b": []}}, {"a": None}])
def test_a_manifest_whose_verification_is_anything(copy: Path, value: object) -> None:
    edit_manifest(copy, verification=value)
    for options in ((), ("--json",)):
        done = run(copy, *options)
        if value is None or isinstance(value, dict):
            assert done.exit_code == 0
        else:
            assert_only_one_line(done, "edgekit.json: verification must be an object")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metadata_that_json_cannot_say(
    tiny_artifact: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "constant_methods", {"get_scale": value})
    for options in ((), ("--json",)):
        assert_only_one_line(run(tiny_artifact, *options), "'get_scale' gives", "no finite number")


def test_a_name_in_a_file_cannot_steer_the_terminal(copy: Path) -> None:
    path = copy / "edgekit.json"
    manifest = json.loads(path.read_text())
    edit_manifest(copy, model=manifest["model"] | {"id": "\x1b[2Jevil"}, versions={"\x07a": "\r"})
    shown = run(copy).stdout
    assert "evil" in shown
    assert not {"\x1b", "\x07", "\r"} & set(shown)


def test_a_file_without_forward_is_refused(copy: Path, tmp_path: Path) -> None:
    content = (copy / "model.pte").read_bytes().replace(b"\0forward\0", b"\0farword\0")
    (tmp_path / "other.pte").write_bytes(content)
    with pytest.raises(EdgekitError, match="has no method 'forward', only 'farword'"):
        inspect(tmp_path / "other.pte")


def test_a_file_of_codes_is_answered_with_what_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    path.write_bytes(b"")
    assert_only_one_line(run(path), f"--codes {path} --dry-run")
