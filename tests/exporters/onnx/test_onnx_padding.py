"""Padded batches in ONNX: each row computes what it computes alone, whatever the padding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from support.onnx_models import Abi, past_of, random_weights, session, small_config, write
from transformers import Lfm2Config, Lfm2ForCausalLM

from edgekit.cli import main
from edgekit.exporters.inspect.report import inspect
from edgekit.exporters.onnx.graph import OnnxGraph
from edgekit.exporters.onnx.inspect import Report
from edgekit.exporters.onnx.padding import Places
from edgekit.metrics.logits import kld
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import preset

Logits = NDArray[np.float32]
Integers = NDArray[np.int64]
C, A = "conv", "full_attention"
FORMS: dict[str, tuple[Abi, bool]] = {
    "genai": ("genai", False),
    "transformersjs": ("transformersjs", False),
    "portable": ("genai", True),
    "portable-transformersjs": ("transformersjs", True),
}
LAYERS = {"conv-last": (C, A, C), "attention-last": (A, C, A)}
_DRAW = np.random.default_rng(0)
ROWS = [[int(token) for token in _DRAW.integers(320, size=size)] for size in (9, 4, 1)]
STEPS = [[int(token) for token in _DRAW.integers(320, size=3)] for _ in range(3)]
"""Single tokens after the rows, one for each row."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[Abi, bool]:
    return FORMS[request.param]


class Batch:
    """A batch of sequences whose mask grows."""

    def __init__(self, path: Path, rows: int) -> None:
        self._session = session(path)
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._mask = np.zeros((rows, 0), np.int64)
        sizes = {"batch_size": rows, "past_sequence_length": 0}
        self._states = {
            value.name: np.zeros([sizes.get(size, size) for size in value.shape], "f4")
            for value in self._session.get_inputs()
            if value.name.startswith("past")
        }

    def __call__(self, ids: object, mask: object, wanted: int = 0) -> Logits:
        """Logits `[batch, wanted, vocab]`, 0 for all, of ids `[batch, n]` with their mask."""
        self._mask = np.concatenate([self._mask, np.array(mask, np.int64)], axis=1)
        feeds = {
            "input_ids": np.array(ids, np.int64),
            "attention_mask": self._mask,
            "num_logits_to_keep": np.array(wanted),
            **self._states,
        }
        found = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        logits: Logits = found.pop("logits")
        self._states = {past_of(name): value for name, value in found.items()}
        return logits


def alone(path: Path, *chunks: Sequence[int]) -> Logits:
    """Logits `[n, vocab]` of each token of one sequence without padding."""
    batch = Batch(path, 1)
    return np.concatenate([batch([chunk], [[1] * len(chunk)])[0] for chunk in chunks])


