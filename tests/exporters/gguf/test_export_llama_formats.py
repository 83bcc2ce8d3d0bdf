"""llama.cpp's own formats as `edgekit export` offers them: the table, the file, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.float_gguf import write_float_gguf

from edgekit.cli import main
from edgekit.common.progress import Progress
from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.llama.formats import FORMATS
from edgekit.exporters.gguf.llama.imatrix import Imatrix, Statistics
from edgekit.exporters.gguf.llama.quantize import quantize_gguf
from edgekit.exporters.gguf.names import gguf_names
from edgekit.exporters.gguf.readback import StoredWeights
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.gguf.file import GgufFile
from edgekit.models.source import resolve_model
from edgekit.workflows import export as model_export
from edgekit.workflows.api import export_model

FORMAT = ("--target", "gguf", "--scheme", "q4_k_m")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def run_json(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export as where the engine is not installed: what it computes is tested elsewhere."""
    monkeypatch.setattr(model_export, "_missing_engine", lambda _name: "there is none")


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of random sums for the bundled model."""
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    random = np.random.default_rng(0)
    config = resolve_model("lfm2-tiny").config
    shapes, names = config.tensor_shapes(), gguf_names(config)
    entries = {
        names[name]: Statistics(random.lognormal(size=shape[1]).astype(np.float32), 512)
        for name, shape in shapes.items()
        if name.startswith("model.layers") and len(shape) == 2
    }
    Imatrix(entries, ("text",), 1, 512).save(path)
    return path


@pytest.mark.usefixtures("unverified")
def test_the_file_is_the_float_file_quantized_and_the_plan_tells_it(
    tmp_path: Path, imatrix: Path
) -> None:
    out = tmp_path / "artifact"
    given = ("lfm2-tiny", *FORMAT, "--imatrix", imatrix)
    planned = run_json(*given, "--dry-run")
    made = run_json(*given, "-o", out)
    assert made["recipe"] == "Q4_K_M"
    assert made["tensors"] == planned["tensors"]
    assert made["file"] == "model.gguf"
    assert "llama-cpp-python" in made["versions"]
    assert "float.gguf" not in {path.name for path in out.iterdir()}
    floats, _ = write_float_gguf("lfm2-tiny", tmp_path)
    quantize_gguf(
        floats, tmp_path / "q.gguf", FORMATS["Q4_K_M"], lambda _stage: None, imatrix=imatrix
    )
    assert (out / "model.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()

    stored = GgufFile.open(out / "model.gguf").tensors
    names = gguf_names(resolve_model("lfm2-tiny").config)
    for row in made["tensors"]:
        if "same_as" not in row:
            tensor = stored[names[row["tensor"]]]
            assert (row["scheme"], row["bytes"]) == (tensor.type, tensor.nbytes)
    head = made["tensors"][-1]
    assert (head["tensor"], head["scheme"]) == ("lm_head.weight", "Q6_K")
    assert head["same_as"] == "model.embed_tokens.weight"
    assert planned["bytes"] == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.usefixtures("unverified")
def test_a_file_that_is_not_what_was_planned_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_format(
        source: Path, output: Path, form: object, progress: Progress, imatrix: Path | None
    ) -> object:
        return quantize_gguf(source, output, FORMATS["Q6_K"], progress, imatrix=imatrix)

    monkeypatch.setattr("edgekit.exporters.gguf.decoder.quantize_gguf", other_format)
    done = run("lfm2-tiny", *FORMAT, "-o", tmp_path / "artifact", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["status"] == 1
    assert "blk.0.shortconv.in_proj.weight: llama.cpp was to store it as Q4_K, " in done.stderr
    assert "and the file has Q6_K, " in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unverified")
def test_from_python(tmp_path: Path) -> None:
    artifact = export_model("lfm2-tiny", tmp_path / "artifact", target="gguf", recipe="iq4_nl")
    assert artifact.manifest.recipe == "IQ4_NL"
    schemes = {row.scheme for row in artifact.manifest.tensors}
    assert schemes == {"F32", "IQ4_NL", "Q5_K", "Q6_K"}


@pytest.mark.usefixtures("unverified")
def test_the_folder_is_named_after_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("lfm2-tiny", "--target", "gguf", "--scheme", "q6_k").exit_code == 0
    assert Artifact.open(tmp_path / "lfm2-tiny-gguf-Q6_K").manifest.recipe == "Q6_K"


@pytest.mark.usefixtures("unverified")
def test_what_the_file_holds_is_read_by_checkpoint_names(tmp_path: Path) -> None:
    artifact = export_model("lfm2-tiny", tmp_path / "artifact", target="gguf", recipe="Q8_0")
    source = resolve_model("lfm2-tiny")
    weights = StoredWeights(artifact.model_path, source.config)
    assert set(weights) == {*source.checkpoint.shapes(), "lm_head.weight"}
    for name, shape in source.checkpoint.shapes().items():
        exact = source.checkpoint.tensor(name).float()
        assert weights[name].shape == shape
        assert (weights[name] - exact).norm() <= 0.006 * exact.norm()
    assert weights["lm_head.weight"].equal(weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("form", FORMATS)
def test_llama_cpp_computes_what_the_file_holds(tmp_path: Path, form: str) -> None:
    """The bound is that of edgekit's own codes: only activations are rounded differently."""
    out = tmp_path / "artifact"
    found = run_json("lfm2-tiny", "--target", "gguf", "--scheme", form, "-o", out)["verification"]
    assert found["kld_engine_vs_quantized"] < 0.003
    assert found["kld_quantized_vs_float"] < 0.05
    again = CliRunner().invoke(main, ["verify", str(out), "--json"])
    assert json.loads(again.stdout)["verification"] == found


