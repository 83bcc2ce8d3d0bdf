"""Every family computes what transformers' model of it does, in every way of feeding it."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.small_families import SMALL, random_weights, small_config, theirs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from edgekit.errors import EdgekitError
from edgekit.exporters.executorch.blocks import XnnpackBlocks
from edgekit.models.architecture import Architecture
from edgekit.models.config import ModelConfig
from edgekit.models.decoder import Decoder
from edgekit.models.eager import build_eager
from edgekit.models.families import MODEL_TYPES
from edgekit.models.reorder import reordered
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import preset, resolve
from edgekit.quantize.tensor import Weight

CONTEXT, LENGTH = 120, 100
TOLERANCE = 1e-4
START = torch.zeros(1, dtype=torch.long)


def tokens_of(config: ModelConfig, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (1, length), generator=generator)


def with_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {HEAD: weights[EMBEDDING], **weights}


def run(model: Decoder, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """Feed the tokens in pieces; return the logits of each piece's last token."""
    ends = list(itertools.accumulate(sizes))
    with torch.no_grad():
        return torch.cat(
            [
                model(tokens[:, end - size : end], torch.tensor([end - size]))
                for end, size in zip(ends, sizes, strict=True)
            ]
        )


@pytest.mark.parametrize("name", SMALL)
def test_prefill_chunks_and_single_tokens(name: str) -> None:
    config = small_config(name)
    weights, tokens = random_weights(config), tokens_of(config)
    model = build_eager(config, with_head(weights).__getitem__, CONTEXT)
    with torch.no_grad():
        expected = theirs(config, weights)(tokens).logits[0]
        found = model.all_logits(tokens, START)
    assert float((found - expected).abs().max()) < TOLERANCE
    for sizes in ([60, 1, 2, 37], [LENGTH - 5, *[1] * 5]):
        last = torch.tensor(list(itertools.accumulate(sizes))) - 1
        assert float((run(model, tokens, sizes) - expected[last]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("recipe", ["float", "int8", "int4"])
@pytest.mark.parametrize("name", SMALL)
def test_the_operators_that_are_exported_compute_the_same(name: str, recipe: str) -> None:
    config = small_config(name)
    shapes, tied = config.tied_shapes()
    source = random_weights(config)
    weights: dict[str, Weight] = dict(
        quantize_tensors(resolve(preset(recipe), shapes, tied), source.__getitem__)
    )
    exported = Decoder(XnnpackBlocks(weights.__getitem__), config.architecture, CONTEXT).eval()
    reference = build_eager(config, weights.__getitem__, CONTEXT)
    tokens = tokens_of(config, 40)
    for sizes in ([40], [20, 1, 19]):
        found, expected = run(exported, tokens, sizes), run(reference, tokens, sizes)
        # Activations that round the other way move a quantized model's logits by single steps.
        bound = TOLERANCE if recipe == "float" else 0.03 * float(expected.std())
        assert float((found - expected).square().mean().sqrt()) < bound


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_neurons_in_another_order_compute_the_same(name: str) -> None:
    config = small_config(name)
    weights, tokens = random_weights(config), tokens_of(config, 20)
    generator = torch.Generator().manual_seed(0)
    orders = {
        layer.mlp.name: torch.randperm(config.intermediate_size, generator=generator)
        for layer in config.architecture.layers
    }
    read = reordered(config.architecture, weights.__getitem__, orders)
    moved = {key: read(key) for key in weights}
    assert sum(not torch.equal(moved[key], weights[key]) for key in weights) >= 3 * len(orders)
    with torch.no_grad():
        found, expected = (
            build_eager(config, with_head(each).__getitem__, 20).all_logits(tokens, START)
            for each in (moved, weights)
        )
    assert float((found - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", SMALL)
def test_config_and_shapes_are_those_of_transformers(name: str) -> None:
    """Of the file as it is spelled, and of the one that is written."""
    config = small_config(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for raw in (SMALL[name], config.to_dict()):
        reference = AutoConfig.for_model(**json.loads(json.dumps(raw)))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(reference)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if config.tie_embeddings:
            del shapes[HEAD]
        assert shapes == config.tensor_shapes()
        assert reference.rope_parameters["rope_theta"] == config.rope.theta
        eps = reference.norm_eps if config.family == "lfm2" else reference.rms_norm_eps
        assert eps == config.norm_eps


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_tied_head_gets_a_row_of_its_own(family: str) -> None:
    tied = ModelConfig.from_dict(SMALL[family])
    untied = ModelConfig.from_dict(SMALL[family] | {"tie_word_embeddings": False})
    shapes, ties = tied.tied_shapes()
    assert ties == {HEAD: EMBEDDING}
    assert list(shapes) == [*tied.tensor_shapes(), HEAD]
    assert untied.tied_shapes() == (untied.tensor_shapes(), {})
    assert untied.tensor_shapes() == shapes
    assert untied.parameter_count == tied.parameter_count + 320 * 64


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_is_named_once_and_lies_in_its_blocks_prefix(name: str) -> None:
    architecture: Architecture = small_config(name).architecture
    names = [tensor.name for tensor in architecture.table()]
    assert len(set(names)) == len(names)
    for layer in architecture.layers:
        assert all(tensor.name.startswith(f"{layer.name}.") for tensor in layer.tensors)
        for _, block in layer.halves:
            linears = {tensor.name for linear in block.entering for tensor in linear.tensors}
            linears |= {tensor.name for tensor in block.leaving.tensors}
            own = {tensor.name for tensor in block.tensors}
            assert linears <= own
            assert all(tensor.startswith(f"{block.name}.") for tensor in own)


def test_defaults_differ_by_family() -> None:
    """A head is tied where transformers ties it; eps, theta and heads are its defaults too."""
    for family in ("llama", "qwen3"):
        least = {
            key: SMALL[family][key]
            for key in (
                "model_type",
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "eos_token_id",
            )
        }
        config = ModelConfig.from_dict(least)
        reference = AutoConfig.for_model(**least)
        assert config.tie_embeddings is reference.tie_word_embeddings is False
        assert config.norm_eps == reference.rms_norm_eps == 1e-6
        assert config.rope.theta == reference.rope_parameters["rope_theta"]
        assert config.head_dim == reference.head_dim == {"llama": 16, "qwen3": 128}[family]
        assert config.max_context == reference.max_position_embeddings
        assert config.pad_id is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ("llama", {"eos_token_id": None}, "eos_token_id is missing"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "type 'yarn' is not .*: default, llama3"),
        ("llama", {"rope_scaling": {"rope_type": ["a"]}}, "rope_type .* is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        (
            "llama-bands",
            {"rope_parameters": SMALL["llama-bands"]["rope_parameters"] | {"low_freq_factor": 4.0}},
            "low_freq_factor below high_freq_factor, not 8, 4 and 4",
        ),
        (
            "llama-bands",
            {
                "rope_parameters": SMALL["llama-bands"]["rope_parameters"]
                | {"original_max_position_embeddings": 1.5}
            },
            "original_max_position_embeddings must be an integer, not 1.5",
        ),
        ("qwen3", {"use_sliding_window": True}, "only layers of full_attention are supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "only layers of full_attention"),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3"}}, "'llama3' is not .*: default$"),
        ("qwen3", {"head_dim": 31}, "head_dim 31 is odd"),
    ],
)
def test_mistakes_are_refused_by_key(name: str, changes: dict[str, Any], message: str) -> None:
    raw = {key: value for key, value in (SMALL[name] | changes).items() if value is not None}
    with pytest.raises(EdgekitError, match=message) as caught:
        ModelConfig.from_dict(raw)
    assert "\n" not in str(caught.value)
