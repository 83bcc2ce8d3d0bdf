"""The ONNX target: its graphs compute the model, and hold the codes that were given to it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from support.onnx_models import (
    CONTEXT,
    Abi,
    Loop,
    Written,
    eager_logits,
    loop,
    random_weights,
    session,
    small_config,
    write,
)
from transformers import Lfm2Config, Lfm2ForCausalLM

from edgekit.cli import main
from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.contract.layout import Options, find_layout
from edgekit.exporters.inspect.report import inspect
from edgekit.exporters.onnx import contrib as onnx_contrib
from edgekit.exporters.onnx.inspect import Report
from edgekit.exporters.onnx.layout import check_rows, model_file
from edgekit.exporters.onnx.optimised import check_fast, operators_run
from edgekit.exporters.onnx.readback import weights
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.onnx.file import OnnxFile
from edgekit.metrics.logits import kld
from edgekit.models.config import ModelConfig
from edgekit.models.eager import build_eager
from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.models.weights import floats
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Recipe, Rule, preset, resolve, uniform
from edgekit.quantize.schemes.names import Scheme, parse_scheme

TOKENS = [int(token) for token in np.random.default_rng(0).integers(320, size=37)]
CHUNKS = ([37], [1, 2, 5, 29], [30, 1, 1, 5])
C, A = "conv", "full_attention"


def scheme(name: str) -> Scheme:
    return parse_scheme(name)


MIXED = Recipe(
    (
        Rule(EMBEDDING, scheme("w4g32a")),
        Rule(r".*\.q_proj\.weight", scheme("w8")),  # stands apart from k_proj and v_proj
        Rule(r".*\.w3\.weight", scheme("float")),
        Rule(".*", scheme("w8g32")),
    )
)
RECIPES = {
    "int8": preset("int8"),
    "int4": preset("int4"),
    "float": preset("float"),
    "w4": uniform(scheme("w4")),
    "w4g32a": uniform(scheme("w4g32a")),
    "int4-throughout": Recipe((Rule(".*", scheme("w4g32")),)),
    "mixed": MIXED,
}
FORMS: dict[str, tuple[Abi, bool]] = {
    "genai": ("genai", False),
    "transformersjs": ("transformersjs", False),
    "portable": ("genai", True),
    "portable-transformersjs": ("transformersjs", True),
}
LAYERS = {"conv-last": (C, A, C), "attention-last": (A, C, A)}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[Abi, bool]:
    return FORMS[request.param]


def transformers_logits(config: ModelConfig) -> NDArray[np.float32]:
    """Logits `[n, vocab]` of TOKENS by transformers' model of the same weights."""
    model = Lfm2ForCausalLM(Lfm2Config(**config.to_dict())).float().eval()
    missing, unexpected = model.load_state_dict(random_weights(config), strict=False)
    assert set(missing) <= {HEAD}
    assert not unexpected
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits.numpy()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_float_logits_are_those_of_transformers(
    tmp_path: Path, form: tuple[Abi, bool], layers: tuple[str, ...], tied: bool
) -> None:
    config = small_config(layers, tied)
    path = write(tmp_path, config, preset("float"), *form).path
    expected = transformers_logits(config)
    assert np.abs(loop(path)(TOKENS, rows=0) - expected).max() < 1e-4
    for sizes in CHUNKS:
        assert np.abs(run(loop(path), sizes) - expected[ends(sizes)]).max() < 1e-4


def run(model: Loop, sizes: Sequence[int]) -> NDArray[np.float32]:
    """Feed TOKENS in pieces; the logits after each piece."""
    bounds = itertools.pairwise([0, *itertools.accumulate(sizes)])
    return np.concatenate([model(TOKENS[start:end]) for start, end in bounds])


def ends(sizes: Sequence[int]) -> list[int]:
    return [end - 1 for end in itertools.accumulate(sizes)]


