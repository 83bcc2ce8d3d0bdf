"""Quality of artifacts on a text: perplexity, and divergence from a reference model.

Follows `llama-perplexity` (llama.cpp, tools/perplexity/perplexity.cpp) in what is scored: the
text is tokenized once, special tokens' spellings as plain text and less one final newline, and cut
into chunks of `context` tokens whose remainder is dropped. Each chunk starts from a fresh state,
its first token replaced by bos where the model adds one, and of its second half the tokens after
the first are scored.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.common.plural import counted
from edgekit.common.progress import Steps, no_steps
from edgekit.errors import EdgekitError
from edgekit.metrics.divergence import (
    Divergence,
    Estimate,
    Scores,
    divergence,
    join,
    perplexity,
    score_rows,
)
from edgekit.metrics.logits import Floats
from edgekit.models.tokenizer import TextTokenizer
from edgekit.runtime.open_model import Subject, open_subject

DEFAULT_CHUNK = 512
LEAST_CHUNK = 4
"""With fewer tokens a chunk has none to score after its first half."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one artifact or model on one text.

    `text_tokens` is the length of the whole text, `tokens` the number that was scored. Perplexities
    compare where `text_ids_sha256`, of the text's ids, is the same; `bits_per_byte`, of the text
    that the scored tokens stand for, compares between vocabularies, too. `divergence` and what
    begins with `reference` are None where nothing was compared with.
    """

    name: str
    engine: str
    engine_version: str
    reference: str | None
    reference_engine: str | None
    text_sha256: str
    text_ids_sha256: str
    text_tokens: int
    context: int
    chunks: int
    tokens: int
    perplexity: Estimate
    bits_per_byte: float | None
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "name": self.name,
            "engine": {"name": self.engine, "version": self.engine_version},
            "reference": self.reference,
            "reference_engine": self.reference_engine,
            "text_sha256": self.text_sha256,
            "text_ids_sha256": self.text_ids_sha256,
            "text_tokens": self.text_tokens,
            "context": self.context,
            "chunks": self.chunks,
            "tokens": self.tokens,
            "perplexity": self.perplexity.to_dict(),
            "bits_per_byte": self.bits_per_byte,
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
        }


def evaluate(
    artifact: str,
    text: str,
    reference: str | None = None,
    *,
    context: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    threads: int | None = None,
    tokenizer: Path | None = None,
    progress: Steps | None = None,
) -> Evaluation:
    """Score an artifact on a text, and compare it with a reference where one is named.

    Both are a folder that `edgekit export` wrote, what `find_model_file` takes besides, or a model
    (a name of `edgekit models`, a hub id or a folder), which runs in torch as the float model it
    is. `chunks` bounds how many chunks of `context` tokens are scored; `tokenizer` is a
    tokenizer.json, or the folder of one, to use for files instead of their own. Raises
    `EdgekitError` for a text that is too short, a context that does not fit, a reference with other
    tokens, and logits that are not finite.
    """
    return evaluate_each(
        [artifact],
        text,
        reference,
        context=context,
        chunks=chunks,
        threads=threads,
        tokenizer=tokenizer,
        progress=progress,
    )[0]


def evaluate_each(
    artifacts: Sequence[str],
    text: str,
    reference: str | None = None,
    *,
    context: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    threads: int | None = None,
    tokenizer: Path | None = None,
    progress: Steps | None = None,
) -> list[Evaluation]:
    """Do what `evaluate` does for several artifacts, with one run of the reference for all."""
    check_chunk_length(context)
    if not text:
        raise EdgekitError("the text is empty")
    with ExitStack() as stack:
        subjects = [_enter(stack, name, context, threads, tokenizer) for name in artifacts]
        base = None if reference is None else _enter(stack, reference, context, threads, tokenizer)
        texts = [tokenize(subject.tokenizer, text) for subject in subjects]
        if base is not None:
            _check_comparable(subjects, texts, base, tokenize(base.tokenizer, text))
        scores, sizes = _run(subjects, texts, base, context, chunks, progress or no_steps)
        return [
            Evaluation(
                name=subject.name,
                engine=subject.engine.name,
                engine_version=subject.engine.version,
                reference=None if base is None else base.name,
                reference_engine=None if base is None else base.engine.name,
                text_sha256=hashlib.sha256(text.encode()).hexdigest(),
                text_ids_sha256=hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest(),
                text_tokens=len(ids),
                context=context,
                chunks=size,
                tokens=len(one.nll),
                perplexity=perplexity(one.nll),
                bits_per_byte=_bits_per_byte(subject.tokenizer, ids, context, one.nll),
                divergence=divergence(one),
            )
            for subject, ids, one, size in zip(subjects, texts, scores, sizes, strict=True)
        ]


def tokenize(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return the ids of a whole text as llama.cpp's tools read a file."""
    return tokenizer.encode_plain(text.removesuffix("\n"))


