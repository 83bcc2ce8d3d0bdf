"""Opening what a user names, an artifact or a model, as an engine and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from edgekit.artifact import MANIFEST, Artifact
from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.runtime.engine import Engine, check_threads, load_engine


@dataclass(frozen=True)
class Subject:
    """An open engine, the tokenizer of its model, and the name that tables give the two."""

    name: str
    engine: Engine
    tokenizer: Tokenizer


def open_subject(name: str, context: int, threads: int | None) -> Subject:
    """Open an artifact in its engine, or a model as the float model it is, in torch.

    `context` is the number of positions a model needs; an artifact has those of its file. Raises
    `EdgekitError` where there is neither.
    """
    check_threads(threads)
    if (Path(name) / MANIFEST).is_file():
        artifact = Artifact.open(name)
        tokenizer = Tokenizer.load(artifact.folder)
        engine = load_engine(artifact.target, artifact.model_path, threads, context)
        return Subject(Path(name).resolve().name, engine, tokenizer)
    return _open_model(name, context, threads)


def _open_model(name: str, context: int, threads: int | None) -> Subject:
    from edgekit.runtime.torch_engine import TorchEngine

    source = resolve_model(name)
    assert source.folder is not None  # without random weights there is one
    tokenizer = Tokenizer.load(source.folder)
    engine = TorchEngine.from_model(name, min(context, source.config.max_context), threads)
    return Subject(source.id, engine, tokenizer)
