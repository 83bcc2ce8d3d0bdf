"""What a path stands for: an artifact, a model file that others made, or a folder of theirs."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgekit.common.files import stand_in
from edgekit.devices.hosts.host import Host
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import DecoderManifest
from edgekit.formats.artifact.read import MANIFEST, TARGET_OF
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.genai_config import CONFIG as GENAI_CONFIG
from edgekit.formats.onnx.genai_config import GenaiConfig, is_genai_folder
from edgekit.models.named_artifact import open_artifact
from edgekit.models.tokenizer import TOKENIZER_FILE, TextTokenizer, Tokenizer
from edgekit.runtime.engines.engine import DEFAULT_CONTEXT, Engine, import_engine, load_engine
from edgekit.runtime.engines.registry import ENGINES
from edgekit.runtime.engines.stated import stated_by


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
        """Size of the model file and of the files in which an ONNX model keeps its weights."""
        return sum(file.stat().st_size for file in (self.path, *self._weights()))

    def put(self, host: Host) -> str:
        """Bring the file to a host, and what its engine reads beside it; returns its path there."""
        folder = self.place if self.place.is_dir() else self.path.parent
        files = [self.path, *self._weights()]
        if self.manifest is not None:
            files = [folder / name for name in (MANIFEST, *self.manifest.files)]
        elif is_genai_folder(folder):
            files.append(folder / GENAI_CONFIG)
        place = host.put(folder, [file.relative_to(folder).as_posix() for file in files])
        return f"{place}/{self.path.relative_to(folder).as_posix()}"

    def _weights(self) -> list[Path]:
        """The files in which an ONNX model keeps its weights."""
        return OnnxFile.open(self.path).external_files() if self.engine == "onnx" else []

    def room(self, needed: int = 0) -> int | None:
        """Return the positions to ask the engine for so that `needed` ones fit, at most `longest`.

        None leaves it to the engine, which may know of a bound that is not stated.
        """
        if self.context is None or self.longest is None:
            # An ONNX graph checks by itself what it is asked for; a .pte cannot be asked.
            return needed if self.engine == "onnx" and needed > DEFAULT_CONTEXT else None
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
        # Transformers.js keeps models one folder below their tokenizer
        for folder in (beside, *([beside.parent] if beside.name == "onnx" else [])):
            if (folder / TOKENIZER_FILE).is_file():
                return Tokenizer.load(folder)
        raise EdgekitError(
            f"{self.place}: has no {TOKENIZER_FILE} beside it; name its tokenizer.json, or the "
            "folder that holds it: --tokenizer PATH"
        )

    def end_ids(self, engine: Engine, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Return the tokens that end a text: as stated beside the file, in it, by the tokenizer."""
        return self.eos_ids or engine.eos_ids or tokenizer.eos_ids


def find_model_file(place: Path) -> ModelFile:
    """Return what a path stands for; EdgekitError where that is nothing an engine can run.

    An artifact folder, a folder of onnxruntime-genai's, or one file by the end of its name.
    """
    if is_genai_folder(place) and not (place / MANIFEST).exists():
        return _genai_folder(place)
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
    return place.is_file() or (place / MANIFEST).is_file() or is_genai_folder(place)


def _tokenizer_file(given: Path) -> Path:
    file = given / TOKENIZER_FILE if given.is_dir() else given
    if not file.is_file() or file.suffix != ".json":
        raise EdgekitError(
            f"--tokenizer takes a {TOKENIZER_FILE}, or the folder that holds one, not {given}"
        )
    return file


def _genai_folder(place: Path) -> ModelFile:
    config = GenaiConfig.open(place)
    longest = config.context or DEFAULT_CONTEXT
    context = min(longest, DEFAULT_CONTEXT)
    return ModelFile(place, config.model_path, "onnx", context, longest, config.eos_ids)


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
