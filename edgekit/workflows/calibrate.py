"""Codes that are chosen by calibration on a text, and what that gained.

A run is long, so the layers that are done are kept in a hidden folder beside the output, under a
digest of everything that decides them: the same command goes on from there after a kill. The folder
is removed when the work is done.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from edgekit.common.files import make_folder, read_text, sha256_of
from edgekit.common.last_words import half_written
from edgekit.common.progress import Steps
from edgekit.errors import EdgekitError
from edgekit.models.eager import float_reader
from edgekit.models.layerwise import Choose, Codes, States, layer_codes
from edgekit.models.reorder import grouped_orders, reordered
from edgekit.models.source import ModelSource
from edgekit.models.tokenizer import Tokenizer
from edgekit.quantize.apply import quantize_tensors, sqnr_db
from edgekit.quantize.codebook.jlcm import jlcm, weighted_kmeans
from edgekit.quantize.gptq import Inputs, gptq
from edgekit.quantize.methods import Method
from edgekit.quantize.recipe import (
    Recipe,
    Resolved,
    in_layers,
    method_of,
    resolve,
    with_ranges,
)
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.storage import About, Contents, load_quantized, save_quantized, short_text
from edgekit.quantize.tensor import QuantizedTensor, Weight
from edgekit.runtime.evaluation.evaluate import cut, tokenize
from edgekit.workflows.gains import Gains, measure
from edgekit.workflows.quality import CODEBOOK_METHODS, WITH_TEXT

VERSION = 2
"""Version of the computation: layers that another version kept are not used."""

CHUNK = 256
"""Tokens that are run together."""
MOST_CHUNKS = 128
"""Chunks to calibrate on; more change GPTQ's codes little and cost as much time again."""
LEAST_CHUNKS = 4
_MOST_HELD_OUT = 32
_HELD_OUT_BYTES = 256 << 20
"""Of the float model's logits, which are kept while each step is measured."""
_MOST_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Texts:
    """A text as chunks of token ids: to calibrate on, and after them, to measure on."""

    name: str
    calibration: list[list[int]]
    held_out: list[list[int]]


@dataclass(frozen=True)
class Calibrated:
    """What was written: each tensor's SQNR in dB, and what the steps gained."""

    method: Method
    sqnr: Mapping[str, float]
    gains: Gains


