"""The onnx engine against transformers' model, on every form of graph it takes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.onnx_decoders import CONTEXT, FOLDER, KINDS, VOCAB, Form, decoder, save
from transformers import AutoModelForCausalLM

from edgekit.common.install import install_command
from edgekit.errors import EdgekitError
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.genai_config import GenaiConfig
from edgekit.runtime.engines.engine import load_engine
from edgekit.runtime.engines.onnx.decoder import OnnxEngine, open_engine
from edgekit.runtime.engines.onnx.graph import read_decoder

TOLERANCE = 1e-4
TOKENS = [int(token) for token in np.random.default_rng(0).integers(VOCAB, size=60)]
FORMS = {
    "genai": Form(),
    "genai-last-row": Form(rows="last"),
    "transformersjs": Form("transformersjs", rows="asked"),
    "portable": Form("transformersjs", fused=False),
    "portable-last-row": Form(fused=False, rows="last"),
}
GENAI = {
    "model": {
        "bos_token_id": 1,
        "context_length": 2048,
        "decoder": {"filename": "model.onnx", "head_size": 64},
        "eos_token_id": 7,
        "vocab_size": VOCAB,
    },
    "search": {"max_length": 40},
}


@pytest.fixture(scope="module")
def expected() -> NDArray[np.float32]:
    """Logits after each of TOKENS by transformers' model, [60, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits.numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoders")
    return {name: save(form, folder / f"{name}.onnx") for name, form in FORMS.items()}


@pytest.fixture(params=FORMS)
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[OnnxEngine]:
    with OnnxEngine(models[request.param], threads=1) as opened:
        yield opened


def assert_close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [None, 1, 7, 59, 1 << 20])
def test_prefill_in_any_pieces(
    engine: OnnxEngine, expected: NDArray[np.float32], chunk: int | None
) -> None:
    assert_close(engine.prefill(TOKENS, chunk), expected[-1])
    assert engine.position == len(TOKENS)


def test_decode_goes_on_from_prefill(engine: OnnxEngine, expected: NDArray[np.float32]) -> None:
    assert_close(engine.prefill(TOKENS[:5]), expected[4])
    assert_close(engine.prefill(TOKENS[5:50]), expected[49])
    for place in range(50, 60):
        assert_close(engine.decode(TOKENS[place]), expected[place])


def test_reset_forgets_at_any_point(engine: OnnxEngine, expected: NDArray[np.float32]) -> None:
    for count in (60, 3, 1, 2):  # odd and even numbers of runs
        for token in TOKENS[-count:]:
            engine.decode(token)
        engine.reset()
        assert engine.position == 0
        assert_close(engine.prefill(TOKENS[:9]), expected[8])
        engine.reset()


@pytest.mark.parametrize("first", [0, 11, 59])
def test_score_gives_a_row_for_each_token(
    engine: OnnxEngine, expected: NDArray[np.float32], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "default_chunk", 8)
    engine.prefill([1, 2, 3])
    assert_close(engine.score(TOKENS, first), expected[first:])
    assert engine.position == len(TOKENS)
    with pytest.raises(EdgekitError, match="first position to score must be 0 to 59, not 60"):
        engine.score(TOKENS, 60)


def test_logits_stay_what_they_were(engine: OnnxEngine) -> None:
    first = engine.prefill([1, 2, 3])
    copy = first.copy()
    second = engine.decode(4)
    engine.close()
    assert (first == copy).all()
    assert not np.array_equal(first, second)
    with pytest.raises(EdgekitError, match="the onnx engine is closed"):
        engine.prefill([1])
    with pytest.raises(EdgekitError, match="the onnx engine is closed"):
        engine.score([1], 0)


@pytest.mark.parametrize("name", ["genai", "transformersjs"])
def test_the_cache_is_never_copied(models: dict[str, Path], name: str) -> None:
    """The attention's output is the very memory that it reads, in every run."""
    with OnnxEngine(models[name], threads=1) as engine:
        runner = engine._run
        assert runner is not None
        caches = {state.present: cache.array.ctypes.data for state, cache in runner._in_place}
        assert len(caches) == 2 * KINDS.count("full_attention")
        assert not runner._growing
        for count in (5, 1, 1):
            binding = runner._bindings[runner._turn]
            engine.prefill(TOKENS[:count])
            given = [value.data_ptr() for value in binding.get_outputs()]
            assert set(caches.values()) <= set(given)
        # what is there has been written by the operator: positions 0 to 6 and no others
        for _, cache in runner._in_place:
            written = np.abs(cache.array).sum(axis=(0, 1, 3)) > 0
            assert written.tolist() == [True] * 7 + [False] * (engine.context - 7)


