"""`edgekit inspect` on GGUF files: ours and others'."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest
from click.testing import CliRunner, Result
from support import gguf_bytes as make
from support.gguf_models import write_gguf_of

from edgekit.cli import main
from edgekit.models.source import resolve_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def facts_of(path: Path) -> dict[str, Any]:
    done = run(path, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    return write_gguf_of(resolve_model("lfm2-tiny"), "int4", folder)[0]


def test_every_byte_belongs_to_one_component(model: Path) -> None:
    facts = facts_of(model)
    sizes = {part["name"]: part["bytes"] for part in facts["components"]}
    assert sum(sizes.values()) == facts["file_bytes"] == model.stat().st_size
    assert sizes["embedding and head, Q8_0"] == 4096 * 256 * 34 // 32
    assert 0 <= sizes["padding"] < 32 * 80
    assert set(sizes) == {
        "embedding and head, Q8_0",
        "linears, Q4_0",
        "norms, convolutions, F32",
        "metadata and tokenizer",
        "padding",
    }


def test_types_and_bits_are_those_that_gguf_py_counts(model: Path) -> None:
    facts = facts_of(model)
    tensors = peer.GGUFReader(model).tensors
    assert facts["types"] == {
        kind: sum(tensor.tensor_type.name == kind for tensor in tensors)
        for kind in ("Q4_0", "F32", "Q8_0")
    }
    count = sum(int(tensor.n_elements) for tensor in tensors)
    assert facts["parameters"] == count
    total = sum(int(tensor.n_bytes) for tensor in tensors)
    assert facts["bits_per_weight"] == pytest.approx(8 * total / count)


def test_metadata_is_brief(model: Path) -> None:
    facts = facts_of(model)
    assert facts["metadata"]["lfm2.attention.head_count_kv"] == [0, 0, 2, 0, 2, 0, 2, 0]
    assert facts["metadata"]["tokenizer.ggml.tokens"] == "4,096 texts"
    shown = run(model).stdout
    assert "lfm2.rope.freq_base" in shown
    assert "0, 0, 2, 0" in shown
    assert len(shown) < 8000
    assert f"{facts['bits_per_weight']:.2f} bits each" in shown


def test_a_file_of_another_maker(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = peer.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("output.weight", np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = facts_of(path)
    names = {part["name"] for part in facts["components"]}
    assert {"embedding, F32", "head, F16"} <= names
    assert facts["manifest"] is None


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(make.gguf([], []))
    assert facts_of(path)["bits_per_weight"] == 0
    assert run(path).exit_code == 0


def refused(done: Result, *words: str) -> None:
    assert done.exit_code == 2
    assert done.stderr.startswith("edgekit: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("keep", [0, 3, 24, 5000, 300_000])
def test_a_cut_file(model: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:keep])
    refused(run(path), "cut.gguf")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metadata_that_json_cannot_say(tmp_path: Path, value: float) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(make.gguf([make.key("a.ratio", make.FLOAT32, struct.pack("<f", value))], []))
    refused(run(path), "'a.ratio' is", "no finite number")


def test_a_name_in_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    keys = [make.key("\x1b[2Jkey", make.STRING, make.text("\x1b]0;title\x07\r"))]
    path.write_bytes(make.gguf(keys, [make.info("\x1b[1m", (3,))], bytes(12)))
    shown = run(path).stdout
    assert "key" in shown
    assert not {"\x1b", "\x07", "\r"} & set(shown)


def test_a_file_of_no_known_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGUF")
    refused(run(path), "model.bin", ".gguf")