def cut(tokens: Sequence[int], context: int, limit: int | None, bos: int | None) -> list[list[int]]:
    """Cut into chunks of `context` tokens that begin with `bos` where there is one."""
    count = len(tokens) // context
    if count == 0:
        raise EdgekitError(
            f"the text has {counted(len(tokens), 'token')}, but a chunk is {context}: give a "
            "longer text or a smaller `context`"
        )
    chunks = [
        list(tokens[start : start + context])
        for start in range(0, min(count, limit or count) * context, context)
    ]
    if bos is not None:
        for chunk in chunks:
            chunk[0] = bos
    return chunks


def _bits_per_byte(
    tokenizer: TextTokenizer, ids: Sequence[int], context: int, nll: Floats
) -> float | None:
    """Return the bits in which the model says a byte; None where the scored tokens have none."""
    stream, found = tokenizer.stream(), 0
    for start in range(0, len(nll) // _scored(context) * context, context):
        found += sum(
            len(stream.bytes_of(token)) for token in _targets(ids[start : start + context])
        )
    return float(nll.sum()) / math.log(2) / found if found else None


def _scored(context: int) -> int:
    """How many tokens of a chunk are scored."""
    return context - context // 2 - 1


def check_chunk_length(context: int) -> None:
    """Raise `EdgekitError` for chunks of so few tokens that none is left to score."""
    if context < LEAST_CHUNK:
        raise EdgekitError(f"`context` must be at least {LEAST_CHUNK}, not {context}")


def _enter(
    stack: ExitStack, name: str, context: int, threads: int | None, tokenizer: Path | None
) -> Subject:
    subject = open_subject(name, context, threads, tokenizer)
    stack.enter_context(subject.engine)
    if subject.engine.context < context:
        raise EdgekitError(
            f"{name}: holds {subject.engine.context} positions, fewer than the chunks' {context}: "
            "give a smaller `context`"
        )
    return subject


def _check_comparable(
    subjects: Sequence[Subject], texts: Sequence[list[int]], base: Subject, wanted: list[int]
) -> None:
    """Refuse a reference of another vocabulary: its rows would mean other tokens."""
    for subject, ids in zip(subjects, texts, strict=True):
        ours, theirs = subject.engine.vocab_size, base.engine.vocab_size
        if ours != theirs:
            raise EdgekitError(
                f"{subject.name} has a vocabulary of {ours}, the reference {base.name} of "
                f"{theirs}: they cannot be compared"
            )
        if ids != wanted:
            raise EdgekitError(
                f"{subject.name} and the reference {base.name} read the text as different tokens: "
                "they cannot be compared"
            )


def _run(
    subjects: Sequence[Subject],
    texts: Sequence[list[int]],
    base: Subject | None,
    context: int,
    limit: int | None,
    progress: Steps,
) -> tuple[list[Scores], list[int]]:
    """Score chunk after chunk on every subject; returns per subject its scores and chunks."""
    cuts = [
        cut(ids, context, limit, subject.tokenizer.bos_id if subject.tokenizer.adds_bos else None)
        for subject, ids in zip(subjects, texts, strict=True)
    ]
    most = max(map(len, cuts))
    scores: list[list[Scores]] = [[] for _ in subjects]
    progress(0, most, "")
    for index in range(most):
        expected = None if base is None else _logits(base, cuts[0][index])
        for subject, chunks, mine in zip(subjects, cuts, scores, strict=True):
            if index < len(chunks):
                chunk = chunks[index]
                logits = _logits(subject, chunk)
                mine.append(_checked(subject, score_rows(logits, _targets(chunk), expected)))
        progress(index + 1, most, ", ".join(_so_far(subjects, scores)))
    return [join(one) for one in scores], [len(one) for one in scores]


def _logits(subject: Subject, chunk: Sequence[int]) -> Any:  # noqa: ANN401
    """Return the rows that predict the targets; the last token predicts none of the chunk."""
    return subject.engine.score(chunk[:-1], len(chunk) // 2)


def _targets(chunk: Sequence[int]) -> Sequence[int]:
    return chunk[len(chunk) // 2 + 1 :]


def _checked(subject: Subject, scores: Scores) -> Scores:
    """Refuse logits that are not finite: every mean over them would be NaN."""
    values = scores.nll if scores.kld is None else scores.kld + scores.nll
    if not np.isfinite(values).all():
        raise EdgekitError(f"{subject.name}: its logits, or the reference's, are not finite")
    return scores


def _so_far(subjects: Sequence[Subject], scores: Sequence[Sequence[Scores]]) -> Iterator[str]:
    """Yield each subject's running figures; its name only where there are several."""
    for subject, mine in zip(subjects, scores, strict=True):
        known = join(mine)
        figures = f"PPL {perplexity(known.nll).value:.4f}"
        if known.kld is not None:
            figures += f" KLD {known.kld.mean():.5f}"
        yield figures if len(subjects) == 1 else f"{subject.name} {figures}"
