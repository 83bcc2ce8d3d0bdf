"""Each family's files, in their engines, compute what transformers' model of it does."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest
import torch
from support.small_families import SMALL, random_weights, small_config, small_folder, theirs

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options, check_model, find_layout
from edgekit.exporters.gguf.names import gguf_names
from edgekit.exporters.gguf.row_orders import row_orders
from edgekit.exporters.readback import read_weights
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.gguf.file import GgufFile
from edgekit.models.architecture import Architecture, Layer
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model
from edgekit.models.weights import floats
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Recipe, resolve
from edgekit.runtime.model_files import find_model_file
from edgekit.workflows.api import export_model

CONTEXT = 64
TOKENS = [(37 * i) % 300 + 10 for i in range(48)]
ONNX: dict[str, dict[str, Any]] = {
    "genai": {},
    "transformersjs": {"abi": "transformersjs"},
    "portable": {"portable": True},
}
IN_GGUF = [name for name in SMALL if name != "qwen3-biases"]


def export(
    name: str, place: Path, target: str, recipe: str, options: Mapping[str, Any] | None = None
) -> Artifact:
    """Export, which verifies the engine's logits by those of the eager model with these codes."""
    folder = small_folder(name, place / "model")
    return export_model(
        str(folder), place / "out", target=target, recipe=recipe, context=CONTEXT, **(options or {})
    )


def assert_like_transformers(artifact: Artifact, name: str, tolerance: float) -> None:
    config = small_config(name)
    with torch.no_grad():
        expected = theirs(config, random_weights(config))(torch.tensor([TOKENS])).logits[0].numpy()
    with find_model_file(artifact.folder).load(1, CONTEXT) as engine:
        found = engine.score(TOKENS, 0)
        assert np.abs(found - expected).max() < tolerance
        for size in (1, 16, 40):
            engine.reset()
            assert np.abs(engine.prefill(TOKENS[:size]) - expected[size - 1]).max() < tolerance
            assert np.abs(engine.decode(TOKENS[size]) - expected[size]).max() < tolerance


@pytest.mark.parametrize("abi", ONNX)
@pytest.mark.parametrize("name", SMALL)
def test_onnx(name: str, abi: str, tmp_path: Path) -> None:
    artifact = export(name, tmp_path, "onnx", "float", ONNX[abi])
    assert artifact.manifest.verification["verified"]
    assert_like_transformers(artifact, name, 1e-3)


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf(name: str, tmp_path: Path) -> None:
    """llama.cpp keeps the cache, and multiplies bf16 weights, in less than float32."""
    artifact = export(name, tmp_path, "gguf", "float")
    assert artifact.manifest.verification["verified"]
    assert_like_transformers(artifact, name, 0.1)


