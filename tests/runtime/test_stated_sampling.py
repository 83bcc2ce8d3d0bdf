"""Tokens are drawn as the model's makers say: in generation_config.json, in a GGUF."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.command_line import assert_only_one_line, done, run
from support.small_families import small_folder

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import GgufFile
from edgekit.runtime.generation.sampling import SamplingParams
from edgekit.runtime.model_files import find_model_file

STATED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
MEANT = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0, repeat_penalty=1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a model that states its settings."""
    place = tmp_path_factory.mktemp("stated")
    folder = small_folder("qwen3", place / "model")
    (folder / "generation_config.json").write_text(json.dumps(STATED))
    words = ("--target", "gguf", "--scheme", "float", "--context", 64)
    done("export", folder, *words, "-o", place / "out")
    return place / "out"


def test_what_an_artifact_states(artifact: Path) -> None:
    file = find_model_file(artifact)
    assert file.sampling() == MEANT
    assert file.sampling(temperature=0.0, top_k=None, seed=3) == SamplingParams(
        temperature=0, top_k=20, top_p=0.95, min_p=0, repeat_penalty=1, seed=3
    )


def test_a_gguf_alone_states_the_same(artifact: Path, tmp_path: Path) -> None:
    """In the keys, and of the types, that llama.cpp's converter writes for this folder."""
    alone = Path(shutil.copyfile(artifact / "model.gguf", tmp_path / "alone.gguf"))
    # float32 holds other numbers than the JSON
    found = find_model_file(alone).sampling()
    assert found.temperature == pytest.approx(0.6)
    assert (found.top_k, found.min_p, found.repeat_penalty) == (20, 0, 1)
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen3")
    about = gguf.Metadata.load(None, artifact)
    about.set_gguf_meta_model(theirs)
    expected = {
        key: (it.value, it.type)
        for key, it in theirs.kv_data[0].items()
        if key.startswith("general.sampling.")
    }
    reader = gguf.GGUFReader(alone)
    held = {
        key: (field.contents(), field.types[0])
        for key, field in reader.fields.items()
        if key.startswith("general.sampling.")
    }
    assert held.keys() == expected.keys() and len(held) == 3
    for key, (value, kind) in expected.items():
        assert held[key] == (pytest.approx(value), kind)


def test_a_model_that_states_nothing(tiny_artifact: Path) -> None:
    assert find_model_file(tiny_artifact).sampling() == SamplingParams()


def test_nothing_is_written_where_nothing_is_stated(tmp_path: Path) -> None:
    done("export", "lfm2-tiny", "--target", "gguf", "--scheme", "float", "-o", tmp_path / "out")
    keys = GgufFile.open(tmp_path / "out" / "model.gguf").metadata
    assert not [key for key in keys if "sampling" in key]


def beside_a_program(stated: dict[str, Any], artifact: Path, place: Path) -> Path:
    """A bare `.pte` with a tokenizer and the settings beside it."""
    for name in ("model.pte", "tokenizer.json"):
        shutil.copyfile(artifact / name, place / name)
    (place / "generation_config.json").write_text(json.dumps(stated))
    return place / "model.pte"


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"top_p": 0.9}, 1.0),
        ({"temperature": None}, 0.3),
        ({}, 0.3),
    ],
)
def test_the_temperature(
    stated: dict[str, Any], meant: float, tiny_artifact: Path, tmp_path: Path
) -> None:
    program = beside_a_program(stated, tiny_artifact, tmp_path)
    assert find_model_file(program).sampling().temperature == meant


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"top_k": 0.5}, "top_k must be a whole number, not 0.5"),
        ({"top_p": 7}, "of what it says of sampling, top-p must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    stated: dict[str, Any], words: str, tiny_artifact: Path, tmp_path: Path
) -> None:
    program = beside_a_program(stated, tiny_artifact, tmp_path)
    with pytest.raises(EdgekitError, match=words):
        find_model_file(program).sampling()
    assert_only_one_line(run("run", program, "Hello"), words)
