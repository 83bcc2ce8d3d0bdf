"""The `.pte` holds the codes that were given to it, bit for bit, and what LLM runners read."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.extension.pybindings import _C as binding
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.executorch import blocks as xnnpack_blocks
from edgekit.exporters.executorch.decoder import export_pte, runner_metadata
from edgekit.exporters.executorch.readback import embedding, linears
from edgekit.formats.pte.program import FORWARD, Program
from edgekit.formats.pte.xnnpack_graph import read_graph
from edgekit.models.config import ModelConfig
from edgekit.models.eager import build_eager
from edgekit.models.source import resolve_model
from edgekit.models.weights import row_block
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Recipe, Rule, preset, resolve, uniform
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.quantize.tensor import QuantizedTensor, Weight
from edgekit.runtime.engines.executorch.decoder import ExecutorchEngine
from edgekit.workflows.plan import plan_export

CONTEXT = 24


def scheme(name: str) -> Scheme:
    return parse_scheme(name)


RECIPES = {
    "int8": preset("int8"),
    "int4-head": Recipe((Rule(EMBEDDING, scheme("w8")), Rule(".*", scheme("w4g32")))),
    "int4": preset("int4"),
    "w4": uniform(scheme("w4")),
    "int4-embedding": Recipe((Rule(EMBEDDING, scheme("w4g32")), Rule(".*", scheme("w8")))),
    "grouped-int8-embedding": Recipe((Rule(EMBEDDING, scheme("w8g32")), Rule(".*", scheme("w8")))),
    "float": preset("float"),
}
FAST = ("int8", "int4-head")  # an export takes seconds
ALL = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in RECIPES]
QUANTIZED = ALL[:-1]


@dataclass(frozen=True)
class Exported:
    """A small model and the file made of it."""

    config: ModelConfig
    weights: dict[str, Weight]
    program: Program


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """One convolution and one attention layer, untied, two end-of-sequence tokens."""
    return ModelConfig.from_dict(
        {
            "model_type": "lfm2",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "bos_token_id": 3,
            "eos_token_id": [7, 9],
            "tie_word_embeddings": False,
        }
    )


@pytest.fixture(scope="module", params=ALL)
def exported(
    request: pytest.FixtureRequest, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()
        for name, shape in config.tensor_shapes().items()
    }
    rows = resolve(RECIPES[request.param], config.tensor_shapes())
    weights = dict(quantize_tensors(rows, tensors.__getitem__))
    path = tmp_path_factory.mktemp(request.param) / "model.pte"
    export_pte(config, dict(weights), CONTEXT, path, lambda stage: None)
    return Exported(config, weights, Program.open(path))


def identity(weight: Weight) -> tuple[object, ...]:
    """What two weights have in common exactly when they are equal bit for bit."""
    if isinstance(weight, Tensor):
        return "float", tuple(weight.shape), weight.float().numpy().tobytes()
    codes, scales = weight.codes.numpy().tobytes(), weight.scales.numpy().tobytes()
    return weight.bits, weight.shape, tuple(weight.scales.shape), weight.group_size, codes, scales


def linear_weights(weights: dict[str, Weight]) -> Iterator[Weight]:
    """Yield each matrix as it is exported: the input projection of a convolution is three."""
    for name, weight in weights.items():
        if name != EMBEDDING and len(weight.shape) == 2:
            parts = 3 if name.endswith("conv.in_proj.weight") else 1
            yield from (row_block(weight, part, parts) for part in range(parts))


def assert_holds(program: Program, weights: dict[str, Weight]) -> None:
    stored = [weight.read(program) for weight in linears(program)]
    expected = Counter(identity(weight) for weight in linear_weights(weights))
    found = Counter(identity(weight) for weight in stored)
    assert not expected - found
    # What else is multiplied by is float: the means of norms, the rotation of RoPE.
    assert all(kind == "float" for kind, *_ in found - expected)
    table = embedding(program).read(program)
    assert identity(table) == identity(weights[EMBEDDING])


def test_codes_and_scales_are_in_the_file_bit_for_bit(exported: Exported) -> None:
    assert_holds(exported.program, exported.weights)


@pytest.mark.parametrize("exported", QUANTIZED, indirect=True)
def test_what_is_read_back_dequantizes_to_what_torch_saw(exported: Exported) -> None:
    head = exported.weights[HEAD]
    assert isinstance(head, QuantizedTensor)
    (stored,) = (w for w in linears(exported.program) if w.shape == head.shape)
    read = stored.read(exported.program)
    assert isinstance(read, QuantizedTensor)
    assert torch.equal(read.dequantize(), head.dequantize())


def test_a_code_that_differs_is_noticed(exported: Exported) -> None:
    weights = dict(exported.weights)
    head = weights[HEAD]
    if isinstance(head, Tensor):
        weights[HEAD] = head * 2
    else:
        codes = head.codes.clone()
        codes[-1, -1] ^= 1
        weights[HEAD] = QuantizedTensor(
            codes, head.scales, bits=head.bits, group_size=head.group_size, axis=head.axis
        )
    with pytest.raises(AssertionError):
        assert_holds(exported.program, weights)


@pytest.mark.parametrize("exported", QUANTIZED, indirect=True)
def test_a_quantized_embedding_is_nowhere_a_float(exported: Exported) -> None:
    forward = exported.program.methods[FORWARD]
    outside = [(constant.dtype, constant.shape) for constant in forward.constants]
    inside = [
        (constant.datatype, constant.shape)
        for delegate in forward.delegates
        for constant in read_graph(exported.program, delegate).constants
    ]
    size = math.prod(exported.weights[EMBEDDING].shape)
    floats = [
        shape for kind, shape in outside + inside if kind.startswith(("float", "fp", "bf", "pfp"))
    ]
    assert floats  # norms at least, or the kinds are called otherwise
    assert max(math.prod(shape) for shape in floats) < size


def test_every_constant_method_that_runners_read(exported: Exported) -> None:
    assert exported.program.constant_methods == {
        "get_prefill_chunk": CONTEXT,
        "get_max_seq_len": CONTEXT,
        "get_max_context_len": CONTEXT,
        "get_n_layers": 2,
        "get_vocab_size": 320,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_bos_id": 3,
        "get_eos_ids": [7, 9],
    }


def test_the_program_itself_takes_the_stated_maximum_and_no_more(exported: Exported) -> None:
    path = exported.program.path
    with ExecutorchEngine(path, threads=1) as engine:
        assert engine.longest_chunk == engine.context == CONTEXT
        whole = engine.prefill(range(1, CONTEXT + 1))
        engine.reset()
        engine.prefill(range(1, CONTEXT))
        assert abs(engine.decode(CONTEXT) - whole).max() < 0.05 * whole.std()
    # Past the engine's own checks: the file refuses, as it must under any runner.
    program = binding._load_program(str(path))
    forward = program.load_method(FORWARD)
    start = torch.zeros(1, dtype=torch.int64)
    assert forward.call((torch.ones(1, CONTEXT, dtype=torch.int64), start))[0].shape == (1, 320)
    with pytest.raises(RuntimeError):
        forward.call((torch.ones(1, CONTEXT + 1, dtype=torch.int64), start))


SHORT = 8


@pytest.fixture(
    scope="module",
    params=[
        (4, 2),
        pytest.param((4, 4), marks=pytest.mark.slow),
        pytest.param((4, 1), marks=pytest.mark.slow),
    ],
    ids=lambda heads: f"{heads[0]}-heads-{heads[1]}-kv",
)
def short_chunks(
    config: ModelConfig, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ModelConfig, dict[str, Tensor]]:
    """A float model's file that attends in XNNPACK for 2 to 8 tokens, and its weights.

    Its last layer is no attention: only then do the results of earlier chunks matter later.
    """
    heads, kv_heads = request.param
    changes = {
        "layer_types": ["full_attention", "conv"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    config = ModelConfig.from_dict(config.to_dict() | changes)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in config.tensor_shapes().items()
    }
    path = tmp_path_factory.mktemp("short") / "model.pte"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xnnpack_blocks, "PREFILL_CHUNK", SHORT)
        export_pte(config, dict(weights), CONTEXT, path, lambda stage: None)
    return path, config, weights


@pytest.mark.parametrize("chunk", [1, 3, SHORT, SHORT + 1, CONTEXT])
def test_every_way_to_attend_computes_the_models_logits(
    short_chunks: tuple[Path, ModelConfig, dict[str, Tensor]], chunk: int
) -> None:
    """One token and more than 8 by `custom_sdpa`; 2 to 8 in XNNPACK, from 0 and from later on."""
    path, config, weights = short_chunks
    tokens = [(7 * i) % 300 + 10 for i in range(CONTEXT)]
    model = build_eager(config, weights.__getitem__, CONTEXT)
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), torch.zeros(1, dtype=torch.long))[0].numpy()
    with ExecutorchEngine(path, threads=1) as engine:
        assert engine.default_chunk == SHORT
        np.testing.assert_allclose(engine.prefill(tokens, chunk), expected, atol=1e-3)


def test_the_graph_is_cut_at_the_caches_and_the_last_row_alone(tiny_artifact: Path) -> None:
    """One delegate from attention to attention, one in each attention, one for the last row."""
    program = Program.open(tiny_artifact / "model.pte")
    attentions = len(resolve_model("lfm2-tiny").config.architecture.attentions())
    assert len(program.methods[FORWARD].delegates) == 2 * attentions + 3


def test_a_single_end_of_sequence_token_is_a_list_too() -> None:
    assert runner_metadata(resolve_model("lfm2-tiny").config, 8)["get_eos_ids"] == [7]


@pytest.mark.parametrize("name", ["w8g32", "w8g128"])
def test_grouped_int8_is_refused_before_any_weight_is_read(name: str) -> None:
    with pytest.raises(EdgekitError, match=rf"target executorch cannot hold {name}.*w4gN"):
        plan_export("lfm2-1.2b", "executorch", uniform(scheme(name)), random_weights=True)


def test_the_bundled_model_is_in_its_artifact(tiny_artifact: Path) -> None:
    source = resolve_model("lfm2-tiny")
    shapes, tied = source.config.tied_shapes()
    rows = resolve(preset("int8"), shapes, tied)
    weights = dict(quantize_tensors(rows, source.checkpoint.tensor))
    assert_holds(Program.open(tiny_artifact / "model.pte"), weights)