def test_a_type_that_does_not_fit_is_told_in_the_table(tmp_path: Path) -> None:
    config = resolve_model("lfm2-tiny").config.to_dict() | {"intermediate_size": 480}
    folder = tmp_path / "narrow"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    given = (folder, "--target", "gguf", "--scheme", "Q4_K_M", "--dry-run")
    rows = {row["tensor"]: row for row in run_json(*given)["tensors"]}
    down = rows["model.layers.1.feed_forward.w2.weight"]
    assert (down["scheme"], down["instead_of"]) == ("Q5_0", "Q4_K")
    assert "instead_of" not in rows["model.layers.1.feed_forward.w1.weight"]
    assert "Q5_0 instead of Q4_K" in run(*given).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target", "executorch", "--scheme", "Q4_K"],
            "--scheme Q4_K_M is one of llama.cpp's own formats, which target executorch cannot",
        ),
        (["--target", "gguf", "--scheme", "Q9_K"], "unknown format 'Q9_K': of llama.cpp's own"),
        (["--target", "gguf", "--scheme", "Q3_K_S"], "there are Q4_0, Q8_0, Q4_K_M, Q5_K_M, "),
        (["--target", "gguf", "--scheme", "iq2_xs"], "schemes are float, w8, "),
        (["--target", "gguf", "--scheme", "w5"], "unknown scheme 'w5'"),
        (["--target", "gguf", "--int8", "--imatrix", "i"], "--imatrix is for llama.cpp's own"),
        (["--target", "executorch", "--int8", "--imatrix", "i"], "--imatrix is for llama.cpp's"),
        ([*FORMAT, "--int8"], "--int8 and --scheme exclude each other"),
        ([*FORMAT, "--imatrix", "none.gguf"], "none.gguf: cannot be read"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("lfm2-tiny", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_imatrix_of_another_model_is_refused_before_any_work(
    tmp_path: Path, imatrix: Path
) -> None:
    with pytest.raises(EdgekitError, match=r"imatrix.gguf: is of another model: .* columns"):
        export_model(
            "lfm2-350m",
            tmp_path / "artifact",
            target="gguf",
            recipe="Q4_K_M",
            random_weights=True,
            imatrix=imatrix,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "fit"])
def test_commands_of_schemes_refuse_a_format(command: str) -> None:
    arguments = [command, "lfm2-tiny", "--scheme", "q5_k"]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "only `edgekit export --target gguf` makes it" in done.stderr