@pytest.mark.parametrize(
    "name",
    [
        "llama-bands",
        "qwen3",
        pytest.param("llama-biases", marks=pytest.mark.slow),
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("llama-ungrouped", marks=pytest.mark.slow),
        pytest.param("qwen3-biases", marks=pytest.mark.slow),
    ],
)
def test_executorch(name: str, tmp_path: Path) -> None:
    artifact = export(name, tmp_path, "executorch", "float")
    assert artifact.manifest.verification["verified"]
    assert_like_transformers(artifact, name, 1e-3)
    weights = random_weights(small_config(name))
    path = find_model_file(artifact.folder).path
    found = dict(read_weights("executorch", path, small_config(name)))
    assert found.keys() - {HEAD} == weights.keys() - {HEAD}
    assert all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("recipe", ["int8", "int4", "w8g32", "w4g32a", "cb3"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_what_is_read_back_is_what_was_quantized(
    name: str, target: str, recipe: str, tmp_path: Path
) -> None:
    """Bit for bit, rows where the checkpoint has them."""
    artifact = export(name, tmp_path, target, recipe)
    assert artifact.manifest.verification["verified"]
    config = small_config(name)
    shapes, tied = config.tied_shapes()
    rows = resolve(Recipe.named(recipe), shapes, tied)
    expected = dict(quantize_tensors(rows, random_weights(config).__getitem__))
    found = dict(read_weights(target, find_model_file(artifact.folder).path, config))
    assert found.keys() | {HEAD} == expected.keys()
    for key, values in found.items():
        assert torch.equal(values, floats(expected[key])), key


def test_llama_cpps_own_formats_keep_what_slows_the_rotation(tmp_path: Path) -> None:
    """Its quantizer copies the divisors; what it stores is held against the plan and verified."""
    artifact = export("llama-bands", tmp_path, "gguf", "Q8_0")
    assert artifact.manifest.verification["verified"]
    tensors = GgufFile.open(artifact.folder / "model.gguf").tensors
    assert tensors["rope_freqs.weight"].type == "F32"
    assert tensors["blk.0.attn_q.weight"].type == "Q8_0"


def test_a_ggufs_rows_of_queries_and_keys_are_in_llama_cpps_order(tmp_path: Path) -> None:
    """As `LlamaModel.permute` of its converter has them; all else stands where it stood."""
    name = "llama-biases"
    path = find_model_file(export(name, tmp_path, "gguf", "float").folder).path
    config = small_config(name)
    exact, names = random_weights(config), gguf_names(config)
    stored = {tensor.name: tensor for tensor in peer.GGUFReader(path).tensors}
    moved = row_orders(config)
    assert len(moved) == 4 * config.num_layers
    for key, values in exact.items():
        tensor = stored[names[key]]
        found = peer.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        expected = values.numpy()
        if key in moved:
            heads = config.num_heads if ".q_proj." in key else config.num_kv_heads
            halves = expected.reshape(heads, 2, -1, *expected.shape[1:])
            expected = halves.swapaxes(1, 2).reshape(expected.shape)
            assert not np.array_equal(expected, values.numpy())
        assert np.array_equal(found, expected), key


def test_a_ggufs_keys(tmp_path: Path) -> None:
    metadata = GgufFile.open(
        find_model_file(export("llama-bands", tmp_path, "gguf", "float").folder).path
    )
    keys = metadata.metadata
    assert keys["general.architecture"] == "llama"
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.dimension_count"] == keys["llama.attention.key_length"] == 16
    assert keys["llama.rope.freq_base"] == 500_000.0
    assert not any("conv" in key for key in keys)
    assert metadata.tensors["rope_freqs.weight"].shape == (8,)
    assert "token_embd_norm.weight" not in metadata.tensors


def test_what_llama_cpp_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        EdgekitError,
        match="layers.0.self_attn.o_proj.bias: target gguf cannot hold it: llama.cpp's qwen3 has",
    ):
        export("qwen3-biases", tmp_path, "gguf", "float")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["executorch", "gguf", "onnx"])
def test_a_block_that_a_target_has_not_is_refused_by_name(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Recurrence:
        name: str = "model.layers.1.recurrence"

    config = small_config("qwen3")
    made = config.architecture
    first, second, *rest = made.layers
    norms = second.mixer_norm, second.mlp_norm
    other = Layer(second.name, norms[0], Recurrence(), norms[1], second.mlp)  # type: ignore[arg-type]
    changed = Architecture(made.embedding, (first, other, *rest), made.norm, made.head, made.tied)
    monkeypatch.setitem(config.__dict__, "architecture", changed)
    with pytest.raises(
        EdgekitError,
        match=f"layers.1.recurrence: target {target} cannot hold a block of the kind Recurrence",
    ):
        check_model(find_layout(target, Options()), config, Options())


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is missing"
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_onnxruntime_genai_runs_the_folder(name: str, tmp_path: Path) -> None:
    """By the names of genai_config.json, which has no convolutions here."""
    import onnxruntime_genai as genai

    artifact = export(name, tmp_path, "onnx", "float")
    config = small_config(name)
    with torch.no_grad():
        expected = theirs(config, random_weights(config))(torch.tensor([TOKENS])).logits[0]
    model = genai.Model(str(artifact.folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([TOKENS[:40]], np.int32))
    found = generator.get_output("logits")[0, -1]
    assert np.abs(found - expected[39].numpy()).max() < 1e-3


@pytest.mark.parametrize("name", ["llama-3.2-1b", "smollm2-135m", "qwen3-0.6b"])
@pytest.mark.parametrize("target", ["executorch", "gguf", "onnx"])
def test_models_of_the_catalogue_have_a_place_in_every_target(name: str, target: str) -> None:
    config: ModelConfig = resolve_model(name, random_weights=True).config
    check_model(find_layout(target, Options()), config, Options())
    assert config.tied_shapes()[1] == {HEAD: EMBEDDING}
    names = gguf_names(config)
    known = set(peer.MODEL_TENSORS[getattr(peer.MODEL_ARCH, config.family.upper())])
    patterns = {peer.TENSOR_NAMES[kind] for kind in known}
    for stored in names.values():
        stem = stored.removesuffix(".weight")
        number = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{number}.", "blk.{bid}.") in patterns
