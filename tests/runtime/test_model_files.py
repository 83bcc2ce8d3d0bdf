"""What a path stands for, and the commands on files that edgekit did not make."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader
from support.command_line import assert_only_one_line
from support.foreign_gguf import FOLDER, write_foreign_gguf
from support.onnx_decoders import CONTEXT, Form, save

from edgekit.cli import main
from edgekit.errors import EdgekitError
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.runtime.bench.decoder import DecoderResult, bench
from edgekit.runtime.bench.record import Record
from edgekit.runtime.bench.tables import render
from edgekit.runtime.engines.gguf.facts import count_types, file_traffic, open_checked
from edgekit.runtime.engines.gguf.tokenizer import GgufTokenizer
from edgekit.runtime.model_files import find_model_file

PROMPT = "Once upon a time"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
GREEDY = ("-n", 12, "--temp", 0, "-t", 1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def run_json(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    said = lines[-1] if arguments[0] == "run" else done.stdout  # before it come the pieces
    facts: dict[str, Any] = json.loads(said)
    return facts


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of gguf-py's, alone in its folder."""
    return write_foreign_gguf(tmp_path_factory.mktemp("stock") / "stock.Q8_0.gguf", "Q8_0")


@pytest.fixture(scope="module")
def program(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare `.pte` with nothing beside it."""
    path = tmp_path_factory.mktemp("bare") / "bare.pte"
    return Path(shutil.copyfile(tiny_artifact / "model.pte", path))


@pytest.fixture(scope="module")
def genai_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that states more positions than its graph has rotations for."""
    folder = tmp_path_factory.mktemp("genai") / "genai"
    folder.mkdir()
    model = {
        "context_length": 4096,
        "bos_token_id": 1,
        "eos_token_id": [7, 2],
        "decoder": {"filename": "net.onnx", "head_size": 64},
    }
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
    save(Form(), folder / "net.onnx")
    for name in TOKENIZER_FILES:
        shutil.copyfile(FOLDER / name, folder / name)
    return folder


def test_an_artifact_folder(tiny_artifact: Path) -> None:
    file = find_model_file(tiny_artifact)
    assert (file.name, file.engine) == (tiny_artifact.name, "executorch")
    assert (file.context, file.longest, file.eos_ids) == (512, 512, (7,))
    assert file.manifest is not None
    assert file.path == tiny_artifact / "model.pte"
    assert file.file_bytes == file.path.stat().st_size


def test_a_gguf_file(stock: Path) -> None:
    file = find_model_file(stock)
    assert (file.name, file.engine, file.manifest) == ("stock.Q8_0.gguf", "gguf", None)
    assert (file.context, file.longest) == (2048, 2048)
    assert isinstance(file.tokenizer(), GgufTokenizer)
    assert file.tokenizer(FOLDER).encode(PROMPT) == file.tokenizer().encode(PROMPT)


def test_a_folder_of_onnxruntime_genai(genai_folder: Path) -> None:
    file = find_model_file(genai_folder)
    assert (file.name, file.engine, file.manifest) == ("genai", "onnx", None)
    assert file.path == genai_folder / "net.onnx"
    assert (file.context, file.longest, file.eos_ids) == (2048, 4096, (7, 2))
    with file.load(threads=1) as engine:
        assert engine.context == CONTEXT
    (genai_folder / "net.onnx.bak").write_bytes(b"123")  # no file of the model's
    assert file.file_bytes == file.path.stat().st_size
    (genai_folder / "net.onnx.bak").unlink()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "none: does not exist"),
        ("m.bin", "m.bin: is no artifact folder and no file of those that end in .gguf, .onnx, "),
        ("m.gguf", "m.gguf: is not a GGUF file"),
        ("folder", "folder: holds no edgekit.json"),
    ],
)
def test_what_is_nothing_to_run_is_refused(tmp_path: Path, name: str, words: str) -> None:
    for file in ("m.bin", "m.gguf"):
        (tmp_path / file).write_bytes(b"PK\3\4" * 40)
    (tmp_path / "folder").mkdir()
    for command in (("run", tmp_path / name, PROMPT), ("bench", tmp_path / name)):
        assert_only_one_line(run(*command), words)