def test_a_growing_cache_is_handed_on_as_it_is(models: dict[str, Path]) -> None:
    with OnnxEngine(models["portable"], threads=1) as engine:
        runner = engine._run
        assert runner is not None
        assert len(runner._growing) == 2 * KINDS.count("full_attention")
        engine.prefill(TOKENS[:5])
        for length in (6, 7):
            engine.decode(1)
            assert [value.shape() for value in runner._grown] == [[1, 2, length, 64]] * 6


def test_the_context_ends_with_the_rotary_table(models: dict[str, Path]) -> None:
    with OnnxEngine(models["genai"], threads=1) as engine:
        assert engine.context == CONTEXT
        with pytest.raises(
            EdgekitError, match="prompt of 65 tokens does not fit the context of 64"
        ):
            engine.prefill([1] * 65)
        engine.prefill([1] * 64)
        with pytest.raises(EdgekitError, match="1 token after the 64 processed do not fit"):
            engine.decode(1)


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copy(models["genai"], tmp_path / "model.onnx")
    (tmp_path / "genai_config.json").write_text(json.dumps(GENAI))
    return tmp_path


def test_a_genai_folder_bounds_the_context(folder: Path) -> None:
    with OnnxEngine(folder / "model.onnx", threads=1) as engine:
        assert engine.context == 40


def test_a_context_may_be_asked_for(folder: Path, models: dict[str, Path]) -> None:
    with OnnxEngine(folder / "model.onnx", threads=1, context=7) as engine:
        assert engine.context == 7
    with pytest.raises(EdgekitError, match="context must be 1 to 40 for .*model.onnx, not 41"):
        load_engine("onnx", folder / "model.onnx", context=41)
    with OnnxEngine(models["portable"], threads=1) as engine:
        assert engine.context == 2048
    with OnnxEngine(models["portable"], threads=1, context=5000) as engine:
        assert engine.context == 5000


def test_a_genai_folder_may_rename_everything(folder: Path, expected: NDArray[np.float32]) -> None:
    """A graph whose names all begin with `my_`, and a configuration that says so."""
    model = onnx.load(folder / "model.onnx")
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    renamed = {name: re.sub(r"^(past|present)", r"my_\1", name) for name in names}
    renamed |= {"input_ids": "my_ids", "attention_mask": "my_mask", "logits": "my_logits"}
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed[value.name]
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(EdgekitError, match="has no input input_ids, only my_ids, my_mask, my_past"):
        OnnxEngine(folder / "model.onnx")
    inputs = {"input_ids": "my_ids", "attention_mask": "my_mask"}
    outputs = {"logits": "my_logits"}
    for key in ("key", "value"):
        inputs[f"past_{key}_names"] = f"my_past_key_values.%d.{key}"
        outputs[f"present_{key}_names"] = f"my_present.%d.{key}"
    inputs["past_conv_names"], outputs["present_conv_names"] = (
        "my_past.%d.conv",
        "my_present.%d.conv",
    )
    decoder = {"filename": "model.onnx", "inputs": inputs, "outputs": outputs}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    with OnnxEngine(folder / "model.onnx", threads=1) as engine:
        assert_close(engine.prefill(TOKENS), expected[-1])


