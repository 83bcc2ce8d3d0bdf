"""Which tensors cost the most: divergence from the float model with one tensor quantized.

Of a text, the float model's hidden states before every layer are kept. A tensor of layer k changes
nothing before that layer, so the run with only that tensor quantized starts there. Activations
stay float: what is measured is the weight's own scheme. Figures are kept in the user's cache as
they are computed, so that an interrupted run goes on where it stopped.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.common.files import cache_folder, make_folder, new_file
from edgekit.common.plural import counted
from edgekit.common.progress import Steps, no_steps
from edgekit.common.tables import markdown_table
from edgekit.errors import EdgekitError
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.formats.artifact.read import MANIFEST, Artifact
from edgekit.metrics.divergence import Estimate, mean, score_rows
from edgekit.models.activations import unrounded
from edgekit.models.decoder import Decoder
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.models.weights import ReadWeight
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import Scheme
from edgekit.workflows.artifact_model import model_of

VERSION = 1
"""Version of the computation: figures cached by another version are ignored."""

MAX_TOKENS = 256
"""Tokens of the text that are run."""

FIRST = 16
"""Positions before this one are not counted: with so little before them they say little."""


@dataclass(frozen=True)
class TensorCost:
    """What one tensor costs and saves at the scheme.

    `kld` is the mean over the positions in nats, with its error as in `Estimate`; `bytes_saved` is
    against float32, what engines keep floats in.
    """

    tensor: str
    kld: float
    kld_error: float | None
    bytes_saved: int

    @property
    def kld_per_mb(self) -> float:
        """Nats paid for a saved megabyte (1e6 bytes)."""
        return self.kld / (self.bytes_saved / 1e6)


@dataclass(frozen=True)
class Sensitivity:
    """The costs of every tensor that the scheme can hold, the greatest divergence first."""

    model: str
    scheme: str
    tokens: int
    positions: int
    costs: tuple[TensorCost, ...]
    cache: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        facts = asdict(self) | {"cache": str(self.cache)}
        facts["costs"] = [asdict(cost) | {"kld_per_mb": cost.kld_per_mb} for cost in self.costs]
        return facts

    def text(self) -> str:
        """Return the ranked table."""
        rows = [
            [
                cost.tensor,
                f"{cost.kld:.6f}",
                "-" if cost.kld_error is None else f"± {cost.kld_error:.6f}",
                f"{cost.bytes_saved:,}",
                f"{cost.kld_per_mb:.6f}",
            ]
            for cost in self.costs
        ]
        headers = ["tensor", "mean KLD", "error", "bytes saved", "KLD per MB saved"]
        return (
            f"{self.model}: divergence from the float model with one tensor at {self.scheme}, "
            f"{counted(self.positions, 'position')} of {counted(self.tokens, 'token')}\n\n"
            f"{markdown_table(headers, rows, align='lrrrr')}"
        )


def sensitivity(
    name: str,
    scheme: Scheme,
    text: str = TEXT,
    progress: Steps | None = None,
) -> Sensitivity:
    """Measure every matrix of a model, or of the model that an artifact was made of.

    Raises `EdgekitError` for the float scheme, a text that is too short, and a cache that cannot
    be written.
    """
    if scheme.is_float:
        raise EdgekitError("`scheme` float costs nothing: give one that quantizes, such as w4g32")
    return next(sensitivities(_source(name), [scheme], text, lambda scheme: progress or no_steps))


def sensitivities(
    source: ModelSource,
    schemes: Iterable[Scheme],
    text: str,
    progress: Callable[[Scheme], Steps] = lambda scheme: no_steps,
) -> Iterator[Sensitivity]:
    """Yield what `sensitivity` returns, scheme by scheme, of a model that is found already.

    The float model is run once, where a figure is missing in the cache.
    """
    tokens = _tokens(source, text)
    float_run = cache(lambda: _FloatRun.of(source, tokens))
    for scheme in schemes:
        yield _sensitivity(source, scheme, tokens, float_run, progress(scheme))


def _sensitivity(
    source: ModelSource,
    scheme: Scheme,
    tokens: list[int],
    float_run: "Callable[[], _FloatRun]",
    show: Steps,
) -> Sensitivity:
    tensors = _tensors(source, scheme)
    kept = _Cache.open(source, scheme, tokens)
    missing = [tensor for tensor in tensors if tensor not in kept.figures]
    for place, tensor in enumerate(missing, start=len(tensors) - len(missing)):
        show(place, len(tensors), tensor)
        kept.keep(tensor, float_run().cost(tensor, scheme))
    show(len(tensors), len(tensors), "")
    costs = [TensorCost(tensor, *kept.figures[tensor], tensors[tensor]) for tensor in tensors]
    costs.sort(key=lambda cost: cost.kld, reverse=True)
    positions = len(tokens) - FIRST
    return Sensitivity(source.id, scheme.name, len(tokens), positions, tuple(costs), kept.path)


def divergence_of(source: ModelSource, weights: ReadWeight, text: str) -> Estimate:
    """Return the divergence with all tensors quantized, over the positions of `sensitivity`."""
    tokens = _tokens(source, text)
    run = _FloatRun.of(source, tokens)
    model = build_eager(source.config, weights, len(tokens), unrounded)
    with torch.inference_mode():
        logits = model.all_logits(torch.tensor([tokens]), torch.zeros(1, dtype=torch.long))
    return run.divergence(logits)


def _source(name: str) -> ModelSource:
    if not (Path(name) / MANIFEST).is_file():
        return resolve_model(name)
    source = model_of(Artifact.open(name), None, "give the model itself")
    if source.folder is None:
        raise EdgekitError(f"{name}: random weights have no tokenizer to read a text with")
    return source


def check_tokens(source: ModelSource, text: str) -> None:
    """Raise EdgekitError for a text that is too short to measure on, and without a tokenizer."""
    _tokens(source, text)


def _tokens(source: ModelSource, text: str) -> list[int]:
    if source.folder is None:
        raise EdgekitError(f"{source.id}: random weights have no tokenizer to read a text with")
    most = min(MAX_TOKENS, source.config.max_context)
    tokens = Tokenizer.load(source.folder).encode_plain(text)[:most]
    if len(tokens) < 2 * FIRST:
        raise EdgekitError(
            f"the text has {counted(len(tokens), 'token')}; at least {2 * FIRST} are needed"
        )
    return tokens


def _tensors(source: ModelSource, scheme: Scheme) -> dict[str, int]:
    """Return the matrices that the scheme can hold, with the bytes it saves of each."""
    shapes, _ = source.config.tied_shapes()
    found = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        try:
            scheme.check_shape(shape)
        except ValueError as error:
            raise EdgekitError(f"{name}: cannot be {scheme.name}: {error}") from error
        found[name] = FLOAT.nbytes(shape) - scheme.nbytes(shape)
    return found


@dataclass
class _FloatRun:
    """The float model over a text: hidden states before each layer and behind the last.

    `layers` is the place of the layer that each tensor is in.
    """

    model: Decoder
    layers: dict[str, int]
    override: dict[str, Tensor]
    read: Callable[[str], Tensor]
    tokens: list[int]
    states: list[Tensor]
    logits: Tensor

    @classmethod
    def of(cls, source: ModelSource, tokens: list[int]) -> "_FloatRun":
        read = float_reader(source.config, source.checkpoint)
        override: dict[str, Tensor] = {}

        def read_or_override(name: str) -> Tensor:
            return override[name] if name in override else read(name)

        model = build_eager(source.config, read_or_override, len(tokens))
        layers = {
            tensor.name: index
            for index, layer in enumerate(source.config.architecture.layers)
            for tensor in layer.tensors
        }
        run = cls(model, layers, override, read, tokens, [], torch.empty(0))
        run.states = list(run._from(0, run._embedded()))
        run.logits = run._logits(run.states[-1])
        return run

    def cost(self, name: str, scheme: Scheme) -> tuple[float, float | None]:
        """Return mean and error of the divergence with only that tensor quantized."""
        try:
            self.override[name] = quantize_weight(scheme, self.read(name).float()).dequantize()
            logits = self._logits(self._last_state(name))
        finally:
            self.override.clear()
        kld = self.divergence(logits)
        return kld.value, kld.error

    def divergence(self, logits: Tensor) -> Estimate:
        """Return the mean divergence of logits `[tokens, vocab]` from the float model's."""
        targets = [*self.tokens[FIRST + 1 :], 0]  # the last has none; its KLD needs none
        scores = score_rows(logits[FIRST:].numpy(), targets, self.logits[FIRST:].numpy())
        assert scores.kld is not None
        return mean(scores.kld)

    def _last_state(self, name: str) -> Tensor:
        if name == HEAD:
            return self.states[-1]
        first = 0 if name == EMBEDDING else self.layers[name]
        begin = self._embedded() if name == EMBEDDING else self.states[first]
        *_, last = self._from(first, begin)
        return last

    @torch.inference_mode()
    def _embedded(self) -> Tensor:
        embedded: Tensor = self.model.embed_tokens(torch.tensor(self.tokens))
        return embedded

    def _from(self, first: int, state: Tensor) -> Iterator[Tensor]:
        """Yield the state before layer `first` and behind it and every later one."""
        place = self.model.place(torch.zeros(1, dtype=torch.long), len(self.tokens))
        yield state
        for layer in list(self.model.layers)[first:]:
            with torch.inference_mode():
                state = layer(state, place)
            yield state

    @torch.inference_mode()
    def _logits(self, state: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.norm(state))
        return logits