@pytest.mark.parametrize("rows", [1, 2, 36, 37, 40])
def test_as_many_logits_as_are_asked_for(tmp_path: Path, form: tuple[Abi, bool], rows: int) -> None:
    path = write(tmp_path, small_config(), preset("int8"), *form).path
    every = loop(path)(TOKENS, rows=0)
    assert every.shape == (37, 320)
    assert np.array_equal(loop(path)(TOKENS, rows=rows), every[-rows:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_are_read_back_bit_for_bit(
    tmp_path: Path, form: tuple[Abi, bool], recipe: str
) -> None:
    written = write(tmp_path, small_config(), RECIPES[recipe], *form)
    found = dict(weights(written.path, written.config))
    expected = {name: floats(weight) for name, weight in written.weights.items()}
    if torch.equal(expected[HEAD], expected[EMBEDDING]):
        del expected[HEAD]  # a tied head comes only where it is another tensor
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_logits_are_those_of_the_eager_model(
    tmp_path: Path, form: tuple[Abi, bool], recipe: str
) -> None:
    written = write(tmp_path, small_config(), RECIPES[recipe], *form)
    expected = eager_logits(written.config, written.weights, TOKENS)
    assert kld(expected, loop(written.path)(TOKENS, rows=0)) < 0.003
    model = loop(written.path)
    rows = np.concatenate([model(TOKENS[:20]), *(model([token]) for token in TOKENS[20:])])
    assert kld(expected[19:], rows) < 0.003


@pytest.mark.parametrize("recipe", ["int8", "int4", "mixed"])
def test_portable_models_run_in_onnx_reference_evaluator(tmp_path: Path, recipe: str) -> None:
    """It rounds no activations, so the logits are those of the dequantized weights."""
    written = write(tmp_path, small_config(), RECIPES[recipe], portable=True)
    model = onnx.load(written.path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    exact = {name: floats(weight) for name, weight in written.weights.items()}
    expected = eager_logits(written.config, exact, TOKENS)
    evaluator = ReferenceEvaluator(model)
    defaults = {constant.name for constant in model.graph.initializer}
    shapes: dict[str, list[int | str]] = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in defaults
    }
    outputs = [value.name for value in model.graph.output]
    for sizes in ([37], [30, 1, 1, 5]):
        found = run(Loop(evaluator, shapes, outputs), sizes)
        assert np.abs(found - expected[ends(sizes)]).max() < 1e-4


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_genai_loads_the_folder_and_generates_what_the_model_does(
    tmp_path: Path, recipe: str
) -> None:
    output = tmp_path / "artifact"
    done = export("lfm2-tiny", output, f"--{recipe}", "--context", "64")
    assert done.exit_code == 0, done.stderr
    prompt, tokens = greedy(recipe, 24)
    model = onnxruntime_genai.Model(str(output))
    assert model.type == "lfm2"
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens))
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == tokens
    text = Tokenizer.load(output).decode(tokens)
    assert onnxruntime_genai.Tokenizer(model).decode(np.array(tokens, np.int32)) == text


def export(model: str, output: Path, *more: str) -> Result:
    arguments = ["export", model, "--target", "onnx", "-o", str(output), *more]
    return CliRunner().invoke(main, arguments)


def greedy(recipe: str, count: int) -> tuple[list[int], list[int]]:
    """A prompt, and with it what the eager quantized lfm2-tiny says next."""
    source = resolve_model("lfm2-tiny")
    assert source.folder is not None
    shapes, tied = source.config.tied_shapes()
    codes = dict(quantize_tensors(resolve(preset(recipe), shapes, tied), source.checkpoint.tensor))
    model = build_eager(source.config, codes.__getitem__, 64)
    prompt = Tokenizer.load(source.folder).encode("Once upon a time")
    tokens, new = list(prompt), list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            position = torch.tensor([len(tokens) - len(new)])
            new = [int(model(torch.tensor([new]), position).argmax())]
            tokens += new
    return prompt, tokens