def test_a_stock_gguf_says_what_the_model_says(stock: Path) -> None:
    whole = run_json("run", stock, PROMPT, *GREEDY)
    assert (whole["engine"], whole["generated_tokens"]) == ("gguf", 12)
    told = run_json("run", stock, PROMPT, *GREEDY, "--tokenizer", FOLDER)
    assert told["text"] == whole["text"]
    assert whole["text"].startswith(PROMPT)
    assert run_json("run", stock, PROMPT, "--raw", *GREEDY)["prompt_tokens"] < 8


def test_a_folder_of_onnxruntime_genai_says_what_the_model_says(
    genai_folder: Path, stock: Path
) -> None:
    facts = run_json("run", genai_folder, PROMPT, *GREEDY)
    assert facts["engine"] == "onnx"
    assert facts["text"] == run_json("run", stock, PROMPT, *GREEDY)["text"]


def test_generation_ends_where_the_file_says(stock: Path) -> None:
    facts = run_json("run", stock, "Tell a story.", "--temp", 0, "-t", 1)
    assert facts["reason"] == "eos"


def test_a_bare_program_needs_a_tokenizer(program: Path) -> None:
    words = "bare.pte: has no tokenizer.json beside it; name its tokenizer.json, or the folder "
    assert_only_one_line(run("run", program, PROMPT), words)


