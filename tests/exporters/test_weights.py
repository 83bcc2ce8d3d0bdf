"""Weights read back from files by their checkpoint names, and their comparison."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from support.gguf_models import small_model_file
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.executorch import readback as pte_weights
from edgekit.exporters.executorch.decoder import export_pte
from edgekit.exporters.readback import compare_weights, read_weights
from edgekit.formats.artifact.read import Artifact
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model
from edgekit.models.weights import floats
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Recipe, Rule, resolve
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.workflows.api import export_model


def test_a_file_gives_back_what_torch_saw(tiny_artifact: Path) -> None:
    checkpoint = resolve_model("lfm2-tiny").checkpoint
    artifact = Artifact.open(tiny_artifact)
    config = ModelConfig.load(tiny_artifact)
    schemes = {row.tensor: row.scheme for row in artifact.manifest.tensors}
    names = []
    for name, tensor in read_weights(artifact.target, artifact.model_path, config):
        exact = checkpoint.tensor(name).float()
        if schemes[name] != "float":
            exact = quantize_weight(parse_scheme(schemes[name]), exact).dequantize()
        assert torch.equal(tensor, exact), name
        names.append(name)
    assert names == list(config.tensor_shapes())


def test_another_model_than_its_configuration_says_is_refused(tiny_artifact: Path) -> None:
    facts = json.loads((tiny_artifact / "config.json").read_text())
    kinds = facts["layer_types"]
    swapped = ModelConfig.from_dict(
        facts | {"layer_types": [kinds[2], *kinds[1:2], kinds[0], *kinds[3:]]}
    )
    with pytest.raises(EdgekitError, match="its weights cannot be told apart"):
        list(pte_weights.weights(tiny_artifact / "model.pte", swapped))


def test_a_target_without_a_reader_is_named(tiny_artifact: Path) -> None:
    config = ModelConfig.load(tiny_artifact)
    with pytest.raises(EdgekitError, match="m.pte: unknown target 'coreml'"):
        read_weights("coreml", Path("m.pte"), config)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = small_model_file(tmp_path)
    config = ModelConfig.load(tmp_path / "small")
    norm = next(t for t in GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_norm.weight")
    norm.data[-1] = math.nan
    norm.data.base.flush()
    with pytest.raises(EdgekitError, match="model.gguf: tensor '.*1.ffn_norm.weight' holds inf"):
        list(read_weights("gguf", path, config))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_comparison_tells_equal_from_different_and_absent() -> None:
    a, b = drawn(0, 70, 3000), drawn(1, 5)
    changed = a.clone()
    changed[69, 2999] += 0.5
    files = [
        iter([("a", a), ("b", b)]),
        iter([("a", a.clone()), ("b", b.clone())]),
        iter([("a", changed), ("c", b)]),
        iter([("a", a[:, :1500])]),
    ]
    found = {row.tensor: row for row in compare_weights(files)}
    assert found["a"].differences[:2] == (0.0, 0.0)
    assert found["a"].differences[2] == pytest.approx(0.5, rel=1e-5)
    assert found["a"].differences[3] is None
    assert found["a"].same_as == (0, 0, 2, 3)
    assert found["b"].same_as == (0, 0, None, None)
    assert found["b"].differences == (0.0, 0.0, None, None)
    assert found["c"].differences == (None, None, 0.0, None)
    assert found["a"].sqnr == (None,) * 4


def test_noise_is_measured_against_the_reference() -> None:
    exact = drawn(0, 64, 4096)
    codes = quantize_weight(parse_scheme("w4g32"), exact).dequantize()
    files = [iter([("a", exact)]), iter([("a", codes)])]
    (row,) = compare_weights(files, lambda name: exact.bfloat16() if name == "none" else exact)
    expected = 10 * math.log10(float(exact.square().sum() / (exact - codes).square().sum()))
    assert row.sqnr[0] is None  # there is no noise
    assert row.sqnr[1] == pytest.approx(expected, abs=1e-3)


def test_files_in_another_order_are_compared_by_name() -> None:
    tensors = [(f"t{index}", drawn(index, 4, 4)) for index in range(5)]
    rows = list(compare_weights([iter(tensors), iter(tensors[::-1])]))
    assert sorted(row.tensor for row in rows) == [name for name, _ in tensors]
    assert {row.differences for row in rows} == {(0.0, 0.0)}


def test_files_in_one_order_are_read_tensor_by_tensor() -> None:
    """No file is read further than one tensor ahead of what has been compared."""
    ahead = [0, 0]

    def reading(place: int) -> Iterator[tuple[str, Tensor]]:
        for index in range(20):
            ahead[place] += 1
            yield f"t{index}", drawn(index, 2, 2)

    for done, _ in enumerate(compare_weights([reading(0), reading(1)])):
        assert ahead == [done + 1, done + 1]


@pytest.mark.parametrize(
    "head",
    ["w4g32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("w8", "float"))],
)
def test_a_tied_head_comes_where_the_file_holds_another(tmp_path: Path, head: str) -> None:
    """One convolution and one attention layer whose linears are square, as RoPE's rotation is."""
    config = ModelConfig.from_dict(
        {
            "model_type": "lfm2",
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 64,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["full_attention", "conv"],
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "max_position_embeddings": 128,
            "eos_token_id": 7,
            "tie_word_embeddings": True,
        }
    )
    shapes, tied = config.tied_shapes()
    source = {name: drawn(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    rules = (Rule(HEAD, parse_scheme(head)), Rule(EMBEDDING, parse_scheme("w8")))
    recipe = Recipe((*rules, Rule(".*conv.*|.*w2.*", parse_scheme("w4g32"))))
    rows = resolve(recipe, shapes, tied)
    weights = dict(quantize_tensors(rows, source.__getitem__))
    path = tmp_path / "model.pte"
    export_pte(config, dict(weights), 24, path, lambda stage: None)
    found = dict(pte_weights.weights(path, config))
    assert (HEAD in found) == (head != "w8")
    assert found.keys() | {HEAD} == weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, floats(weights[name])), name


def test_equal_files_are_found_though_the_first_differs() -> None:
    a, b = drawn(0, 4, 4), drawn(1, 4, 4)
    (row,) = compare_weights([iter([("t", tensor)]) for tensor in (a, b, a.clone(), b.clone())])
    assert row.same_as == (0, 1, 0, 1)


def test_one_quantization_is_the_same_weights_in_every_file(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    others = [
        export_model("lfm2-tiny", tmp_path / target, target=target, recipe="int8", context=64)
        for target in ("gguf", "onnx")
    ]
    config = ModelConfig.load(tiny_artifact)
    files = [
        read_weights(artifact.target, artifact.model_path, config)
        for artifact in (Artifact.open(tiny_artifact), *others)
    ]
    rows = list(compare_weights(files))
    assert {row.tensor for row in rows} == set(config.tensor_shapes())
    assert {row.same_as for row in rows} == {(0, 0, 0)}
