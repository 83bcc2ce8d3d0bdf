"""Perplexity and divergence against torch, and against llama.cpp's running sums written anew."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgekit.metrics.divergence import (
    Divergence,
    Scores,
    divergence,
    join,
    mean,
    perplexity,
    score_rows,
)

TOKENS, VOCAB = 300, 97


def logits(seed: int, spread: float = 3.0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((TOKENS, VOCAB)) * spread
    return drawn.astype(np.float32)


TARGETS = np.random.default_rng(9).integers(0, VOCAB, TOKENS).tolist()
REFERENCE = logits(0)
MODEL = REFERENCE + logits(1, 0.1)


@pytest.fixture(scope="module")
def scores() -> Scores:
    return score_rows(MODEL, TARGETS, REFERENCE)


def found(scores: Scores) -> Divergence:
    result = divergence(scores)
    assert result is not None
    return result


def test_every_token_scores_as_torch_says(scores: Scores) -> None:
    q = torch.from_numpy(MODEL).double().log_softmax(-1)
    p = torch.from_numpy(REFERENCE).double().log_softmax(-1)
    targets = torch.tensor(TARGETS)
    nll = nn.functional.nll_loss(q, targets, reduction="none")
    kld = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    right = torch.arange(TOKENS), targets
    assert scores.kld is not None and scores.delta_p is not None and scores.same_top is not None
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-12)
    np.testing.assert_allclose(scores.kld, kld, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(scores.delta_p, q.exp()[right] - p.exp()[right], atol=1e-14)
    assert scores.same_top.tolist() == (q.argmax(-1) == p.argmax(-1)).tolist()


def test_perplexity_is_the_exponential_of_torchs_loss(scores: Scores) -> None:
    loss = nn.functional.cross_entropy(torch.from_numpy(MODEL).double(), torch.tensor(TARGETS))
    assert perplexity(scores.nll).value == pytest.approx(math.exp(loss), rel=1e-12)


def sums(values: list[float]) -> tuple[float, float]:
    """llama.cpp's `mean_and_uncertainty`, from a sum and a sum of squares."""
    n = len(values)
    average = sum(values) / n
    variance = sum(v * v for v in values) / n - average * average
    return average, math.sqrt(variance / (n - 1))


def test_means_and_errors_are_llama_cpps(scores: Scores) -> None:
    assert scores.nll_reference is not None and scores.kld is not None
    assert scores.delta_p is not None
    result, n = found(scores), TOKENS
    a, b = scores.nll.tolist(), scores.nll_reference.tolist()
    (log_q, error_q), (log_p, error_p) = sums(a), sums(b)
    covariance = (sum(x * y for x, y in zip(a, b, strict=True)) / n - sum(a) / n * sum(b) / n) / (
        n - 1
    )
    ratio_error = math.sqrt(error_q**2 + error_p**2 - 2 * covariance)
    mse, mse_error = sums([d * d for d in scores.delta_p.tolist()])
    share = sum(map(bool, scores.same_top if scores.same_top is not None else ())) / n
    wanted = {
        "reference_perplexity": (math.exp(log_p), math.exp(log_p) * error_p),
        "log_ratio": (log_q - log_p, ratio_error),
        "kld": sums(scores.kld.tolist()),
        "delta_p": sums(scores.delta_p.tolist()),
        "delta_p_rms": (math.sqrt(mse), 0.5 / math.sqrt(mse) * mse_error),
        "same_top": (share, math.sqrt(share * (1 - share) / (n - 1))),
    }
    for name, (value, error) in wanted.items():
        estimate = getattr(result, name)
        assert estimate.value == pytest.approx(value, rel=1e-9), name
        assert estimate.error == pytest.approx(error, rel=1e-6), name
    assert result.correlation == pytest.approx(covariance / (error_q * error_p), rel=1e-9)


def test_percentiles_are_llama_cpps(scores: Scores) -> None:
    assert scores.kld is not None
    ordered = sorted(scores.kld.tolist())

    def percentile(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        part = place - low
        return float((1 - part) * ordered[low] + part * ordered[min(low + 1, len(ordered) - 1)])

    at = found(scores).kld_at
    assert at["100"] == ordered[-1]
    assert at["0"] == ordered[0]
    for name in ("50", "99", "99.9"):
        assert at[name] == pytest.approx(percentile(float(name) / 100), rel=1e-12)


def test_a_model_does_not_stray_from_itself() -> None:
    result = found(score_rows(MODEL, TARGETS, MODEL))
    assert result.kld_at["100"] == 0
    assert (result.log_ratio.value, result.log_ratio.error) == (0, 0)
    assert (result.delta_p_rms.value, result.delta_p_rms.error) == (0, 0)
    assert (result.same_top.value, result.same_top.error) == (1, 0)


def test_a_shift_of_all_logits_changes_nothing(scores: Scores) -> None:
    shifted = score_rows(MODEL + np.float32(64), TARGETS, REFERENCE)
    assert shifted.kld is not None and scores.kld is not None
    np.testing.assert_allclose(shifted.kld, scores.kld, atol=1e-5)


def test_great_logits_do_not_overflow() -> None:
    rows = np.zeros((1, 4), np.float32)
    rows[0, 1] = 3e38
    assert score_rows(rows, [1]).nll.tolist() == [0.0]
    assert perplexity(score_rows(rows, [0]).nll).value < math.inf


def test_chunks_join_to_the_whole(scores: Scores) -> None:
    parts = [
        score_rows(MODEL[part], TARGETS[part], REFERENCE[part])
        for part in (slice(0, 100), slice(100, TOKENS))
    ]
    assert found(join(parts)) == found(scores)
    alone = join([Scores(part.nll) for part in parts])
    assert [f.name for f in fields(alone) if getattr(alone, f.name) is not None] == ["nll"]
    assert divergence(alone) is None


def test_few_values_have_no_error() -> None:
    """llama.cpp gives an error from eleven values on."""
    values = np.arange(11.0)
    assert mean(values[:10]).error is None
    assert mean(values).error == pytest.approx(values.std() / math.sqrt(10))