@dataclass
class _Cache:
    """The figures of one model, scheme and text, in one file that is replaced at each figure."""

    path: Path
    key: dict[str, Any]
    figures: dict[str, tuple[float, float | None]]

    @classmethod
    def open(cls, source: ModelSource, scheme: Scheme, tokens: list[int]) -> "_Cache":
        key = {
            "version": VERSION,
            "source_sha256": source.checkpoint.sha256(),
            "scheme": scheme.name,
            "text_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = cache_folder() / "sensitivity" / f"{digest[:32]}.json"
        make_folder(path.parent, "; XDG_CACHE_HOME names another folder for it")
        return cls(path, key, _read_figures(path, key))

    def keep(self, tensor: str, figures: tuple[float, float | None]) -> None:
        """Add to what is kept, which another process may have added to meanwhile."""
        with _locked(self.path.with_suffix(".lock")), new_file(self.path) as scratch:
            self.figures = _read_figures(self.path, self.key) | self.figures | {tensor: figures}
            scratch.write_text(json.dumps({**self.key, "figures": self.figures}, indent=1) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads out that lock the same file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_figures(path: Path, key: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return what is kept; nothing where the file is absent, damaged or of another key."""
    try:
        kept = json.loads(path.read_text())
        if any(kept[name] != value for name, value in key.items()):
            return {}
        return {
            str(tensor): (float(kld), None if error is None else float(error))
            for tensor, (kld, error) in kept["figures"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
