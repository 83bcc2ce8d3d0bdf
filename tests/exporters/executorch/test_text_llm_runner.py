"""The artifact, unchanged, in ExecuTorch's own runner: the one its Android and iOS apps use."""

from collections.abc import Iterator
from pathlib import Path

import executorch.kernels.quantized  # noqa: F401  registers embedding_byte
import pytest
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers llama::*
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

from edgekit.formats.artifact.read import Artifact
from edgekit.models.tokenizer import Tokenizer
from edgekit.runtime.engines.executorch.decoder import ExecutorchEngine

BOS = "<|startoftext|>"  # apps leave it to the prompt
PROMPTS = [
    f"{BOS}Once upon a time",
    f"{BOS}Tom had a little dog. One day",
    f"{BOS}The sun was hot and",
    f"{BOS}<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n",
]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Path) -> Artifact:
    return Artifact.open(tiny_artifact)


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> Tokenizer:
    return Tokenizer.load(artifact.folder)


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> Iterator[ExecutorchEngine]:
    with ExecutorchEngine(artifact.model_path, threads=1) as engine:
        yield engine


def new_runner(artifact: Artifact) -> TextLLMRunner:
    return TextLLMRunner(str(artifact.model_path), str(artifact.folder / "tokenizer.json"))


def theirs(runner: TextLLMRunner, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    pieces: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=new_tokens, temperature=0.0)
    runner.generate(prompt, config, pieces.append)
    return "".join(pieces)


def ours(
    engine: ExecutorchEngine, tokenizer: Tokenizer, prompt: str, new_tokens: int = NEW_TOKENS
) -> str:
    """Greedy text; the runner shows the token that ends it too."""
    engine.reset()
    logits = engine.prefill(tokenizer.encode(prompt, add_special=False))
    tokens = [int(logits.argmax())]
    while len(tokens) < new_tokens and tokens[-1] not in tokenizer.eos_ids:
        tokens.append(int(engine.decode(tokens[-1]).argmax()))
    return "".join([tokenizer.stream().push(token) for token in tokens])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_our_engine(
    artifact: Artifact, engine: ExecutorchEngine, tokenizer: Tokenizer, prompt: str
) -> None:
    text = theirs(new_runner(artifact), prompt)
    assert len(text) > 20
    assert text == ours(engine, tokenizer, prompt)


def test_after_a_reset_every_prompt_gives_what_a_new_runner_gives(artifact: Artifact) -> None:
    """A convolution state that outlives reset() changes the text of most second prompts."""
    fresh = [theirs(new_runner(artifact), prompt) for prompt in PROMPTS]
    runner = new_runner(artifact)
    for order in (PROMPTS, PROMPTS[::-1]):
        for prompt in order:
            assert theirs(runner, prompt) == fresh[PROMPTS.index(prompt)]
            runner.reset()


def test_a_prompt_in_two_parts_continues(artifact: Artifact) -> None:
    config = GenerationConfig(echo=False, max_new_tokens=1, temperature=0.0)
    runner = new_runner(artifact)
    runner.prefill(PROMPTS[0], config)
    assert theirs(runner, " there was a") == theirs(
        new_runner(artifact), f"{PROMPTS[0]} there was a"
    )


def test_the_longest_prompt_that_leaves_room_for_a_token(
    artifact: Artifact, engine: ExecutorchEngine, tokenizer: Tokenizer
) -> None:
    text = BOS + " and a dog" * artifact.context
    ids = tokenizer.encode(text, add_special=False)[: artifact.context - 1]
    prompt = BOS + tokenizer.decode(ids[1:])
    assert tokenizer.encode(prompt, add_special=False) == ids
    assert theirs(new_runner(artifact), prompt, 1) == ours(engine, tokenizer, prompt, 1)
