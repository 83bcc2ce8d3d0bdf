"""The catalogue, how a name becomes a model, and `edgekit models`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from edgekit.commands.models import command
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.read import MANIFEST
from edgekit.models import catalogue as module
from edgekit.models.catalogue import catalogue, find_model
from edgekit.models.checkpoint import Checkpoint
from edgekit.models.config import ModelConfig
from edgekit.models.random_weights import RandomCheckpoint
from edgekit.models.source import ARTIFACT_MANIFEST, resolve_model
from edgekit.models.tokenizer import Tokenizer

TINY = Path(module.__file__).parent / "lfm2_tiny"
PUBLISHED = {  # from the model cards at https://huggingface.co/LiquidAI
    "lfm2-350m": 354_483_968,
    "lfm2-350m-extract": 354_483_968,
    "lfm2-350m-math": 354_483_968,
    "lfm2-350m-enjp-mt": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-1.2b-extract": 1_170_340_608,
    "lfm2-1.2b-rag": 1_170_340_608,
    "lfm2-1.2b-tool": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "lfm2.5-230m": 229_693_184,
    "lfm2.5-350m": 354_483_968,
    "lfm2.5-1.2b-instruct": 1_170_340_608,
    "lfm2.5-1.2b-base": 1_170_340_608,
    "lfm2.5-2.6b": 2_697_198_592,
}
COUNTED = {  # the tensors of the public checkpoints, a tied head once
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.2-3b-instruct": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-1.7b-instruct": 1_711_376_384,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
}
RAW: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "layer_types": ["conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 7,
}


def make_folder(folder: Path, **changes: object) -> Path:
    """Write a whole tiny model; `changes` go into its config.json alone."""
    folder.mkdir(parents=True)
    source = RandomCheckpoint(ModelConfig.from_dict(RAW))
    tensors = {name: source.tensor(name) for name in source.shapes()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(RAW | changes))
    return folder


def test_every_model_has_its_published_size() -> None:
    assert set(catalogue()) == {"lfm2-tiny", *PUBLISHED, *COUNTED}
    for name, count in COUNTED.items():
        model = catalogue()[name]
        assert model.config.parameter_count == count
        assert model.hub_id is not None
        assert model.hub_id.lower().partition("/")[2] == name
    for name, count in PUBLISHED.items():
        model = catalogue()[name]
        assert model.config.parameter_count == count
        assert model.hub_id is not None
        assert model.hub_id.lower() == f"liquidai/{name}"
        assert model.licence == "LFM Open License v1.0"


def test_names_are_found_in_any_case_and_by_alias() -> None:
    assert find_model("LFM2-1.2B") is catalogue()["lfm2-1.2b"]
    assert find_model("lfm2.5-1.2b") is catalogue()["lfm2.5-1.2b-instruct"]
    assert find_model("lfm2-1.2") is None


@pytest.mark.parametrize(
    "name", ["lfm2-350m", "lfm2.5-1.2b", "lfm2.5-230m", "llama-3.2-1b", "qwen3-4b"]
)
def test_random_weights_need_no_files(name: str) -> None:
    source = resolve_model(name, random_weights=True)
    model = find_model(name)
    assert model is not None
    assert (source.id, source.revision, source.folder) == (model.hub_id, None, None)
    assert source.checkpoint.shapes() == model.config.tensor_shapes()


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="lfm2-tiny is not there")
def test_the_bundled_model_is_found_by_name() -> None:
    source = resolve_model("lfm2-tiny")
    assert (source.id, source.revision, source.folder) == ("lfm2-tiny", None, TINY)
    assert source.checkpoint.tensor("model.embedding_norm.weight").dtype == torch.bfloat16


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    source = resolve_model(str(folder))
    assert (source.id, source.revision, source.folder) == ("mine", None, folder)
    assert isinstance(source.checkpoint, Checkpoint)
    again = resolve_model(str(folder), random_weights=True)
    assert isinstance(again.checkpoint, RandomCheckpoint)
    assert again.folder == folder


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="lfm2-tiny is not there")
def test_a_model_and_its_tokenizer_agree_on_what_ends_a_text(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", vocab_size=4096, bos_token_id=2)
    shutil.copyfile(TINY / "tokenizer.json", folder / "tokenizer.json")
    generation = {"bos_token_id": 1, "eos_token_id": [7, 2]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config, tokenizer = resolve_model(str(folder)).config, Tokenizer.load(folder)
    assert config.eos_ids == tokenizer.eos_ids == (7, 2)
    assert config.bos_id == tokenizer.bos_id == 1


def test_a_catalogue_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "lfm2-350m")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("lfm2-350m", random_weights=True).id == "LiquidAI/LFM2-350M"
    assert resolve_model("./lfm2-350m").config.hidden_size == 16


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").folder == Path("org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lfm2-1.2", "unknown model 'lfm2-1.2': .* did you mean lfm2-1.2b"),
        ("lfm2.5-350", "did you mean lfm2.5-350m"),
        ("gpt", "`edgekit models` lists the known ones"),
        ("a/b/c", "not a catalogue name, a model folder or a hub id"),
        ("", "unknown model ''"),
        ("x\ny", r"unknown model 'x\\ny'"),
        ("x" * 5000, "unknown model"),
    ],
)
def test_unknown_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(EdgekitError, match=message) as caught:
        resolve_model(name, offline=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match=f"{tmp_path}: holds no config.json"):
        resolve_model(str(tmp_path))
    file = tmp_path / "notes.txt"
    file.write_text("no model")
    with pytest.raises(EdgekitError, match="is a file; give the folder"):
        resolve_model(str(file))
    other = resolve_model(str(make_folder(tmp_path / "other", vocab_size=33)))
    with pytest.raises(EdgekitError, match="1 of the wrong shape: model.embed_tokens.weight"):
        _ = other.checkpoint


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    with pytest.raises(EdgekitError, match="is a local folder; `revision` is for models on the"):
        resolve_model(str(folder), revision="main")


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="lfm2-tiny is not there")
def test_the_command_lists_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    table = CliRunner().invoke(command)
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["name", "parameters", "licence", "hub", "id", "local"]
    assert len(lines) == len(catalogue()) + 1
    assert any("lfm2.5-1.2b-instruct, lfm2.5-1.2b " in line for line in lines)
    assert all(line.endswith("no") for line in lines[2:] if "lfm2-tiny" not in line)

    rows = json.loads(CliRunner().invoke(command, ["--json"]).stdout)
    assert [row["name"] for row in rows] == list(catalogue())
    assert {row["name"]: row["parameters"] for row in rows}.items() >= PUBLISHED.items()
    tiny = rows[0]
    assert tiny["hub_id"] is None
    assert tiny["local_bytes"] > 100_000


def test_an_artifact_is_no_model(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "artifact")
    (tmp_path / "artifact" / MANIFEST).touch()
    assert ARTIFACT_MANIFEST == MANIFEST
    with pytest.raises(EdgekitError, match="is an exported artifact; give the model"):
        resolve_model(str(tmp_path / "artifact"))


def test_a_folder_is_found_by_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell completes it, and with the `~` that it leaves alone in quotes."""
    folder = make_folder(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("mine/", "./mine", " mine\n", "~/mine", "~/mine/", f"{folder}//"):
        source = resolve_model(name)
        assert (source.id, source.folder and source.folder.resolve()) == ("mine", folder)
    for name in ("~/other", "~nobody-of-that-name/mine", "mine\0"):
        with pytest.raises(EdgekitError, match="unknown model"):
            resolve_model(name)


def test_a_revision_behind_a_name_is_one_of_the_hub() -> None:
    for name in ("lfm2-tiny@main", "LFM2-TINY@v1/"):
        with pytest.raises(EdgekitError, match="lfm2-tiny: is a local folder; `revision` is for"):
            resolve_model(name)
    assert resolve_model("LFM2-1.2B/", random_weights=True).id == "LiquidAI/LFM2-1.2B"
    for name in ("lfm2-350m@v1", "https://huggingface.co/LiquidAI/LFM2-350M/tree/v1"):
        with pytest.raises(EdgekitError, match="names revision 'v1', `revision` 'v2': give one"):
            resolve_model(name, "v2")
