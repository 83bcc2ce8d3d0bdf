"""Sampling, held against transformers' logits processors as an independent implementation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgekit.errors import EdgekitError
from edgekit.runtime.generation import sampling
from edgekit.runtime.generation.sampling import Sampler, SamplingParams, penalize, survivors

OFF = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, repeat_penalty=1, seed=0)


def random_logits(seed: int, vocab: int = 500, spread: float = 3) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=vocab) * spread).astype(np.float32)


def kept_by(logits: NDArray[np.float32], *processors: LogitsProcessor) -> list[int]:
    scores = torch.from_numpy(logits)[None]
    for processor in processors:
        scores = processor(torch.zeros((1, 1), dtype=torch.int64), scores)
    return torch.isfinite(scores[0]).nonzero().flatten().tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 40, 499, 500, 10_000])
def test_top_k_keeps_what_transformers_keeps(seed: int, k: int) -> None:
    logits = random_logits(seed)
    assert sampling.top_k(logits, k).tolist() == kept_by(logits, TopKLogitsWarper(k))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.01, 1, 8])
def test_top_p_keeps_what_transformers_keeps(seed: int, p: float, spread: float) -> None:
    # 4,000 entries that are nearly equal make the search for the nucleus grow more than once.
    logits = random_logits(seed, vocab=4000, spread=spread)
    ours, theirs = sampling.top_p(logits, p).tolist(), kept_by(logits, TopPLogitsWarper(p))
    # transformers sums float32 probabilities from the small end: the border may shift by rounding.
    assert abs(len(ours) - len(theirs)) <= max(1, len(theirs) // 1000)
    assert set(ours) <= set(theirs) or set(theirs) <= set(ours)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.001, 0.05, 0.3, 1])
def test_min_p_keeps_what_transformers_keeps(seed: int, p: float) -> None:
    logits = random_logits(seed)
    assert sampling.min_p(logits, p).tolist() == kept_by(logits, MinPLogitsWarper(p))


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.05, 2.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits, seen = random_logits(7), [3, 5, 3, 499]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]), torch.from_numpy(logits.copy())[None]
    )
    before = logits.copy()
    np.testing.assert_allclose(penalize(logits, set(seen), penalty), expected[0], rtol=1e-6)
    assert (logits == before).all(), "the engine's array is not ours to change"


def test_filters_run_in_the_order_of_llama_cpp() -> None:
    for seed in range(20):
        logits = random_logits(seed, spread=1)
        params = SamplingParams(temperature=0.3, top_k=50, top_p=0.7, min_p=0.2)
        chain = (TopKLogitsWarper(50), TopPLogitsWarper(0.7), MinPLogitsWarper(0.2))
        assert survivors(logits, params).tolist() == kept_by(logits, *chain)


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    # Of all the mass 0.5 needs two entries; of what top-k 2 leaves (4/7, 3/7), one.
    assert survivors(logits, SamplingParams(top_k=2, top_p=0.5, min_p=0)).tolist() == [0]
    assert survivors(logits, SamplingParams(top_k=0, top_p=0.5, min_p=0)).tolist() == [0, 1]


def test_draws_follow_the_softmax() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    sampler = Sampler(OFF)
    logits = np.log(probabilities).astype(np.float32)
    counts = np.bincount([sampler.sample(logits) for _ in range(8000)], minlength=4)
    # Standard deviation of a count is below 45; 5 of them.
    np.testing.assert_allclose(counts, probabilities * 8000, atol=225)


def test_temperature_sharpens() -> None:
    logits = np.log(np.array([0.6, 0.4], dtype=np.float32))
    cold = Sampler(SamplingParams(temperature=0.1, min_p=0, repeat_penalty=1, seed=1))
    share = np.mean([cold.sample(logits) == 0 for _ in range(2000)])
    assert share == pytest.approx(0.6**10 / (0.6**10 + 0.4**10), abs=0.02)


def test_same_seed_same_tokens() -> None:
    logits = [random_logits(i, spread=0.5) for i in range(30)]

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, min_p=0, seed=seed))
        return [sampler.sample(row) for row in logits]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_a_drawn_seed_reproduces_the_run() -> None:
    logits = random_logits(1, spread=0.1)
    first = Sampler(SamplingParams(temperature=1, min_p=0))
    drawn = [first.sample(logits) for _ in range(20)]
    again = Sampler(SamplingParams(temperature=1, min_p=0, seed=first.seed))
    assert [again.sample(logits) for _ in range(20)] == drawn


def test_temperature_zero_takes_the_largest_and_needs_no_seed() -> None:
    logits = random_logits(2)
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=1))
    assert [sampler.sample(logits) for _ in range(5)] == [int(logits.argmax())] * 5


def test_the_penalty_sees_the_prompt_and_the_window_only() -> None:
    logits = np.array([2.0, 1.9, 0.0], dtype=np.float32)
    greedy = SamplingParams(temperature=0, repeat_penalty=1.2, repeat_last_n=2)
    assert Sampler(greedy).sample(logits) == 0
    assert Sampler(greedy, context=[0]).sample(logits) == 1
    assert Sampler(greedy, context=[0, 2, 2]).sample(logits) == 0, "left the window of two"
    off = SamplingParams(temperature=0, repeat_penalty=1.2, repeat_last_n=0)
    assert Sampler(off, context=[0]).sample(logits) == 0


def test_generated_tokens_enter_the_window() -> None:
    logits = np.array([2.0, 1.9, 1.8], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=1.2))
    assert [sampler.sample(logits) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("bad", "words"),
    [(math.nan, "1 NaN"), (math.inf, "largest logit of inf")],
)
def test_logits_that_are_no_distribution_are_refused(bad: float, words: str) -> None:
    logits = random_logits(0)
    logits[17] = bad
    for temperature in (0, 1):
        with pytest.raises(EdgekitError, match=words):
            Sampler(SamplingParams(temperature=temperature)).sample(logits)


def test_masked_logits_are_never_drawn() -> None:
    logits = np.full(64, -np.inf, dtype=np.float32)
    with pytest.raises(EdgekitError, match="largest logit of -inf"):
        Sampler(OFF).sample(logits)
    logits[[5, 9]] = 0
    sampler = Sampler(OFF)
    assert {sampler.sample(logits) for _ in range(100)} == {5, 9}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or more, not -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_p": 0}, "top-p must be above 0"),
        ({"top_p": 1.01}, "top-p"),
        ({"min_p": 1.5}, "min-p must be 0 .off. to 1, not 1.5"),
        ({"repeat_penalty": 0}, "repeat-penalty must be 0.01 to 100"),
        ({"repeat_last_n": -1}, "repeat-last-n"),
        ({"seed": -1}, "seed must be 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float], words: str) -> None:
    with pytest.raises(EdgekitError, match=words):
        SamplingParams(**setting)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    temperature=st.floats(0, 50) | st.just(5e-324),
    k=st.integers(0, 70),
    p=st.floats(1e-6, 1),
    least=st.floats(0, 1),
    penalty=st.floats(0.1, 10),
)
def test_any_setting_draws_a_survivor(
    logits: list[float], temperature: float, k: int, p: float, least: float, penalty: float
) -> None:
    row = np.array(logits, dtype=np.float32)
    params = SamplingParams(temperature, k, p, least, penalty, seed=0)
    sampler = Sampler(params, context=[0])
    penalized = penalize(row, {0}, penalty)
    token = sampler.sample(row)
    if temperature == 0:
        assert penalized[token] == penalized.max()
    else:
        assert token in survivors(penalized, params)
        assert int(penalized.argmax()) in survivors(penalized, params)