def test_a_bare_program_is_its_artifact(program: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    expected = run_json("run", tiny_artifact, PROMPT, *GREEDY)["text"]
    for given in (FOLDER, FOLDER / "tokenizer.json"):
        assert run_json("run", program, PROMPT, *GREEDY, "--tokenizer", given)["text"] == expected
    beside = shutil.copyfile(program, tmp_path / "m.pte")
    for name in TOKENIZER_FILES:
        shutil.copyfile(FOLDER / name, tmp_path / name)
    assert run_json("run", beside, PROMPT, *GREEDY)["text"] == expected


def test_a_tokenizer_that_is_none(program: Path, tmp_path: Path) -> None:
    for given in (tmp_path, tmp_path / "none.json", program):
        done = run("run", program, PROMPT, "--tokenizer", given)
        words = "--tokenizer takes a tokenizer.json, or the folder that holds one, not "
        assert_only_one_line(done, words, str(given))


def test_a_folder_of_transformers_js(tmp_path: Path) -> None:
    """Models in `onnx/`, the tokenizer in the folder around it, and nothing of edgekit's."""
    (tmp_path / "onnx").mkdir()
    save(Form(), tmp_path / "onnx" / "model.onnx")
    for name in TOKENIZER_FILES:
        shutil.copyfile(FOLDER / name, tmp_path / name)
    hint = f"name a model file in it, such as {tmp_path / 'onnx' / 'model.onnx'}"
    for command in (("run", tmp_path, PROMPT), ("inspect", tmp_path)):
        assert_only_one_line(run(*command), hint)
    facts = run_json("run", tmp_path / "onnx" / "model.onnx", PROMPT, "-n", 2, "-t", 1)
    assert facts["generated_tokens"] == 2


def test_a_prompt_beyond_the_context_of_a_bare_program(program: Path) -> None:
    done = run("run", program, "zebra " * 600, "--tokenizer", FOLDER)
    assert_only_one_line(done, "tokens does not fit the context of 512")


def test_a_program_states_its_ends(program: Path) -> None:
    file = find_model_file(program)
    assert (file.context, file.eos_ids) == (None, ())
    with file.load(threads=1) as engine:
        assert file.end_ids(engine, file.tokenizer(FOLDER)) == engine.eos_ids == (7,)


@pytest.fixture(scope="module")
def record(stock: Path, program: Path, genai_folder: Path) -> Record[DecoderResult]:
    files = [stock, program, genai_folder]
    return bench(files, prompts=(8,), generates=(4,), repetitions=2, threads=1)


def test_engines_take_turns(record: Record[DecoderResult]) -> None:
    names = [name for name, _ in record.sequence()]
    assert names == ["stock.Q8_0.gguf", "bare.pte", "genai"] * 4
    assert [artifact.engine for artifact in record.artifacts] == ["gguf", "executorch", "onnx"]
    assert [artifact.context for artifact in record.artifacts] == [2048, 512, CONTEXT]
    assert len(record.ratios()) == 4


def test_a_file_says_of_its_weights_what_it_knows(
    record: Record[DecoderResult], stock: Path
) -> None:
    gguf, pte, genai = record.artifacts
    assert gguf.model == {"id": "a stock file"}
    assert gguf.schemes == count_types(open_checked(stock))
    assert gguf.file_bytes == stock.stat().st_size
    for unknown in (pte, genai):
        assert (unknown.model, unknown.schemes, unknown.traffic) == ({"id": None}, {}, None)
    decode = json.loads(record.to_json())["artifacts"][1]["tests"][1]["summary"]
    assert decode["bytes_per_token"] is decode["bandwidth_share"] is None
    row = next(line for line in render(record).splitlines() if line.startswith("| bare.pte"))
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == ["-", "-"]


def test_traffic_of_a_gguf_is_what_gguf_py_counts(stock: Path) -> None:
    """Tied, so every tensor once; 3 layers of attention with 2 heads of 64, keys and values."""
    tensors = GGUFReader(stock).tensors
    traffic = file_traffic(open_checked(stock))
    assert traffic is not None
    assert traffic.weight_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert traffic.kv_bytes_per_position == 3 * 2 * 2 * 64 * 2
    types = count_types(open_checked(stock))
    assert sum(count["tensors"] for count in types.values()) == len(tensors)
    assert set(types) == {"Q8_0", "F32"}


def test_a_test_beyond_a_files_context_is_refused(
    stock: Path, program: Path, genai_folder: Path
) -> None:
    with pytest.raises(
        EdgekitError, match="genai: `prompts` 65 needs .* context is 64: ask for less$"
    ):
        bench([genai_folder], prompts=(65,), generates=(0,), threads=1)
    with pytest.raises(
        EdgekitError, match="gguf: `prompts` 2049 needs .* context is 2048: ask for less$"
    ):
        bench([stock], prompts=(2049,), generates=(0,), threads=1)
    with pytest.raises(
        EdgekitError, match="pte: `prompts` 513 needs .* context is 512: ask for less$"
    ):
        bench([program], prompts=(513,), generates=(0,), threads=1)


def test_eval_of_foreign_files(stock: Path, program: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ("--text", text, "--context", 64, "-t", 1)
    gguf = run_json("eval", stock, *options, "--reference", "lfm2-tiny")
    assert gguf["engine"]["name"] == "gguf"
    assert 0 < gguf["divergence"]["kld"]["value"] < 0.003
    pte = run_json("eval", program, *options, "--reference", stock, "--tokenizer", FOLDER)
    assert pte["engine"]["name"] == "executorch"
    assert 0 < pte["divergence"]["kld"]["value"] < 0.006


def test_fit_of_an_artifact(tiny_artifact: Path) -> None:
    manifest = json.loads((tiny_artifact / "edgekit.json").read_text())
    facts = run_json("fit", tiny_artifact, "--no-measure")
    planned = run_json("fit", "lfm2-tiny", "--int8", "--context", 512, "--no-measure")
    assert (facts["model"], facts["recipe"]) == (manifest["model"]["id"], manifest["recipe"])
    assert facts["bytes"]["file_bytes"] == (tiny_artifact / "model.pte").stat().st_size
    for name in ("context", "kv_cache_bytes", "weight_bytes", "resident_bytes"):
        assert facts["bytes"][name] == planned["bytes"][name]


@pytest.mark.parametrize("option", [("--int4",), ("--context", "64")])
def test_an_artifact_is_not_planned_anew(tiny_artifact: Path, option: tuple[str, ...]) -> None:
    words = "is an artifact, which has its target, its recipe and its context already"
    assert_only_one_line(run("fit", tiny_artifact, "--no-measure", *option), words)


def test_fit_of_a_bare_file_is_refused(stock: Path) -> None:
    assert_only_one_line(
        run("fit", stock, "--no-measure"), "is a single file, whose model fit does"
    )


def test_fit_of_a_gguf_artifact(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-gguf"
    options = ("--target", "gguf", "--int8", "--context", 128, "-o", folder)
    assert run("export", "lfm2-tiny", *options).exit_code == 0
    found = run_json("fit", folder, "--no-measure")["bytes"]
    tensors = GGUFReader(folder / "model.gguf").tensors
    assert found["weight_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors)
    assert found["kv_cache_bytes"] == 128 * 3 * 2 * 2 * 64 * 2
    assert found["packed_bytes"] == 0
    assert found["file_bytes"] == (folder / "model.gguf").stat().st_size
    file = find_model_file(folder)
    assert (file.engine, file.context, file.longest) == ("gguf", 128, 128)
    with file.load(threads=1) as engine:
        assert (engine.name, engine.context) == ("gguf", 128)
