"""What each step of quantization gained: divergence from the float model on text that is held out.

Scored as `edgekit eval` scores (the second half of each chunk), on the eager model with activations
as they are: what is compared is weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgekit.common.progress import Steps
from edgekit.common.tables import markdown_table
from edgekit.errors import EdgekitError
from edgekit.metrics.divergence import Estimate, divergence, join, perplexity, score_rows
from edgekit.metrics.logits import Logits
from edgekit.models.activations import unrounded
from edgekit.models.config import ModelConfig
from edgekit.models.eager import build_eager
from edgekit.models.weights import ReadWeight
from edgekit.quantize.tensor import Weight


@dataclass(frozen=True)
class Gain:
    """The quality of one step's weights: both figures are over the same tokens for all steps."""

    step: str
    kld: Estimate
    perplexity: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "step": self.step,
            "kld": self.kld.to_dict(),
            "perplexity": self.perplexity.to_dict(),
        }


@dataclass(frozen=True)
class Gains:
    """Steps in the order in which each builds on the one before."""

    tokens: int
    reference_perplexity: Estimate
    steps: tuple[Gain, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "held_out_tokens": self.tokens,
            "reference_perplexity": self.reference_perplexity.to_dict(),
            "steps": [step.to_dict() for step in self.steps],
        }

    def text(self) -> str:
        """Return the table, each step's divergence also as a multiple of those before."""
        first = self.steps[0].kld.value
        rows, before = [], None
        for step in self.steps:
            kld = step.kld.value
            rows.append(
                [
                    step.step,
                    step.kld.text(5),
                    _times(kld, first),
                    "-" if before is None else _times(kld, before),
                    f"{step.perplexity.value:.4f}",
                ]
            )
            before = kld
        headers = ["", "mean KLD", f"of {self.steps[0].step}", "of the step before", "perplexity"]
        return (
            f"on {self.tokens:,} held-out tokens, whose perplexity is "
            f"{self.reference_perplexity.value:.4f} in float\n"
            f"{markdown_table(headers, rows, align='lrrrr')}"
        )


def _times(value: float, of: float) -> str:
    return f"{value / of:.2f}x" if of > 0 else "-"


def measure(
    config: ModelConfig,
    read: ReadWeight,
    steps: Mapping[str, Callable[[], Mapping[str, Weight]]],
    chunks: Sequence[Sequence[int]],
    progress: Steps,
) -> Gains:
    """Score each step's weights over chunks of token ids; one step's are in memory at a time.

    `read` gives the float weights. EdgekitError where logits are not finite.
    """
    total = len(chunks) * (len(steps) + 1)
    label = "measuring on held-out text"

    def run(weights: ReadWeight, done: int) -> list[Logits]:
        model = build_eager(config, weights, max(map(len, chunks)), unrounded)
        found = []
        for place, chunk in enumerate(chunks):
            progress(done + place, total, label)
            with torch.inference_mode():
                logits = model.all_logits(torch.tensor([list(chunk[:-1])]), torch.zeros(1).long())
            # A copy: the view would keep the rows of the first half in memory.
            found.append(logits[len(chunk) // 2 :].clone().numpy())
        return found

    exact = run(read, 0)
    gains = []
    reference: Estimate | None = None
    for number, (name, weights) in enumerate(steps.items(), start=1):
        scores = join(
            [
                score_rows(logits, chunk[len(chunk) // 2 + 1 :], expected)
                for logits, expected, chunk in zip(
                    run(weights().__getitem__, number * len(chunks)), exact, chunks, strict=True
                )
            ]
        )
        found = divergence(scores)
        assert found is not None
        if not found.kld.value < float("inf"):  # also true for NaN
            raise EdgekitError(f"{name}: its logits, or the float model's, are not finite")
        reference = found.reference_perplexity
        gains.append(Gain(name, found.kld, perplexity(scores.nll)))
    assert reference is not None
    progress(total, total, label)
    return Gains(len(scores.nll), reference, tuple(gains))
