"""Verification accepts the real file and can fail: each defect that it is for is tried on it."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.errors import VerificationError
from edgekit.exporters.verify.decoder import (
    MAX_KLD,
    Reference,
    check_format_cost,
    figures_text,
    reference,
    verify,
)
from edgekit.metrics.logits import Logits, kld, top1
from edgekit.models.activations import otherwise, per_token
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.recipe import preset, resolve
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.runtime.engines.executorch.decoder import ExecutorchEngine

TEXT = (
    "Once upon a time there was a little girl who had a red ball. She played with it in the park."
)


class Defective:
    """The real engine with one thing wrong."""

    def __init__(self, engine: ExecutorchEngine) -> None:
        self.engine = engine
        self.context = engine.context
        self.longest_chunk = engine.longest_chunk

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        return self.engine.prefill(tokens, chunk)

    def decode(self, token: int) -> Logits:
        return self.prefill([token])

    def reset(self) -> None:
        self.engine.reset()


class DroppedScale(Defective):
    """The head's scales are lost for some rows, as in a delegate that ignores them."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        logits = super().prefill(tokens, chunk)
        logits[::16] *= 0.5
        return logits


class WrongAfterPrefill(Defective):
    """Single tokens after a prefill go wrong, whole prompts do not."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        logits = super().prefill(tokens, chunk)
        return np.roll(logits, 1) if len(tokens) == 1 else logits


class WrongInChunks(Defective):
    """A prompt that continues another goes wrong."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        continues = self.engine.position > 0 and len(tokens) > 1
        logits = super().prefill(tokens, chunk)
        return np.roll(logits, 1) if continues else logits


class WrongAtTheEnd(Defective):
    """A single token at the last position sees a mask that is one short."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        logits = super().prefill(tokens, chunk)
        last = self.engine.position == self.context and len(tokens) == 1
        return np.roll(logits, 1) if last else logits


class StaleState(Defective):
    """A reset rewinds the position but something of the sequence before it stays."""

    def __init__(self, engine: ExecutorchEngine) -> None:
        super().__init__(engine)
        self.resets = 0

    def reset(self) -> None:
        super().reset()
        self.resets += 1

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        logits = super().prefill(tokens, chunk)
        logits[0] += np.float32(1e-3 * min(self.resets, 1))
        return logits


class TakesOneTooMany(Defective):
    """Past the context it writes over the last position instead of refusing."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        room = self.context - self.engine.position
        if len(tokens) > room:
            return np.zeros(self.engine.vocab_size, np.float32)
        return super().prefill(tokens, chunk)


