"""`verify`: run a model's file in its engine and compare it with the model."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from edgekit.common.progress import Progress
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options, find_layout
from edgekit.exporters.contract.own_formats import own_formats
from edgekit.exporters.contract.stored import stored
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.contract.writer import load_writer
from edgekit.exporters.inspect.report import open_unchanged
from edgekit.exporters.read_codes import read_codes
from edgekit.exporters.verify.decoder import (
    Reference,
    check_format_cost,
    eager_logits,
    reference,
    verify,
)
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.formats.artifact.manifest import DecoderManifest, Manifest
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.artifact.write import record_verification
from edgekit.metrics.logits import Logits
from edgekit.models.activations import FakeQuantize, otherwise
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import ModelSource
from edgekit.models.tokenizer import TOKENIZER_FILE, Tokenizer
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.recipe import Resolved, Table
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import Weight
from edgekit.runtime.engines.engine import import_engine, load_engine
from edgekit.workflows.artifact_model import model_of
from edgekit.workflows.verify_network import verify_module_artifact

VERIFY_TOKENS = 128


def verify_artifact(
    path: Path, model: str | None, progress: Progress, adapter: Path | None = None
) -> Manifest:
    """Verify an artifact anew and record the figures in its manifest; return the manifest.

    Of a module the manifest is returned with the figures, and the file keeps those of its export.
    `model` is where the weights are, by default what the manifest names, `adapter` the folder of
    the adapter that was merged into them. They must be those that
    the artifact was made of. Raises EdgekitError where they are not or the engine is missing, and
    VerificationError, the manifest left as it was, where the file computes something else.
    """
    # A few wrong bytes among the weights move no logit enough to be seen.
    artifact = open_unchanged(path)
    if artifact.is_module:
        if model is not None or adapter is not None:
            raise EdgekitError(f"{path}: is a module, which is verified without a model")
        return verify_module_artifact(artifact, progress)
    target = artifact.target
    writer = load_writer(target)
    import_engine(target)
    progress("reading the model")
    source = model_of(artifact, model, "say with `model` where the weights are", adapter)
    tokens = verification_tokens(source, artifact.context)
    progress("computing the reference")
    weights = _weights(artifact, source)
    expected = expected_logits(source, weights, tokens, writer.fake_quantize)
    if artifact.decoder.llama_format is not None:
        check_format_cost(expected)
    progress(f"verifying in {find_layout(target, Options()).ENGINE}")
    path, context = artifact.model_path, artifact.context
    found = verify_file(target, path, context, expected, source, lambda: weights)
    return record_verification(artifact, found)


def expected_logits(
    source: ModelSource,
    weights: Mapping[str, Weight],
    tokens: list[int],
    fake_quantize: FakeQuantize,
) -> Reference:
    """Return the logits of the float model and of the eager model of the weights.

    `fake_quantize` rounds activations as the target's engine does.
    """
    read = float_reader(source.config, source.checkpoint)
    return reference(
        tokens,
        build_eager(source.config, read, len(tokens)),
        build_eager(source.config, weights.__getitem__, len(tokens), fake_quantize),
    )


def verify_file(
    target: str,
    path: Path,
    context: int,
    expected: Reference,
    source: ModelSource,
    weights: Callable[[], Mapping[str, Weight]],
) -> dict[str, Any]:
    """Open the file in its engine and compare; return the figures for the manifest.

    `weights` are those of `expected` again, for a model that amplifies roundings.
    VerificationError where the logits differ, or the ids of the tokenizer that the file holds.
    """

    def decided_otherwise() -> Logits:
        rounding = otherwise(writer.fake_quantize)
        model = build_eager(source.config, weights().__getitem__, len(expected.tokens), rounding)
        return eager_logits(model, expected.tokens)

    writer = load_writer(target)
    figures: dict[str, Any] = {}
    if source.folder is not None and (source.folder / TOKENIZER_FILE).is_file():
        compared = writer.check_tokenizer(path, source.folder)
        if compared:
            figures["tokenizer"] = compared
    with load_engine(target, path, context=context) as engine:
        found = verify(engine, expected, writer.MAX_CHECK_TOKENS, decided_otherwise)
    return found.to_dict() | figures


def verification_tokens(source: ModelSource, context: int) -> list[int]:
    """Real text where the model has a tokenizer, else random tokens; never more than fits.

    Only random weights may come without a tokenizer.
    """
    limit = min(VERIFY_TOKENS, context)
    folder = source.folder
    if folder is None or (source.random_weights and not (folder / TOKENIZER_FILE).is_file()):
        draw = random.Random(0)
        return [draw.randrange(source.config.vocab_size) for _ in range(limit)]
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise EdgekitError(
            f"{folder / TOKENIZER_FILE}: has {tokenizer.vocab_size} tokens, the model's "
            f"vocabulary only {source.config.vocab_size}"
        )
    return tokenizer.encode(TEXT)[:limit]


def _weights(artifact: Artifact, source: ModelSource) -> Mapping[str, Weight]:
    """Return what the file must compute: the codes anew, or what it holds.

    The latter for a foreign format, and for codes that came out of a file: its content is known to
    be what was written, and whether that is what the file of codes holds was seen then.
    """
    manifest = artifact.decoder
    if manifest.llama_format is not None:
        return own_formats(artifact.target).stored_weights(artifact.model_path, source.config)
    if manifest.codes_sha256 is not None:
        # What a file holds as such is read back as int8 codes as well: the same numbers.
        rows = stored(Table(_rows(manifest)))
        return read_codes(artifact.target, artifact.model_path, source.config, rows)
    _, tied = source.config.tied_shapes()
    return Weights(Table(_rows(manifest), tied), source.checkpoint)


def _rows(manifest: DecoderManifest) -> list[Resolved]:
    """Return the manifest's table as rows to quantize by."""
    return [
        Resolved(
            row.tensor,
            parse_scheme(row.scheme),
            cast(RangeMethod | None, row.range),
            row.shape,
            row.bytes,
        )
        for row in manifest.tensors
    ]