def test_the_abi_of_transformers_js(tmp_path: Path) -> None:
    written = write(tmp_path, small_config(), preset("int4"), "transformersjs")
    assert written.path == tmp_path / "onnx" / "model_q4.onnx"
    assert json.loads((tmp_path / "config.json").read_text())["transformers.js_config"] == {
        "dtype": "q4",
        "use_external_data_format": False,  # it is too small for a second file
    }
    inputs = {value.name: value.shape for value in session(written.path).get_inputs()}
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "num_logits_to_keep": [],
        "past_conv.0": ["batch_size", 64, 3],
        "past_key_values.1.key": ["batch_size", 2, "past_sequence_length", 16],
        "past_key_values.1.value": ["batch_size", 2, "past_sequence_length", 16],
        "past_conv.2": ["batch_size", 64, 3],
    }
    # runs in releases before CausalConvWithState
    assert "com.microsoft::CausalConvWithState" not in OnnxFile.open(written.path).operators()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("int8", "model_quantized"), ("int4", "model_q4"), ("w4", "model_q4"), ("float", "model")],
)
def test_names_of_files_in_transformers_js(recipe: str, name: str) -> None:
    rows = resolve(RECIPES[recipe], small_config().tensor_shapes())
    assert model_file(rows, Options(abi="transformersjs")) == f"onnx/{name}.onnx"
    assert model_file(rows, Options()) == "model.onnx"


def test_genai_config_names_what_the_graph_has(tmp_path: Path) -> None:
    written = write(tmp_path, small_config(), preset("int8"))
    config = json.loads((tmp_path / "genai_config.json").read_text())
    model = config["model"]
    assert model["eos_token_id"] == [7, 9]
    assert model["context_length"] == config["search"]["max_length"] == CONTEXT
    names = {value.name for value in session(written.path).get_inputs()}
    inputs = model["decoder"]["inputs"]
    layers = enumerate(model["decoder"]["layer_types"])
    keys = {C: ("past_conv_names",), A: ("past_key_names", "past_value_names")}
    states = {inputs[key] % index for index, kind in layers for key in keys[kind]}
    assert names == {inputs["input_ids"], inputs["attention_mask"], *states}