def padded(rows: Sequence[Sequence[int]], in_front: bool, size: int) -> tuple[Integers, Integers]:
    ids, mask = np.full((len(rows), size), 5, np.int64), np.zeros((len(rows), size), np.int64)
    for index, row in enumerate(rows):
        place = slice(size - len(row), None) if in_front else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def transformers_logits(config: ModelConfig, ids: Integers, mask: Integers) -> Logits:
    """Logits `[batch, n, vocab]` by transformers' model of the same weights."""
    model = Lfm2ForCausalLM(Lfm2Config(**config.to_dict())).float().eval()
    model.load_state_dict(random_weights(config), strict=False)
    with torch.no_grad():
        logits: torch.Tensor = model(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits
    return logits.numpy()


@pytest.mark.parametrize("size", [9, 12])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_padding_in_front_gives_the_logits_of_transformers(
    tmp_path: Path, form: tuple[Abi, bool], layers: tuple[str, ...], size: int
) -> None:
    config = small_config(layers)
    path = write(tmp_path, config, preset("float"), *form).path
    ids, mask = padded(ROWS, True, size)
    whole_ids = np.concatenate([ids, np.transpose(STEPS)], axis=1)
    whole_mask = np.concatenate([mask, np.ones((3, 3), np.int64)], axis=1)
    expected = transformers_logits(config, whole_ids, whole_mask)
    batch = Batch(path, 3)
    found = [batch(ids, mask), *(batch(np.array(s)[:, None], [[1]] * 3) for s in STEPS)]
    difference = np.abs(np.concatenate(found, axis=1) - expected)
    assert difference[whole_mask == 1].max() < 1e-4


@pytest.mark.parametrize("in_front", [True, False], ids=["front", "behind"])
@pytest.mark.parametrize("recipe", ["float", "int8", "int4"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_each_row_is_what_it_is_alone(
    tmp_path: Path,
    form: tuple[Abi, bool],
    layers: tuple[str, ...],
    recipe: str,
    in_front: bool,
) -> None:
    path = write(tmp_path, small_config(layers), preset(recipe), *form).path
    ids, mask = padded(ROWS, in_front, 10)
    batch = Batch(path, 3)
    found = batch(ids, mask)
    last = Batch(path, 3)(ids, mask, wanted=1)[:, -1]
    steps = [batch(np.array(tokens)[:, None], [[1]] * 3, wanted=1)[:, 0] for tokens in STEPS]
    for index, row in enumerate(ROWS):
        expected = alone(path, row, *([tokens[index]] for tokens in STEPS))
        rows = np.concatenate([found[index][mask[index] == 1], *(s[index][None] for s in steps)])
        if recipe == "float":
            assert np.abs(rows - expected).max() < 1e-4
        assert kld(expected, rows) < 0.003
        assert kld(expected[len(row) - 1], last[index]) < 0.003


def test_a_masked_token_is_as_if_it_were_not_there(tmp_path: Path, form: tuple[Abi, bool]) -> None:
    """Between others, in a row of nothing else, and of a row that has ended."""
    path = write(tmp_path, small_config(), preset("float"), *form).path
    mask = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    ids = np.arange(21).reshape(3, 7)
    later = [([[30], [31], [32]], [[1], [1], [0]]), ([[40], [41], [42]], [[0], [1], [1]])]
    batch = Batch(path, 3)
    chunks = [batch(ids, mask), *(batch(*chunk) for chunk in later)]
    found = np.concatenate(chunks, axis=1)
    mask = np.concatenate([mask, *(np.array(given) for _, given in later)], axis=1)
    assert np.isfinite(found).all()
    for index, row in enumerate([[0, 2, 3, 6, 30], [31, 41], [14, 15, 16, 17, 18, 19, 42]]):
        expected = alone(path, row)
        assert np.abs(found[index][mask[index] == 1] - expected).max() < 1e-4


def test_padding_of_a_later_chunk(tmp_path: Path, form: tuple[Abi, bool]) -> None:
    path = write(tmp_path, small_config(), preset("float"), *form).path
    expected = alone(path, [11, 12, 13, 14, 15, 16])
    for mask in ([0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]):
        batch = Batch(path, 1)
        batch([[11, 12, 13]], [[1, 1, 1]])
        ids = np.full(4, 7)
        ids[np.array(mask) == 1] = [14, 15]
        assert np.abs(batch([ids], [mask])[0][np.array(mask) == 1] - expected[3:5]).max() < 1e-4
        assert np.abs(batch([[16]], [[1]])[0, 0] - expected[5]).max() < 1e-4


def test_a_later_chunk_of_a_batch_is_right_or_refused(
    tmp_path: Path, form: tuple[Abi, bool]
) -> None:
    """GroupQueryAttention takes one sequence there."""
    path = write(tmp_path, small_config(), preset("float"), *form).path
    batch = Batch(path, 2)
    batch([[5, 11, 12], [13, 14, 15]], [[0, 1, 1], [1, 1, 1]])
    chunk = [[16, 17], [5, 18]], [[1, 1], [0, 1]]
    if not form[1]:
        with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1"):
            batch(*chunk)
        return
    found = batch(*chunk)
    assert np.abs(found[0] - alone(path, [11, 12, 16, 17])[2:]).max() < 1e-4
    assert np.abs(found[1, 1] - alone(path, [13, 14, 15, 18])[3]).max() < 1e-4


@pytest.mark.parametrize("wanted", [1, 2, 5, 9, 10, 20])
def test_the_last_logits_end_at_a_rows_last_token(
    tmp_path: Path, form: tuple[Abi, bool], wanted: int
) -> None:
    """Padding behind is left out, as long as there are positions before it."""
    path = write(tmp_path, small_config(), preset("float"), *form).path
    for in_front in (True, False):
        ids, mask = padded(ROWS, in_front, 10)
        every, found = Batch(path, 3)(ids, mask), Batch(path, 3)(ids, mask, wanted)
        count = min(wanted, 10)
        assert found.shape == (3, count, 320)
        for index, row in enumerate(ROWS):
            end = 10 if in_front else max(len(row), count)
            assert np.abs(found[index] - every[index, end - count : end]).max() < 1e-5


def test_genai_gives_each_prompt_its_own_tokens(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    export = ["export", "lfm2-tiny", "--target", "onnx", "--int8", "--context", "128"]
    done = CliRunner().invoke(main, [*export, "-o", str(output)])
    assert done.exit_code == 0, done.stderr
    model = onnxruntime_genai.Model(str(output))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    prompts = [
        "Once upon a time",
        "One day, a little girl named Lily went to the park with her mom and her dog, and",
    ]
    alone = [generated(model, tokenizer.encode(prompt)[None], 16)[0] for prompt in prompts]
    ids = tokenizer.encode_batch(prompts).as_numpy()
    assert (ids[0] == 0).sum() > 10  # padding
    assert generated(model, ids, 16) == alone


def generated(
    model: onnxruntime_genai.Model, ids: NDArray[np.int32], count: int
) -> list[list[int]]:
    """The most likely tokens after each row."""
    params = onnxruntime_genai.GeneratorParams(model)
    rows, size = ids.shape
    params.set_search_options(max_length=size + count, batch_size=rows, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[size:].tolist() for row in range(rows)]


@pytest.mark.parametrize("more", [[], ["--portable"], ["--abi", "transformersjs"]], ids=str)
def test_verification_runs_a_padded_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """States that hold padding fail the export; a single sequence does not notice them."""
    begin = Places.__init__

    def count_padding(places: Places, graph: OnnxGraph, *inputs: str) -> None:
        begin(places, graph, *inputs)
        places.count = graph.node("Max", [places.count, places.size], "all")

    monkeypatch.setattr(Places, "__init__", count_padding)
    export = ["export", "lfm2-tiny", "--target", "onnx", "--int8", "--context", "32"]
    done = CliRunner().invoke(main, [*export, "-o", str(tmp_path / "artifact"), *more])
    assert done.exit_code == 1
    assert "verification: rows in a padded batch against each alone: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_inspect_knows_the_embedding_of_moved_tokens(
    tmp_path: Path, form: tuple[Abi, bool]
) -> None:
    found = inspect(write(tmp_path, small_config(), preset("float"), *form).path)
    assert isinstance(found, Report)
    assert any("embedding, float32" in part.name for part in found.components)