class NotFinite(Defective):
    """One logit overflows."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        logits = super().prefill(tokens, chunk)
        logits[5] = np.inf
        return logits


@pytest.fixture(scope="module")
def expected() -> Reference:
    source = resolve_model("lfm2-tiny")
    assert source.folder is not None
    tokens = Tokenizer.load(source.folder).encode(TEXT)
    shapes, tied = source.config.tied_shapes()
    rows = resolve(preset("int8"), shapes, tied)
    weights = dict(quantize_tensors(rows, source.checkpoint.tensor))
    read = float_reader(source.config, source.checkpoint)
    return reference(
        tokens,
        build_eager(source.config, read, len(tokens)),
        build_eager(source.config, weights.__getitem__, len(tokens)),
    )


@pytest.fixture
def engine(tiny_artifact: Path) -> Iterator[ExecutorchEngine]:
    with ExecutorchEngine(tiny_artifact / "model.pte", threads=1) as engine:
        yield engine


def test_the_real_file_passes(engine: ExecutorchEngine, expected: Reference) -> None:
    result = verify(engine, expected, 4096)
    assert result.tokens == len(expected.tokens)
    assert 0 <= result.kld_engine_vs_quantized <= MAX_KLD
    assert result.top1_engine_vs_quantized > 0.9
    assert result.kld_engine_vs_float < 0.01
    assert result.second_prompt_identical
    assert result.lengths == [1, engine.context - 1, engine.context]
    facts = result.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["max_kld"] == MAX_KLD


def test_a_harmless_wrapper_passes(engine: ExecutorchEngine, expected: Reference) -> None:
    """What fails below fails for the defect, not for being wrapped."""
    verify(Defective(engine), expected, 4096)


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (DroppedScale, "the file against the quantized model"),
        (WrongAfterPrefill, "the file against the quantized model"),
        (WrongInChunks, "prefill in chunks against prefill in one piece"),
        (WrongAtTheEnd, "decode against prefill at the context's end"),
        (StaleState, "the same prompt after a reset gives other logits"),
        (TakesOneTooMany, "more than 512 positions were accepted"),
        (NotFinite, "not finite"),
    ],
)
def test_a_defect_is_found(
    engine: ExecutorchEngine,
    expected: Reference,
    defect: Callable[[ExecutorchEngine], Defective],
    words: str,
) -> None:
    with pytest.raises(VerificationError, match=words) as raised:
        verify(defect(engine), expected, 4096)
    assert raised.value.exit_status == 1
    assert "\n" not in str(raised.value)


def test_another_models_logits_are_found(engine: ExecutorchEngine, expected: Reference) -> None:
    other = replace(expected, quantized_logits=np.roll(expected.quantized_logits, 1, axis=0))
    with pytest.raises(VerificationError, match="the file against the quantized model"):
        verify(engine, other, 4096)


class Amplifies(Defective):
    """An engine whose roundings fell otherwise, in a model that amplifies them."""

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        return strayed(super().prefill(tokens, chunk), seed=self.engine.position)


def strayed(logits: Logits, seed: int) -> Logits:
    noise = np.random.default_rng(seed).normal(scale=0.2, size=logits.shape)
    return logits + noise.astype(np.float32)


def test_an_honest_engine_of_a_model_that_amplifies_roundings_passes(
    engine: ExecutorchEngine, expected: Reference
) -> None:
    """SmolLM2-135M's roundings have nothing in common from one engine to the next."""
    with pytest.raises(VerificationError, match="the file against the quantized model"):
        verify(Amplifies(engine), expected, 4096)
    engine.reset()
    found = verify(
        Amplifies(engine), expected, 4096, lambda: strayed(expected.quantized_logits, 12345)
    )
    strays = found.kld_ties_decided_otherwise
    assert strays is not None
    assert strays / 2 < found.kld_engine_vs_quantized < 2 * strays
    assert found.to_dict()["max_kld"] == 2 * strays
    assert "quantized model, ties decided otherwise" in figures_text(found.to_dict())


def test_a_defect_is_found_in_such_a_model_too(
    engine: ExecutorchEngine, expected: Reference
) -> None:
    class Dropped(Amplifies, DroppedScale):
        pass

    with pytest.raises(VerificationError, match="the file against the quantized model"):
        verify(Dropped(engine), expected, 4096, lambda: strayed(expected.quantized_logits, 12345))


def test_deciding_ties_otherwise_moves_a_model_little_and_the_same_way_each_time() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(parse_scheme("w8"), torch.randn(4, 512))
    usual, one, same, other = (
        rounding(x, weight)
        for rounding in (
            per_token,
            otherwise(per_token),
            otherwise(per_token),
            otherwise(per_token, 1),
        )
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    distance = ((one - usual).abs() / step).round()
    assert distance.max() == 1
    assert 0 < distance.mean() < 1e-3


def test_what_falls_otherwise_is_measured_only_where_it_matters(
    engine: ExecutorchEngine, expected: Reference
) -> None:
    def never() -> Logits:
        raise AssertionError

    found = verify(engine, expected, 4096, never)
    assert found.kld_ties_decided_otherwise is None
    assert "kld_ties_decided_otherwise" not in found.to_dict()


def test_divergence_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = [
        np.log(values).astype(np.float32)[None] + shift for values, shift in ((p, 3), (q, -7))
    ]
    exact = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert kld(*logits) == pytest.approx(exact, rel=1e-5)
    assert kld(logits[0], logits[0] - 5) == pytest.approx(0, abs=1e-9)
    assert top1(*logits) == 0
    assert top1(np.repeat(logits[0], 2, 0), np.concatenate(logits)) == 0.5


def test_weights_that_are_not_the_models_are_refused(expected: Reference) -> None:
    check_format_cost(expected)
    noise = np.random.default_rng(0).normal(size=expected.float_logits.shape).astype(np.float32)
    with pytest.raises(VerificationError, match="nats from the model's, the bound is 2"):
        check_format_cost(replace(expected, quantized_logits=10 * noise))