def test_a_tied_head_shares_the_bytes_of_the_embedding(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    assert export("lfm2-tiny", output, "--int8", "--context", "32").exit_code == 0
    model = OnnxFile.open(output / "model.onnx")
    places = {t.name: (t.location, t.offset, t.stored_bytes) for t in model.graph.initializers}
    assert places[HEAD] == places[EMBEDDING]
    assert places[HEAD][0] == "model.onnx.data"
    offset = places[HEAD][1]
    assert offset is not None
    assert offset % 4096 == 0
    total = sum(file.stat().st_size for file in output.glob("model.onnx*"))
    assert total < 6_900_000  # 6.1 million weights


def test_the_manifest_says_what_runs_the_file(tmp_path: Path) -> None:
    for more, requires in (
        ((), {"opset": "21", "com.microsoft": "1", "onnxruntime": ">=1.25.1"}),
        (("--portable",), {"opset": "21", "onnxruntime": ">=1.20"}),
    ):
        output = tmp_path / "artifact"
        done = export("lfm2-tiny", output, "--int4", "--context", "16", "--force", *more)
        assert done.exit_code == 0, done.stderr
        artifact = Artifact.open(output)
        assert artifact.decoder.requires == requires
        assert artifact.manifest.verification["kld_engine_vs_quantized"] <= 0.003


def test_an_artifact_in_a_folder_below(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    done = export("lfm2-tiny", output, "--int8", "--context", "32", "--abi", "transformersjs")
    assert done.exit_code == 0, done.stderr
    artifact = Artifact.open(output)
    assert artifact.model_path == output / "onnx" / "model_quantized.onnx"
    assert {"onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data"} < {
        *artifact.manifest.files
    }
    config = json.loads((output / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {
        "model_quantized.onnx": 1
    }
    said = CliRunner().invoke(main, ["run", str(output), "Once upon a time", "--max-tokens", "4"])
    assert said.exit_code == 0, said.stderr
    (output / "onnx" / "model_quantized.onnx").write_bytes(b"")
    with pytest.raises(EdgekitError, match="is truncated or was replaced"):
        Artifact.open(output)


def test_rows_that_no_operator_takes_are_refused_before_any_work() -> None:
    rows = resolve(Recipe((Rule(".*", scheme("w8")),)), {"a.weight": (64, 48)})
    with pytest.raises(EdgekitError, match=r"a\.weight: target onnx cannot hold w8 in rows of 48"):
        check_rows(rows)
    check_rows(resolve(preset("float"), {"a.weight": (64, 48)}))


@pytest.mark.parametrize("options", [Options(portable=True), Options(abi="transformersjs")])
def test_options_of_other_targets_are_refused(options: Options) -> None:
    find_layout("onnx", options)
    with pytest.raises(EdgekitError, match="has no meaning for target executorch"):
        find_layout("executorch", options)


def test_float_activations_fail_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_contrib, "INT8_ACTIVATIONS", 0)
    done = export("lfm2-tiny", tmp_path / "artifact", "--int8", "--context", "16")
    assert done.exit_code == 1
    assert "MatMulNBits do not round their activations to int8, such as model.layers" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_fused_fails_the_export(tmp_path: Path) -> None:
    """A matrix that something is done to before the product."""
    path = write(tmp_path, small_config(), preset("int8"), portable=True).path
    assert "DequantizeLinear" not in operators_run(path)
    check_fast(path)
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.name == "lm_head")
    twice = onnx.helper.make_node("Add", [node.input[1]] * 2, ["twice"])
    model.graph.node.insert(list(model.graph.node).index(node), twice)
    node.input[1] = "twice"
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"runs \d DequantizeLinear that it has not fused"):
        check_fast(path)


def test_a_wrong_weight_fails_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_contrib, "floats", lambda weight: floats(weight).flip(0))
    done = export("lfm2-tiny", tmp_path / "artifact", "--int8", "--context", "32")
    assert done.exit_code == 1
    assert "verification: the file against the quantized model" in done.stderr
    assert list(tmp_path.iterdir()) == []


def report(written: Written) -> Report:
    found = inspect(written.path)
    assert isinstance(found, Report)
    return found


def test_inspect_counts_every_byte_once(tmp_path: Path, form: tuple[Abi, bool]) -> None:
    written = write(tmp_path, small_config(), preset("int8"), *form)
    found = report(written)
    names = {part.name: part.bytes for part in found.components}
    assert sum(names.values()) == found.file_bytes
    assert names["graph"] < 100_000
    heads = [name for name in names if "head, int8" in name]
    embeddings = [name for name in names if "embedding" in name]
    assert len(heads) >= 1
    assert len(embeddings) >= 1
    assert found.not_run is None
    assert (
        found.run["MatMulNBits"]
        == found.operators["DequantizeLinear" if form[1] else "com.microsoft::MatMulNBits"]
    )
    json.dumps(found.to_dict())
    assert "operators as ONNX Runtime runs them" in found.text()


def test_inspect_says_why_a_model_does_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, small_config(), preset("int8")).path
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "CausalConvWithState":
            node.op_type = "NoSuchOperator"
    onnx.save(model, path)
    found = inspect(path)
    assert isinstance(found, Report)
    assert found.run == {}
    assert found.not_run is not None
    assert "NoSuchOperator" in found.not_run
    assert found.not_run in found.text()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, small_config(), preset("int8")).path
    with pytest.raises(EdgekitError, match="must have the shape|cannot be read|holds no"):
        list(weights(path, small_config((C, A, C, C))))
    wide = ModelConfig.from_dict(small_config().to_dict() | {"intermediate_size": 128})
    with pytest.raises(EdgekitError, match="must have the shape|cannot be read"):
        list(weights(path, wide))
