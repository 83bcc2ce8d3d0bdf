"""The manifest: what is read is written again, older ones open, newer ones say what to get."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import FORMAT_VERSION, from_json
from edgekit.formats.artifact.parts import NetworkOutput
from edgekit.formats.artifact.read import Artifact
from edgekit.version import DISTRIBUTION, __version__

FILES = {"model.onnx": {"bytes": 1, "sha256": "0"}}
DECODER: dict[str, Any] = {
    "format_version": 1,
    "model": {
        "id": "some/model",
        "revision": None,
        "random_weights": False,
        "sha256": "00",
        "parameters": 6,
        "adapter": {"name": "lora", "sha256": "11", "base": None},
    },
    "target": "onnx",
    "file": "model.onnx",
    "recipe": "cb3",
    "method": "gptq",
    "codes_sha256": "22",
    "facts": {"texts": 3},
    "llama_format": None,
    "tensors": [
        {"tensor": "w", "scheme": "w8", "shape": [2, 3], "bytes": 14, "range": "minmax"},
        {"tensor": "n", "scheme": "float", "shape": [2], "bytes": 8, "range": None},
        {
            "tensor": "h",
            "scheme": "cb3",
            "shape": [2, 3],
            "bytes": 14,
            "range": None,
            "same_as": "w",
            "stored_as": "w8",
        },
    ],
    "versions": {"edgekit": "0"},
    "requires": {"opset": "21"},
    "context": 16,
    "bos_id": 1,
    "eos_ids": [7, 9],
    "verification": {"verified": True, "lengths": [1, 2]},
    "files": FILES,
}
NETWORK: dict[str, Any] = {
    "format_version": 1,
    "kind": "module",
    "model": {"id": "Net"},
    "target": "onnx",
    "file": "model.onnx",
    "recipe": "w4a8",
    "versions": {"edgekit": "0"},
    "verification": {"verified": True},
    "tensors": [
        {"tensor": "w", "scheme": "w4a8", "shape": [2, 3], "bytes": 14, "stored_as": "w8a8"}
    ],
    "inputs": [{"name": "x", "dtype": "uint8", "shape": [1, 3]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": [None, 2]}],
    "constant_outputs": {"label": "cats"},
    "max_batch": 8,
    "activations": [{"tensor": "x", "scale": 0.5, "zero_point": 3}],
    "files": FILES,
}


@pytest.mark.parametrize("document", [DECODER, NETWORK], ids=["decoder", "network"])
def test_what_is_read_is_written_again_in_the_same_order(document: dict[str, Any]) -> None:
    assert json.dumps(from_json(document).to_json()) == json.dumps(document)


def test_what_was_exported_is_written_again(tiny_artifact: Path) -> None:
    content = (tiny_artifact / "edgekit.json").read_text()
    written = Artifact.open(tiny_artifact).manifest.to_json()
    assert json.dumps(written, indent=1) + "\n" == content


@pytest.mark.parametrize("document", [DECODER, NETWORK], ids=["decoder", "network"])
def test_a_newer_version_says_which_edgekit_to_get(document: dict[str, Any]) -> None:
    newer = {"format_version": FORMAT_VERSION + 1, "versions": {"edgekit": "9.1"}, "tensors": "new"}
    with pytest.raises(EdgekitError, match=r"get edgekit 9\.1, `pip install --upgrade") as raised:
        from_json(document | newer)
    assert f"is newer than 1, the last that edgekit {__version__} reads" in str(raised.value)
    assert DISTRIBUTION in str(raised.value)
    unknown: list[object] = [None, [], {}, {"edgekit": 3}]
    for versions in unknown:
        with pytest.raises(EdgekitError, match="get a newer edgekit, `pip install --upgrade"):
            from_json(document | newer | {"versions": versions})


@pytest.mark.parametrize("key", [key for key in NETWORK if key not in ("kind", "max_batch")])
@pytest.mark.parametrize("value", [True, "x", -1, [[]], {"a": 1}, 1.5, [{}]])
def test_any_key_of_a_network_of_any_type(key: str, value: object) -> None:
    try:
        from_json(NETWORK | {key: value})
    except EdgekitError as error:
        assert "\n" not in str(error)
        assert key in str(error)


def folder_of(place: Path, document: dict[str, Any]) -> Path:
    (place / "model.onnx").write_bytes(b"m")
    (place / "edgekit.json").write_text(json.dumps(document))
    return place


def old_network(place: Path, **changes: object) -> Path:
    """Write the artifact of a module as it was before outputs had names."""
    new = ("outputs", "constant_outputs")
    old = {key: value for key, value in NETWORK.items() if key not in new}
    return folder_of(place, old | changes)


def put_reference(place: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (place / "reference.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


REFERENCE = {
    "exact.0": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
    "exact.1": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]},
    "inputs.0": {"dtype": "U8", "shape": [1, 3], "data_offsets": [16, 19]},
}


def test_an_old_network_opens_and_its_outputs_get_names(tmp_path: Path) -> None:
    put_reference(old_network(tmp_path), REFERENCE)
    assert Artifact.open(tmp_path).network.constant_outputs == {}
    assert Artifact.open(tmp_path).network.outputs == (
        NetworkOutput("output_0", "float32", (None, 2)),
        NetworkOutput("output_1", "int64", (None,)),
    )
    old_network(tmp_path, max_batch=None)
    assert Artifact.open(tmp_path).network.outputs[0] == NetworkOutput(
        "output_0", "float32", (1, 2)
    )


def test_an_old_network_without_a_reference_opens(tmp_path: Path) -> None:
    assert Artifact.open(old_network(tmp_path)).network.outputs == ()


@pytest.mark.parametrize(
    "header", [[], {"exact.0": 1}, {"exact.0": {"dtype": "F8", "shape": [1]}}, {"exact.0": {}}]
)
def test_a_damaged_reference_of_an_old_network(tmp_path: Path, header: object) -> None:
    put_reference(old_network(tmp_path), header)
    with pytest.raises(EdgekitError, match="reference.safetensors: holds no inputs and outputs"):
        Artifact.open(tmp_path)
    for content in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{"):
        (tmp_path / "reference.safetensors").write_bytes(content)
        with pytest.raises(EdgekitError, match="holds no inputs and outputs"):
            Artifact.open(tmp_path)


def test_each_kind_says_what_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="is a language model, not a module"):
        _ = Artifact.open(folder_of(tmp_path, DECODER)).network
    with pytest.raises(EdgekitError, match="is a module, not a language model"):
        _ = Artifact.open(folder_of(tmp_path, NETWORK)).decoder
