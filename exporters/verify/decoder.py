"""Does the exported file, run in its engine, compute what the model computes?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from edgekit.common.plural import counted
from edgekit.common.tables import markdown_table
from edgekit.errors import EdgekitError, VerificationError
from edgekit.metrics.logits import Logits, kld, top1
from edgekit.models.decoder import Decoder

MAX_KLD = 0.003
"""Most nats that the engine's distribution may stray, on average, from the eager quantized model.

Both multiply the same codes and round activations alike, but sum in another order: rounding that
falls the other way moves logits a little. A dropped scale or stale state moves them by whole nats.
The same bound holds between one prompt in one piece and in chunks or token by token, which an
engine also sums in other orders; the same prompt after a reset must give identical logits.
"""
SHARE_OF_QUANTIZATION = 0.5
"""Where quantization itself moves the model further than that, the bound is this share of it.

A model of random weights amplifies every rounding: int8 alone moves an LFM2-350M by 0.02 nats.
"""

TIMES = 2.0
"""How much further an engine may stray than the quantized model, decided otherwise at ties, does.

A code of an activation that falls the other way moves what later layers round: in a deep model the
roundings of two honest engines have little in common. How far that moves the logits is a property
of the model, which it shows itself. It is measured only where the bounds above do not suffice.
"""

MAX_FORMAT_COST = 2.0
"""Most nats that a format of the engine's own may move the model.

Such a file is held against its own weights, so nothing else would tell a quantizer's noise from
them. Q4_0 moves a model of random weights by 0.5 nats, an unrelated one strays by 8 and more.
"""

LONGEST_ROW = 16
"""Tokens of the longest row of a padded batch: enough for any padding to show."""


class Engine(Protocol):
    """What verification needs of an engine."""

    context: int
    longest_chunk: int

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        """Process tokens, `chunk` in one forward pass; logits of the last."""
        ...

    def decode(self, token: int) -> Logits:
        """Process one token; its logits."""
        ...

    def reset(self) -> None:
        """Start a new sequence."""
        ...


@runtime_checkable
class TakesBatches(Protocol):
    """An engine whose file takes several rows of unequal length at once."""

    def padded_logits(
        self, rows: Sequence[Sequence[int]], following: Sequence[int], in_front: bool
    ) -> Logits:
        """Run rows, then single tokens after each; logits `[1 + following, rows, vocab]`.

        Padding is before a row's tokens or behind them.
        """
        ...


@dataclass(frozen=True)
class Reference:
    """Logits `[tokens, vocab]` of every position: of the float model and of the eager codes."""

    tokens: list[int]
    float_logits: Logits
    quantized_logits: Logits


@dataclass(frozen=True)
class Verification:
    """What was compared. KLD are means in nats over the positions, top-1 are shares of them.

    That of a padded batch is the largest, None where the engine takes no batches. That of the
    quantized model from itself, ties decided otherwise, is None where nobody needed to know it.
    """

    tokens: int
    positions: int
    kld_engine_vs_quantized: float
    kld_engine_vs_float: float
    kld_quantized_vs_float: float
    top1_engine_vs_quantized: float
    top1_engine_vs_float: float
    max_logit_difference: float
    kld_chunked_vs_whole_prefill: float
    kld_decode_vs_prefill_at_end: float
    second_prompt_identical: bool
    kld_padded_batch_vs_alone: float | None
    lengths: list[int]
    kld_ties_decided_otherwise: float | None = None

    @property
    def max_kld(self) -> float:
        """The bound, in nats, that these figures were held to."""
        return max(
            MAX_KLD,
            SHARE_OF_QUANTIZATION * self.kld_quantized_vs_float,
            TIMES * (self.kld_ties_decided_otherwise or 0.0),
        )

    @property
    def strays(self) -> dict[str, float]:
        """The figures that the bound is for, in nats, by what strays from what."""
        return {
            "the file against the quantized model": self.kld_engine_vs_quantized,
            "prefill in chunks against prefill in one piece": self.kld_chunked_vs_whole_prefill,
            "decode against prefill at the context's end": self.kld_decode_vs_prefill_at_end,
            "rows in a padded batch against each alone": self.kld_padded_batch_vs_alone or 0.0,
        }

    @property
    def within_bound(self) -> bool:
        """Whether all of them are; NaN is not."""
        return all(found <= self.max_kld for found in self.strays.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that there are and their bound, for the manifest."""
        figures = {name: value for name, value in asdict(self).items() if value is not None}
        return {"verified": True, "max_kld": self.max_kld, **figures}