def test_the_manifest_states_the_context(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    manifest = {
        "format_version": 1,
        "model": {"id": "lfm2-tiny"},
        "target": "onnx",
        "file": "model.onnx",
        "tensors": [],
        "versions": {},
        "context": 50,
        "bos_id": 1,
        "eos_ids": [7],
        "files": {"model.onnx": {"bytes": len(content), "sha256": "0"}},
    }
    (folder / "edgekit.json").write_text(json.dumps(manifest))
    (folder / "genai_config.json").unlink()
    with OnnxEngine(folder / "model.onnx", threads=1) as engine:
        assert engine.context == 50


def test_what_the_engine_says_of_itself(models: dict[str, Path]) -> None:
    with load_engine("onnx", models["genai"], threads=1) as engine:
        assert (engine.name, engine.version) == ("onnx", onnxruntime.__version__)
        assert (engine.vocab_size, engine.longest_chunk) == (VOCAB, CONTEXT)


def test_chunks_are_small_where_every_token_has_logits(tmp_path: Path) -> None:
    """Their logits take 32 MiB at most: 512 tokens of 65,536 would take 128."""
    from edgekit.runtime.engines.onnx.decoder import _default_chunk

    model = decoder(Form())
    model.graph.output[-1].type.tensor_type.shape.dim[2].dim_value = 65_536
    onnx.save(model, tmp_path / "model.onnx")
    assert _default_chunk(read_decoder(OnnxFile.open(tmp_path / "model.onnx"), None)) == 128
    model.graph.output[-1].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, tmp_path / "model.onnx")
    assert _default_chunk(read_decoder(OnnxFile.open(tmp_path / "model.onnx"), None)) == 512


def half(model: onnx.ModelProto) -> None:
    """Let the states and the logits be float16, with casts around the float32 graph."""
    graph = model.graph
    places = {"in": graph.input, "out": graph.output}
    casts: dict[str, list[onnx.NodeProto]] = {"in": [], "out": []}
    for side, values in places.items():
        for value in values:
            if value.type.tensor_type.elem_type != TensorProto.FLOAT:
                continue
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            inner, name = f"{value.name}_32", value.name
            for node in graph.node:
                for names in (node.input, node.output):
                    names[:] = [inner if one == name else one for one in names]
            source, target = (name, inner) if side == "in" else (inner, name)
            to = TensorProto.FLOAT if side == "in" else TensorProto.FLOAT16
            casts[side].append(helper.make_node("Cast", [source], [target], to=to))
    nodes = [*casts["in"], *graph.node, *casts["out"]]
    graph.ClearField("node")
    graph.node.extend(nodes)


@pytest.mark.parametrize("fused", [True, False])
def test_half_precision_states_run(
    tmp_path: Path, expected: NDArray[np.float32], fused: bool
) -> None:
    model = decoder(Form(fused=fused))
    half(model)
    onnx.save(model, tmp_path / "model.onnx")
    with OnnxEngine(tmp_path / "model.onnx", threads=1) as engine:
        engine.prefill(TOKENS[:30])
        found = engine.prefill(TOKENS[30:])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[-1], atol=0.1)


def drop(model: onnx.ModelProto, name: str) -> None:
    for values in (model.graph.input, model.graph.output):
        for value in [value for value in values if value.name == name]:
            values.remove(value)


def retype(model: onnx.ModelProto, name: str, dtype: int) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.type.tensor_type.elem_type = dtype


def resize(model: onnx.ModelProto, name: str, place: int, size: int) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.type.tensor_type.shape.dim[place].dim_value = size


def rename_output(model: onnx.ModelProto, name: str) -> None:
    node = next(node for node in model.graph.node if name in node.output)
    node.output[[*node.output].index(name)] = "other"
    next(value for value in model.graph.output if value.name == name).name = "other"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: rename_output(m, "logits"), "has no output 'logits', only "),
        (lambda m: drop(m, "present.2.key"), "has the state 'past_key_values.2.key' but no output"),
        (
            lambda m: m.graph.input.append(helper.make_tensor_value_info("pixels", 1, [1, 3])),
            "has inputs that no decoder here has: pixels",
        ),
        (
            lambda m: retype(m, "input_ids", TensorProto.FLOAT),
            "input 'input_ids' must be int64 or int32, not float32",
        ),
        (
            lambda m: retype(m, "past.0.conv", TensorProto.BFLOAT16),
            "state 'past.0.conv' is bfloat16 and comes out as float32; supported are float32",
        ),
        (
            lambda m: retype(m, "logits", TensorProto.DOUBLE),
            "logits must be float32 or float16, not float64",
        ),
        (lambda m: resize(m, "input_ids", 1, 1 << 31), "must take one sequence of any length"),
        (lambda m: resize(m, "input_ids", 0, 4), "must take one sequence of any length, not .4, "),
        (lambda m: resize(m, "past_key_values.2.key", 2, 512), "has a fixed number of positions"),
        (
            lambda m: resize(m, "past_key_values.2.key", 1, 1 << 40),
            "its states would take [0-9]+ GB",
        ),
        (lambda m: resize(m, "past.0.conv", 0, 2), "has the unusable shape"),
    ],
)
def test_what_is_no_lfm2_decoder_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    model = decoder(Form(layers=3))
    change(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EdgekitError, match=words) as caught:
        OnnxEngine(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


def test_a_model_without_states_is_refused(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "n"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "n", 16])
    table = numpy_helper.from_array(np.ones((16, 16), np.float32), "table")
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    graph = helper.make_graph([node], "stateless", [ids], [logits], [table])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(EdgekitError, match="keeps no state of past tokens"):
        OnnxEngine(tmp_path / "model.onnx")


