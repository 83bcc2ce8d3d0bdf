"""Perplexity and Kullback-Leibler divergence by the conventions of `llama-perplexity`.

Formulas: llama.cpp, tools/perplexity/perplexity.cpp (`perplexity`, `kl_divergence`). Everything is
computed in float64 from the logits. llama.cpp keeps the reference's log-probabilities in 16 bits,
none more than 16 nats below the greatest: its divergences carry a noise that these do not, and its
perplexity of the reference is too low where very improbable tokens came.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.metrics.logits import Floats, Logits, log_softmax, row_kld

FEWEST_FOR_AN_ERROR = 11
"""llama.cpp gives means of ten values and fewer no error; it prints them with 0."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the scored tokens and its standard error, None where they are too few for one."""

    value: float
    error: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return both."""
        return {"value": self.value, "error": self.error}

    def text(self, decimals: int) -> str:
        """Return the value, and its error where there is one."""
        error = "" if self.error is None else f" ± {self.error:.{decimals}f}"
        return f"{self.value:.{decimals}f}{error}"


@dataclass(frozen=True)
class Scores:
    """What one chunk says: one number per scored token, in nats but for `delta_p`.

    `nll` is the negative log-likelihood of the token that came. The others compare with the
    reference and are None without one: its `nll`, the divergence of the model's distribution from
    the reference's, the probability of the token less the reference's, equal most likely tokens.
    """

    nll: Floats
    nll_reference: Floats | None = None
    kld: Floats | None = None
    delta_p: Floats | None = None
    same_top: NDArray[np.bool_] | None = None


def score_rows(logits: Logits, targets: Sequence[int], reference: Logits | None = None) -> Scores:
    """Compare logits `[n, vocab]` with the `n` tokens that came, and with a reference's logits.

    One row at a time: in float64 it stays in the cache, where a chunk would be hundreds of MB.
    """
    count = len(targets)
    nll, nll_reference, kld = np.empty(count), np.empty(count), np.empty(count)
    for i, target in enumerate(targets):
        q = log_softmax(logits[i])
        nll[i] = -q[target]
        if reference is not None:
            p = log_softmax(reference[i])
            nll_reference[i] = -p[target]
            kld[i] = row_kld(p, q)
    if reference is None:
        return Scores(nll)
    return Scores(
        nll,
        nll_reference,
        kld,
        np.exp(-nll) - np.exp(-nll_reference),
        logits.argmax(-1) == reference.argmax(-1),
    )


def join(scores: Sequence[Scores]) -> Scores:
    """Return the scores of several chunks as one."""
    if scores[0].kld is None:
        return Scores(np.concatenate([one.nll for one in scores]))
    return Scores(*(np.concatenate(column) for column in zip(*map(_columns, scores), strict=True)))


def _columns(scores: Scores) -> tuple[Any, ...]:
    return scores.nll, scores.nll_reference, scores.kld, scores.delta_p, scores.same_top


def mean(values: Floats) -> Estimate:
    """Return the mean and its error, the deviation over `sqrt(n - 1)`."""
    count = len(values)
    if count < FEWEST_FOR_AN_ERROR:
        return Estimate(float(values.mean()), None)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count - 1))


def perplexity(nll: Floats) -> Estimate:
    """Return `exp(mean nll)`; its error is that of the mean times it."""
    log = mean(nll)
    value = math.exp(min(log.value, 700.0))
    return Estimate(value, None if log.error is None else value * log.error)


@dataclass(frozen=True)
class Divergence:
    """How far a model strays from its reference; shares and `delta_p` are of 1, not per cent.

    `log_ratio` is ln(PPL / PPL of the reference), whose error knows that both saw the same text;
    `kld_at` and `delta_p_at` are percentiles by their per cent, 50 the median, 0 and 100 the ends.
    """

    reference_perplexity: Estimate
    log_ratio: Estimate
    correlation: float | None
    kld: Estimate
    kld_at: dict[str, float]
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_at: dict[str, float]
    same_top: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "reference_perplexity": self.reference_perplexity.to_dict(),
            "ln_ppl_ratio": self.log_ratio.to_dict(),
            "ln_ppl_correlation": self.correlation,
            "kld": {**self.kld.to_dict(), "percentiles": self.kld_at},
            "delta_p": {
                **self.delta_p.to_dict(),
                "rms": self.delta_p_rms.to_dict(),
                "percentiles": self.delta_p_at,
            },
            "same_top": self.same_top.to_dict(),
        }


KLD_PERCENTS = ("0", "0.1", "1", "5", "10", "50", "90", "95", "99", "99.9", "100")
DELTA_P_PERCENTS = ("0", "0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9", "100")


def divergence(scores: Scores) -> Divergence | None:
    """Return the statistics of scores with a reference; None without one."""
    if (
        scores.nll_reference is None
        or scores.kld is None
        or scores.delta_p is None
        or scores.same_top is None
    ):
        return None
    return Divergence(
        reference_perplexity=perplexity(scores.nll_reference),
        log_ratio=mean(scores.nll - scores.nll_reference),
        correlation=_correlation(scores.nll, scores.nll_reference),
        kld=mean(scores.kld),
        kld_at=_percentiles(scores.kld, KLD_PERCENTS),
        delta_p=mean(scores.delta_p),
        delta_p_rms=_root_mean_square(scores.delta_p),
        delta_p_at=_percentiles(scores.delta_p, DELTA_P_PERCENTS),
        same_top=_share(scores.same_top),
    )


def _correlation(one: Floats, other: Floats) -> float | None:
    """Return Pearson's correlation; None where one of them does not vary."""
    if one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _percentiles(values: Floats, percents: Iterable[str]) -> dict[str, float]:
    """Return percentiles by linear interpolation between order statistics."""
    names = list(percents)
    found = np.percentile(values, [float(name) for name in names])
    return dict(zip(names, map(float, found), strict=True))


def _root_mean_square(values: Floats) -> Estimate:
    """Return sqrt(mean v^2), whose error is that of the mean over twice the root."""
    square = mean(values**2)
    root = math.sqrt(square.value)
    if square.error is None:
        return Estimate(root, None)
    return Estimate(root, square.error / (2 * root) if root else 0.0)


def _share(agree: NDArray[np.bool_]) -> Estimate:
    """Return the share of True; the error is the binomial one."""
    share, count = float(agree.mean()), len(agree)
    if count < FEWEST_FOR_AN_ERROR:
        return Estimate(share, None)
    return Estimate(share, math.sqrt(share * (1 - share) / (count - 1)))
