"""What a path stands for: an artifact, a model file that others made, or a folder of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from edgekit.common.files import stand_in
from edgekit.devices.hosts.host import Host
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import DecoderManifest
from edgekit.formats.artifact.read import MANIFEST, TARGET_OF
from edgekit.models.named_artifact import open_artifact
from edgekit.models.stated_sampling import OFF, stated_sampling
from edgekit.models.tokenizer import TOKENIZER_FILE, TextTokenizer, Tokenizer
from edgekit.runtime.engines.engine import DEFAULT_CONTEXT, Engine, import_engine, load_engine
from edgekit.runtime.engines.files import engine_of_folder, files_of
from edgekit.runtime.engines.registry import ENGINES
from edgekit.runtime.engines.stated import stated_by
from edgekit.runtime.generation.sampling import SamplingParams


@dataclass(frozen=True)
class ModelFile:
    """A model that an engine can run, and what is known of it before it does.

    `place` is what was named, `path` the file that the engine opens; `context` is the number of
    positions that the engine makes room for and `longest` the most that it can, both None where
    only the loaded file says. `eos_ids` are those that a description beside the file states.
    `manifest` is None for what edgekit did not make.
    """

    place: Path
    path: Path
    engine: str
    context: int | None = None
    longest: int | None = None
    eos_ids: tuple[int, ...] = ()
    manifest: DecoderManifest | None = None

    @property
    def name(self) -> str:
        """The folder's or the file's own name."""
        return self.place.resolve().name

    @property
    def file_bytes(self) -> int:
        """Size of the model file and of the files in which it keeps weights."""
        return sum(file.stat().st_size for file in (self.path, *self._weights()))

    def put(self, host: Host) -> str:
        """Bring the file to a host, and what its engine reads beside it; returns its path there."""
        folder = self.place if self.place.is_dir() else self.path.parent
        files = [self.path, *self._weights()]
        others = files_of(self.engine)
        if self.manifest is not None:
            files = [folder / name for name in (MANIFEST, *self.manifest.files)]
        elif others is not None and (folder / others.DESCRIPTION).is_file():
            files.append(folder / others.DESCRIPTION)
        place = host.put(folder, [file.relative_to(folder).as_posix() for file in files])
        return f"{place}/{self.path.relative_to(folder).as_posix()}"

    def _weights(self) -> list[Path]:
        """The files in which the model keeps weights beside its own."""
        files = files_of(self.engine)
        return [] if files is None else files.weight_files(self.path)

    def room(self, needed: int = 0) -> int | None:
        """Return the positions to ask the engine for so that `needed` ones fit, at most `longest`.

        None leaves it to the engine, which may know of a bound that is not stated.
        """
        if self.context is None or self.longest is None:
            return needed if needed > DEFAULT_CONTEXT else None
        if self.manifest is None and needed <= self.context:
            return None
        return min(max(needed, self.context), self.longest)

    def load(self, threads: int | None = None, needed: int = 0) -> Engine:
        """Open the file in its engine, with room for `needed` positions or its own number."""
        return load_engine(self.engine, self.path, threads, self.room(needed))

    def tokenizer(self, given: Path | None = None) -> TextTokenizer:
        """Return the tokenizer of a folder or a tokenizer.json.

        By default the file's own, or what lies beside it.
        """
        if given is not None:
            return Tokenizer.load(_tokenizer_file(given))
        if self.manifest is None and ENGINES.can(self.engine, "tokenizer"):
            import_engine(self.engine)  # which says what is wrong with its library, if anything is
            opened = ENGINES.load(self.engine, "tokenizer").open_tokenizer(self.path)
            return cast(TextTokenizer, opened)
        beside = self.place if self.place.is_dir() else self.path.parent
        files = files_of(self.engine)
        below = files is not None and beside.name == files.BELOW
        for folder in (beside, *([beside.parent] if below else [])):
            if (folder / TOKENIZER_FILE).is_file():
                return Tokenizer.load(folder)
        raise EdgekitError(
            f"{self.place}: has no {TOKENIZER_FILE} beside it; name its tokenizer.json, or the "
            "folder that holds it: `tokenizer`"
        )

    def sampling(self, **given: float | None) -> SamplingParams:
        """Return how tokens are to be drawn: as given, else as the model's makers say.

        They say so in the file or in a generation_config.json beside it; where they do not, the
        defaults of `SamplingParams` count. EdgekitError for settings out of range.
        """
        asked: dict[str, Any] = {name: it for name, it in given.items() if it is not None}
        stated: dict[str, Any] = dict(self._stated_sampling())
        try:
            SamplingParams(**stated)
        except EdgekitError as error:
            raise EdgekitError(f"{self.place}: of what it says of sampling, {error}") from error
        return SamplingParams(**stated | asked)

    def _stated_sampling(self) -> Mapping[str, float]:
        inside = None if self.manifest is not None else stated_by(self.path, self.engine)
        folder = self.place if self.place.is_dir() else self.path.parent
        found = (inside and inside.sampling) or stated_sampling(folder)
        return {**OFF, **found} if found else {}

    def end_ids(self, engine: Engine, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the tokens that end a text: as stated beside the file, in it, by the tokenizer."""
        return self.eos_ids or engine.eos_ids or tokenizer.eos_ids


def find_model_file(place: Path) -> ModelFile:
    """Return what a path stands for; EdgekitError where that is nothing an engine can run.

    An artifact folder, a folder of onnxruntime-genai's, or one file by the end of its name.
    """
    engine = engine_of_folder(place)
    if engine is not None and not (place / MANIFEST).exists():
        return _folder_of_others(engine, place)
    if place.is_file():
        return _bare_file(place)
    artifact = open_artifact(place)
    return ModelFile(
        place,
        artifact.model_path,
        artifact.target,
        artifact.context,
        artifact.context,
        artifact.eos_ids,
        artifact.decoder,
    )


def is_model_file(place: Path) -> bool:
    """Whether `find_model_file` is to be asked for a path, rather than a model's name or folder."""
    if place.is_file() or (place / MANIFEST).is_file():
        return True
    return engine_of_folder(place) is not None


def _tokenizer_file(given: Path) -> Path:
    file = given / TOKENIZER_FILE if given.is_dir() else given
    if not file.is_file() or file.suffix != ".json":
        raise EdgekitError(
            f"`tokenizer` takes a {TOKENIZER_FILE}, or the folder that holds one, not {given}"
        )
    return file


def _folder_of_others(engine: str, place: Path) -> ModelFile:
    files = files_of(engine)
    assert files is not None
    found = files.open_folder(place)
    longest = found.context or DEFAULT_CONTEXT
    context = min(longest, DEFAULT_CONTEXT)
    return ModelFile(place, found.path, engine, context, longest, found.eos_ids)


def _bare_file(place: Path) -> ModelFile:
    found = stand_in(place)
    if found is not None:
        raise EdgekitError(f"{place}: {found}")
    engine = TARGET_OF.get(place.suffix.lower())
    if engine is None:
        raise EdgekitError(
            f"{place}: is no artifact folder and no file of those that end in "
            f"{', '.join(TARGET_OF)}"
        )
    stated = stated_by(place, engine)
    if stated is None:
        return ModelFile(place, place, engine)
    return ModelFile(place, place, engine, min(stated.context, DEFAULT_CONTEXT), stated.context)
