"""Opening what a user names, a model file or a model, as an engine and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import TextTokenizer, Tokenizer
from edgekit.runtime.engines.engine import Engine, check_threads
from edgekit.runtime.model_files import find_model_file, is_model_file


@dataclass(frozen=True)
class Subject:
    """An open engine, the tokenizer of its model, and the name that tables give the two."""

    name: str
    engine: Engine
    tokenizer: TextTokenizer


def open_subject(
    name: str, context: int, threads: int | None, tokenizer: Path | None = None
) -> Subject:
    """Open an artifact or a foreign file in its engine, or a model, in torch as the float model.

    `context` is the number of positions a model needs; an artifact has those of its file.
    `tokenizer` is another tokenizer.json for a file, or its folder. Raises `EdgekitError` where
    there is neither.
    """
    check_threads(threads)
    if is_model_file(Path(name)):
        file = find_model_file(Path(name))
        text = file.tokenizer(tokenizer)
        return Subject(file.name, file.load(threads, context), text)
    return _open_model(name, context, threads)


def _open_model(name: str, context: int, threads: int | None) -> Subject:
    from edgekit.runtime.engines.torch.decoder import TorchEngine

    source = resolve_model(name)
    assert source.folder is not None  # without random weights there is one
    tokenizer = Tokenizer.load(source.folder)
    engine = TorchEngine.from_model(name, min(context, source.config.max_context), threads)
    return Subject(source.id, engine, tokenizer)