def reference(tokens: list[int], float_model: Decoder, quantized_model: Decoder) -> Reference:
    """Run both eager models over the tokens, one matrix in float memory at a time."""
    return Reference(
        tokens, eager_logits(float_model, tokens), eager_logits(quantized_model, tokens)
    )


def eager_logits(model: Decoder, tokens: list[int]) -> Logits:
    """Return the logits `[tokens, vocab]` of every position."""
    with torch.inference_mode():
        found: Logits = model.all_logits(
            torch.tensor([tokens]), torch.zeros(1, dtype=torch.long)
        ).numpy()
    return found


def check_format_cost(expected: Reference) -> None:
    """VerificationError where the weights in a file are not the model's at all."""
    cost = kld(expected.float_logits, expected.quantized_logits)
    if not cost <= MAX_FORMAT_COST:  # also true for NaN
        raise VerificationError(
            f"verification: the quantized weights are {cost:.4g} nats from the model's, the bound "
            f"is {MAX_FORMAT_COST:g}"
        )


def verify(
    engine: Engine,
    expected: Reference,
    longest: int,
    otherwise: Callable[[], Logits] | None = None,
) -> Verification:
    """Compare; VerificationError where a bound is exceeded or a state is stale.

    Prompts of up to `longest` tokens are run, and more than the context holds must be refused.
    `otherwise` computes the quantized logits of every position anew, ties decided otherwise
    (`edgekit.models.activations.otherwise`): the bound of a model that amplifies roundings.
    """
    tokens = expected.tokens
    half = max(1, len(tokens) // 2)
    rows = [engine.prefill(tokens[:half])]
    rows += [engine.decode(token) for token in tokens[half:]]
    actual = np.stack(rows)
    if not np.isfinite(actual).all():
        raise VerificationError("verification: the exported file's logits are not finite")
    quantized = expected.quantized_logits[half - 1 :]
    exact = expected.float_logits[half - 1 :]

    chunked, identical = _repeat(engine, tokens[:half], actual[0])
    lengths, at_end = _check_lengths(engine, tokens, min(longest, engine.context))
    result = Verification(
        tokens=len(tokens),
        positions=len(rows),
        kld_engine_vs_quantized=kld(quantized, actual),
        kld_engine_vs_float=kld(exact, actual),
        kld_quantized_vs_float=kld(exact, quantized),
        top1_engine_vs_quantized=top1(quantized, actual),
        top1_engine_vs_float=top1(exact, actual),
        max_logit_difference=float(np.abs(quantized - actual).max()),
        kld_chunked_vs_whole_prefill=chunked,
        kld_decode_vs_prefill_at_end=at_end,
        second_prompt_identical=identical,
        kld_padded_batch_vs_alone=_padded_batch(engine, tokens),
        lengths=lengths,
    )
    if otherwise is not None and not result.within_bound:
        strayed = kld(quantized, otherwise()[half - 1 :])
        result = replace(result, kld_ties_decided_otherwise=strayed)
    _check_bounds(result)
    return result


def figures_text(found: Mapping[str, Any]) -> str:
    """Return the figures of a verification, as `Verification.to_dict` gives them, as a table."""
    rows = [
        [
            f"engine against {name}",
            f"{found[f'kld_engine_vs_{key}']:.6f}",
            f"{found[f'top1_engine_vs_{key}']:.1%}",
        ]
        for name, key in (("quantized model", "quantized"), ("float model", "float"))
    ]
    if "kld_ties_decided_otherwise" in found:
        strayed = f"{found['kld_ties_decided_otherwise']:.6f}"
        rows.append(["quantized model, ties decided otherwise", strayed, "-"])
    table = markdown_table(["", "mean KLD", "same top-1"], rows)
    text = (
        f"verified over {counted(found['positions'], 'position')} of "
        f"{counted(found['tokens'], 'token')}\n{table}"
    )
    if "tokenizer" in found:
        texts, tokens = found["tokenizer"]["texts"], found["tokenizer"]["tokens"]
        corpus = f"{counted(texts, 'text')} of {counted(tokens, 'token')}"
        text += f"\ntokenizer: the model's own ids in {corpus}"
    return text


def _repeat(engine: Engine, tokens: list[int], first: Logits) -> tuple[float, bool]:
    """Prefill the same tokens again whole, then in uneven chunks, each after a reset."""
    engine.reset()
    whole = engine.prefill(tokens)
    engine.reset()
    cut = max(1, len(tokens) // 3)
    chunked = whole
    for chunk in (tokens[:1], tokens[1:cut], tokens[cut:]):
        if chunk:
            chunked = engine.prefill(chunk)
    return kld(whole, chunked), bool(np.array_equal(first, whole))


def _check_lengths(engine: Engine, tokens: list[int], longest: int) -> tuple[list[int], float]:
    """Run prompts of 1, longest - 1 and longest tokens; one more must be refused, none may break.

    The longest runs in one pass, as ExecuTorch's own runner would have it. Returns the lengths
    that ran and how far a last token decoded after chunks strays from it.
    """
    text = (tokens * (engine.context // len(tokens) + 1))[: engine.context]
    engine.reset()
    engine.prefill(text[:1])
    engine.reset()
    full = engine.prefill(text[:longest], chunk=engine.longest_chunk)
    if longest == engine.context:
        _must_refuse(engine, text[:1])
    engine.reset()
    _must_refuse(engine, [*text, text[0]])
    engine.reset()
    difference = 0.0
    if longest > 1:
        engine.prefill(text[: longest - 1])
        difference = kld(full, engine.decode(text[longest - 1]))
        engine.reset()
    return sorted({1, longest - 1 or 1, longest}), difference


def _padded_batch(engine: Engine, tokens: list[int]) -> float | None:
    """Run rows of unequal length at once, padded in front and behind, and each of them alone.

    Returns the largest divergence of a position from what it is alone: a wrong state shows in the
    first tokens after it.
    """
    longest = min(LONGEST_ROW, len(tokens), engine.context - len(tokens[:2]))
    if not isinstance(engine, TakesBatches) or longest < 2:
        return None
    rows = [tokens[:longest], tokens[longest // 2 : longest], tokens[:1]]
    following = tokens[:2]
    batches = [engine.padded_logits(rows, following, in_front) for in_front in (True, False)]
    found = []
    for index, row in enumerate(rows):
        engine.reset()
        for alone, *both in zip(
            [engine.prefill(row), *map(engine.decode, following)], *batches, strict=True
        ):
            found += [kld(alone, batch[index]) for batch in both]
    engine.reset()
    return float(np.max(found))  # NaN where one is


def _must_refuse(engine: Engine, tokens: list[int]) -> None:
    try:
        engine.prefill(tokens)
    except EdgekitError:
        return
    raise VerificationError(f"verification: more than {engine.context} positions were accepted")


def _check_bounds(result: Verification) -> None:
    for what, found in result.strays.items():
        if not found <= result.max_kld:  # also true for NaN
            raise VerificationError(
                f"verification: {what}: {found:.4g} nats, the bound is {result.max_kld:.4g}"
            )
    if not result.second_prompt_identical:
        raise VerificationError("verification: the same prompt after a reset gives other logits")
