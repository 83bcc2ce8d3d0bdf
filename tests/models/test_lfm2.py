"""The LFM2 module computes what transformers' Lfm2ForCausalLM does, in every way of feeding it."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM

from edgekit.exporters.executorch.blocks import XnnpackBlocks
from edgekit.models.config import ModelConfig
from edgekit.models.decoder import Decoder
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import resolve_model
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Recipe, preset, resolve, uniform
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import Weight

CONTEXT = 48
LENGTH = 37
TOLERANCE = 1e-4
C, A = "conv", "full_attention"

# seed, layers, heads, key-value heads, head_dim, tied head
SHAPES = [
    (0, (C, C, A, C), 4, 2, 16, True),
    (1, (A, C), 4, 1, 16, False),
    (2, (C, A, A), 3, 3, 32, False),
]


def small_config(
    layers: Sequence[str] = (C, A),
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    tied: bool = True,
) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "lfm2",
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "block_auto_adjust_ff_dim": False,
            "layer_types": list(layers),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 128,
            "eos_token_id": 7,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": tied,
        }
    )


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Float32; norms are not ones, so that a forgotten norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.2 * noise if len(shape) == 1 else noise / shape[-1] ** 0.5
    return weights


def eager(config: ModelConfig, weights: dict[str, Tensor], context: int = CONTEXT) -> Decoder:
    head = HEAD if HEAD in weights else EMBEDDING
    return build_eager(config, {**weights, HEAD: weights[head]}.__getitem__, context)


def theirs(config: ModelConfig, weights: dict[str, Tensor]) -> Lfm2ForCausalLM:
    model = Lfm2ForCausalLM(Lfm2Config(**config.to_dict(), attn_implementation="eager"))
    lacking, extra = model.load_state_dict(weights, strict=False)
    assert set(lacking) <= {HEAD}
    assert not extra
    model.tie_weights()
    return model.float().eval()


def tokens_of(config: ModelConfig, seed: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(config.vocab_size, (1, length), generator=generator)


def run(model: Decoder, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """Feed the tokens in pieces from position 0; return the logits of each piece's last token."""
    ends = list(itertools.accumulate(sizes))
    assert ends[-1] == tokens.shape[1]
    with torch.no_grad():
        return torch.cat(
            [
                model(tokens[:, end - size : end], torch.tensor([end - size]))
                for end, size in zip(ends, sizes, strict=True)
            ]
        )


@pytest.fixture(params=SHAPES, ids=["mixed", "one-kv-head-untied", "wide-heads-untied"])
def pair(request: pytest.FixtureRequest) -> tuple[Decoder, Tensor, Tensor]:
    """Our model, tokens `[1, n]`, and transformers' logits `[n, vocab]` for them."""
    seed, *shape = request.param
    config = small_config(*shape)
    weights = random_weights(config, seed)
    tokens = tokens_of(config, seed)
    with torch.no_grad():
        expected = theirs(config, weights)(tokens).logits[0]
    return eager(config, weights), tokens, expected


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < TOLERANCE


def test_every_position_of_a_prefill(pair: tuple[Decoder, Tensor, Tensor]) -> None:
    model, tokens, expected = pair
    with torch.no_grad():
        assert_close(model.all_logits(tokens, torch.zeros(1, dtype=torch.long)), expected)


@pytest.mark.parametrize("sizes", [[LENGTH], [1, 2, 5, 29], [30, 1, 1, 5], [1] * LENGTH])
def test_chunks_and_single_tokens(pair: tuple[Decoder, Tensor, Tensor], sizes: list[int]) -> None:
    model, tokens, expected = pair
    last = torch.tensor(list(itertools.accumulate(sizes))) - 1
    assert_close(run(model, tokens, sizes), expected[last])


def test_a_prompt_at_position_0_forgets_the_one_before(
    pair: tuple[Decoder, Tensor, Tensor],
) -> None:
    model, tokens, expected = pair
    run(model, tokens.flip(1), [LENGTH - 1, 1])
    assert_close(run(model, tokens, [1, LENGTH - 1]), expected[[0, -1]])


def test_the_context_can_be_filled_and_not_exceeded() -> None:
    config = small_config()
    weights = random_weights(config, 3)
    tokens = tokens_of(config, 3, CONTEXT + 1)
    model = eager(config, weights)
    assert_close(
        run(model, tokens[:, :CONTEXT], [CONTEXT]),
        run(model, tokens[:, :CONTEXT], [CONTEXT - 1, 1])[1:],
    )
    with pytest.raises(RuntimeError), torch.no_grad():
        model(tokens[:, CONTEXT:], torch.tensor([CONTEXT]))


def test_the_bundled_model_is_the_one_transformers_loads() -> None:
    source = resolve_model("lfm2-tiny")
    assert source.folder is not None
    model = Lfm2ForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    tokens = tokens_of(source.config, 4, 64)
    ours = build_eager(source.config, float_reader(source.config, source.checkpoint), 64)
    with torch.no_grad():
        expected = model(tokens).logits[0]
        assert_close(ours.all_logits(tokens, torch.zeros(1, dtype=torch.long)), expected)
    assert_close(run(ours, tokens, [20, 20, *[1] * 24])[[0, -1]], expected[[19, -1]])


def quantized(config: ModelConfig, recipe: Recipe, seed: int) -> dict[str, Weight]:
    shapes, tied = config.tied_shapes()
    weights = random_weights(config, seed)
    return dict(quantize_tensors(resolve(recipe, shapes, tied), weights.__getitem__))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "float": lambda: preset("float"),
    "int8": lambda: preset("int8"),
    "int4": lambda: preset("int4"),
    "w4": lambda: uniform(parse_scheme("w4")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_operators_that_are_exported_compute_the_same(name: str) -> None:
    config = small_config(layers=(C, A, C))
    weights = quantized(config, RECIPES[name](), seed=5)
    exported = Decoder(XnnpackBlocks(weights.__getitem__), config.architecture, CONTEXT).eval()
    reference = build_eager(config, weights.__getitem__, CONTEXT)
    tokens = tokens_of(config, 5)
    for sizes in ([LENGTH], [20, 1, 16]):
        actual, expected = run(exported, tokens, sizes), run(reference, tokens, sizes)
        # Activations that round the other way move a quantized model's logits by single steps.
        bound = TOLERANCE if name == "float" else 0.02 * float(expected.std())
        assert float((actual - expected).square().mean().sqrt()) < bound