def test_what_onnxruntime_refuses_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = decoder(Form(layers=3))
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    path = tmp_path / "model.onnx"
    with pytest.raises(EdgekitError) as caught:
        OnnxEngine(path)
    assert str(caught.value) == (
        f"onnxruntime cannot load {path}: No Op registered for NoSuchOperator with domain_version "
        "of 21"
    )
    assert capfd.readouterr() == ("", "")


def test_a_run_that_fails_is_one_line_and_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Position 64 of the portable graph is beyond its table of angles."""
    with OnnxEngine(save(Form(fused=False), tmp_path / "model.onnx"), threads=1) as engine:
        assert engine.context > CONTEXT
        last = engine.prefill(TOKENS[:10])
        with pytest.raises(EdgekitError, match="onnxruntime failed on 60 tokens at position 10: "):
            engine.prefill(TOKENS)
        assert engine.position == 10
        engine.prefill(TOKENS[10:20])
        engine.reset()
        assert_close(engine.prefill(TOKENS[:10]), last)
    assert capfd.readouterr() == ("", "")


def test_without_onnxruntime_the_extra_is_named(models: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path; from edgekit.errors import EdgekitError\n"
        "from edgekit.runtime.engines.engine import load_engine\n"
        "try: load_engine('onnx', Path(sys.argv[1]))\n"
        "except EdgekitError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(models["genai"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"the onnx engine needs onnxruntime: {install_command('onnx')}\n"


def test_opening_a_file_prints_nothing_and_imports_no_torch(models: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from edgekit.runtime.engines.onnx.decoder import open_engine\n"
        "open_engine(Path(sys.argv[1]), 1, None).prefill([1, 2, 3])\n"
        "heavy = {'torch', 'onnx', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(models["genai"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--extra_options", "prune_lm_head=true"]])
def test_a_folder_of_onnxruntime_genai_itself(
    tmp_path: Path, expected: NDArray[np.float32], options: list[str]
) -> None:
    """What its builder makes of lfm2-tiny, not of our own making."""
    pytest.importorskip("onnx_ir", reason="onnxruntime-genai's builder needs onnx_ir")
    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
    arguments = ("-m", str(FOLDER), "-o", str(tmp_path), "-p", "fp32", "-e", "cpu")
    cache = ("-c", str(tmp_path / "cache"))
    subprocess.run([*builder, *arguments, *cache, *options], check=True, capture_output=True)
    with OnnxEngine(GenaiConfig.open(tmp_path).model_path, threads=1) as engine:
        assert engine.context == 2048
        runner = engine._run
        assert runner is not None
        assert not runner._growing
        assert_close(engine.prefill(TOKENS, 17), expected[-1])
        assert_close(engine.score(TOKENS, 9), expected[9:])


def test_open_engine_takes_threads(models: dict[str, Path], expected: NDArray[np.float32]) -> None:
    with open_engine(models["genai"], 2, None) as engine:
        assert_close(engine.prefill(TOKENS), expected[-1])


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """Its telemetry leaves a session file in the temporary folder as soon as it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", "import edgekit.runtime.engines.onnx.decoder"],
        env=environment | {"TMPDIR": str(tmp_path)},
        check=True,
    )
    assert list(tmp_path.iterdir()) == []