def read_texts(source: ModelSource, path: Path) -> Texts:
    """Tokenize a file and cut it; EdgekitError where it is no text or too short.

    Of the chunks a fifth is held out: the last ones, so that the two parts share no story.
    """
    text = read_text(path)
    if source.folder is None:
        raise EdgekitError(f"{source.id}: random weights have no tokenizer to read a text with")
    tokenizer = Tokenizer.load(source.folder)
    size = min(CHUNK, source.config.max_context)
    tokens = tokenize(tokenizer, text[:_MOST_CHARACTERS])
    if len(tokens) < LEAST_CHUNKS * size:
        raise EdgekitError(
            f"{path}: has {len(tokens)} tokens; calibration needs at least {LEAST_CHUNKS * size}"
        )
    if max(tokens) >= source.config.vocab_size:
        raise EdgekitError(f"the tokenizer's token {max(tokens)} lies outside the vocabulary")
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    chunks = cut(tokens, size, MOST_CHUNKS + _MOST_HELD_OUT, bos)
    affordable = _HELD_OUT_BYTES // (2 * size * source.config.vocab_size)  # half a chunk of 4 bytes
    count = min(max(1, len(chunks) // 5), max(1, affordable))
    return Texts(path.name, chunks[:-count][:MOST_CHUNKS], chunks[-count:])


def quantize_calibrated(
    source: ModelSource,
    recipe: Recipe,
    texts: Texts,
    method: Method,
    path: Path,
    workspace: Path,
    progress: Steps,
) -> Calibrated:
    """Write a model's codes to `path`, as `quantize_to_file` does, and measure what was gained.

    `workspace` is where finished layers are kept (`workspace_of`). Raises EdgekitError as `resolve`
    and `layer_codes` do.
    """
    shapes, tied = source.config.tied_shapes()
    rows = resolve(with_ranges(recipe, "rtn" if method == "rtn" else "mse"), shapes, tied)
    if method not in WITH_TEXT:
        method = method_of(rows)  # at 8 bits `mse` changes nothing
    checkpoint = source.checkpoint
    in_order = float_reader(source.config, checkpoint)
    architecture = source.config.architecture
    read = reordered(architecture, in_order, grouped_orders(architecture, rows, in_order))
    digest = checkpoint.sha256()

    def rounded(ranges: Literal["rtn", "mse"]) -> dict[str, Weight]:
        found = resolve(with_ranges(recipe, ranges), shapes, tied)
        return dict(quantize_tensors(found, read))

    # A text decides the codes of the layers' linears, so those are not rounded first.
    simple = [row for row in rows if not (method in WITH_TEXT and is_linear(row))]
    contents: dict[str, Weight] = {
        name: value.float() if isinstance(value, Tensor) else value
        for name, value in quantize_tensors(replace(rows, rows=simple), read)
    }
    if method in WITH_TEXT:
        kept = _Layers(workspace / _key(digest, rows, texts, method))
        contents |= layer_codes(
            architecture,
            rows,
            read,
            contents.__getitem__,
            texts.calibration,
            _chooser(method),
            progress,
            kept,
        )
        contents = {row.tensor: contents[row.tensor] for row in rows}  # in the model's order
    steps: dict[str, Callable[[], Mapping[str, Weight]]] = {}
    if method in CODEBOOK_METHODS:
        steps["kmeans"] = lambda: rounded("mse")
    else:
        steps["rtn"] = lambda: rounded("rtn")
    if method == "gptq":
        steps["mse"] = lambda: rounded("mse")
    steps[method] = lambda: contents
    gains = measure(source.config, read, steps, texts.held_out, progress)
    about = About(
        short_text(source.id), digest, short_text(recipe.name), method, _facts(texts, gains)
    )
    save_quantized(path, contents, about)
    return Calibrated(method, _sqnr(contents, read), gains)


@contextmanager
def workspace_of(output: Path) -> Iterator[Path]:
    """Give the hidden folder for work on `output`, to be made when there is something to keep.

    It is removed when the work is done; what is kept in it stays where the work is broken off.
    """
    folder = output.absolute().with_name(f".{output.name}.calibration")
    try:
        with half_written(folder, keep_if_filled=True):
            yield folder
    except BaseException:
        for empty in (*folder.glob("*"), folder):
            with suppress(OSError):  # there is none, or something is kept in it
                empty.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def is_linear(row: Resolved) -> bool:
    """Return whether the row is of a layer's linear and quantized."""
    return in_layers(row.tensor) and not row.scheme.is_float


def _chooser(method: Method) -> Choose:
    """Return what chooses codes on a text; what has no codebook among codebooks takes GPTQ."""
    of_codebooks = weighted_kmeans if method == "weighted-kmeans" else jlcm

    def choose(weight: Tensor, inputs: Inputs, scheme: Scheme) -> QuantizedTensor:
        return (
            of_codebooks(weight, inputs, scheme)
            if isinstance(scheme, Codebook)
            else gptq(weight, inputs, scheme)
        )

    return choose


def _key(digest: str, rows: Sequence[Resolved], texts: Texts, method: Method) -> str:
    """Return a name for everything that decides the codes."""
    facts = [
        VERSION,
        method,
        digest,
        [[row.tensor, row.scheme.name, row.range] for row in rows],
        texts.calibration,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Layers:
    """Finished layers in a folder, one file each, and the hidden states behind the last."""

    folder: Path

    def load(self, index: int) -> Codes | None:
        found = self._read(f"layer-{index}")
        if found is None:
            return None
        return {name: each for name, each in found.items() if isinstance(each, QuantizedTensor)}

    def states(self, index: int) -> States | None:
        found = self._read(f"states-{index}")
        if found is None:
            return None
        exact, quantized = found["float"], found["quantized"]
        assert isinstance(exact, Tensor) and isinstance(quantized, Tensor)
        return exact, quantized

    def save(self, index: int, codes: Codes, states: States | None) -> None:
        make_folder(self.folder)
        if states is not None:
            self._write(f"states-{index}", dict(zip(("float", "quantized"), states, strict=True)))
        self._write(f"layer-{index}", codes)
        for path in self.folder.glob(f"states-{index - 1}.*"):
            path.unlink()

    def _read(self, name: str) -> Contents | None:
        path = self.folder / f"{name}.safetensors"
        try:
            if path.with_suffix(".sha256").read_text() != sha256_of(path):
                return None  # damaged, or half of it written: it is made again
        except (OSError, UnicodeDecodeError):
            return None
        return load_quantized(path)

    def _write(self, name: str, contents: Mapping[str, Weight]) -> None:
        path = self.folder / f"{name}.safetensors"
        save_quantized(path, contents)
        path.with_suffix(".sha256").write_text(sha256_of(path))


def _facts(texts: Texts, gains: Gains) -> dict[str, str | int | float | bool]:
    measured = {f"held_out_kld_{gain.step}": gain.kld.value for gain in gains.steps}
    return {
        "calibration_text": short_text(texts.name),
        "calibration_tokens": sum(map(len, texts.calibration)),
        "held_out_tokens": gains.tokens,
        **measured,
    }


def _sqnr(contents: Mapping[str, Weight], read: Callable[[str], Tensor]) -> dict[str, float]:
    return {
        name: sqnr_db(read(name), value)
        for name, value in contents.items()
        if isinstance(value, QuantizedTensor)
    }
