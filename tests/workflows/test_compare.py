"""`edgekit compare` on real artifacts, its page, and the plots on their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader

from edgekit.cli import main
from edgekit.common.files import sha256_of
from edgekit.common.plots import Axis, Point, bars, lines, scatter
from edgekit.exporters.readback import TensorComparison, stored_size
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.models.config import ModelConfig
from edgekit.runtime.bench.decoder import DecoderResult
from edgekit.runtime.bench.record import Interference
from edgekit.workflows.api import export_model
from edgekit.workflows.compare import Compared, Comparison, compare
from edgekit.workflows.compare_page import page


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def twin(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact in a folder of another name, which tries to be markup."""
    folder = tmp_path_factory.mktemp("twin") / "twin<script>&"
    shutil.copytree(tiny_artifact, folder)
    return folder


@pytest.fixture(scope="module")
def comparison(tiny_artifact: Path, twin: Path) -> Comparison:
    return compare(
        [tiny_artifact, twin],
        TEXT,
        "lfm2-tiny",
        context=64,
        chunks=1,
        prompt=8,
        generate=4,
        repetitions=2,
        threads=1,
    )


def test_equal_files_are_found_equal(comparison: Comparison, tiny_artifact: Path) -> None:
    first, second = comparison.artifacts
    assert comparison.weights_verdict(first.name) == "baseline"
    assert comparison.weights_verdict(second.name) == f"identical to {first.name}"
    assert first.evaluation is not None and second.evaluation is not None
    assert replace(first.evaluation, name="") == replace(second.evaluation, name="")
    assert first.kld is not None and 0 < first.kld < 0.003
    assert first.result.file_bytes == (tiny_artifact / "model.pte").stat().st_size
    manifest = json.loads((tiny_artifact / "edgekit.json").read_text())
    rows = [row for row in manifest["tensors"] if "same_as" not in row]
    held = sum(row["bytes"] for row in rows)
    bits = 8 * held / manifest["model"]["parameters"]
    # Scales that are equal lie in the file once.
    assert first.bits_per_weight == pytest.approx(bits, rel=1e-3)
    ratios = [ratio for row in comparison.tensors if (ratio := row.sqnr[0]) is not None]
    assert len(ratios) == sum(len(row.shape) == 2 for row in comparison.tensors)
    assert all(30 < ratio < 60 for ratio in ratios)  # int8 per channel


def beside_load(comparison: Comparison, share: float) -> Comparison:
    """The same, had another load taken that share of the CPUs, and all gates passed."""
    load = Interference(own=1.0, other=share, waited=0.0)

    def results(one: Compared) -> DecoderResult:
        tests = tuple(
            replace(
                test,
                samples=tuple(replace(s, interference=load, gates=()) for s in test.samples),
            )
            for test in one.result.tests
        )
        return replace(one.result, tests=tests)

    artifacts = tuple(replace(one, result=results(one)) for one in comparison.artifacts)
    record = replace(comparison.record, artifacts=tuple(one.result for one in artifacts))
    return replace(comparison, artifacts=artifacts, record=record)


def test_a_disturbed_speed_is_marked(comparison: Comparison) -> None:
    note = "! other load was visible in 8 of 8 repetitions: up to 40% of the CPUs"
    disturbed, calm = beside_load(comparison, 0.4), beside_load(comparison, 0.01)
    for text in (disturbed.text(), page(disturbed)):
        assert note in text
        assert len(re.findall(r"± [\d,.]+ !", text)) == 4
    for text in (calm.text(), page(calm)):
        assert " !" not in text.replace("<!doctype", "")


def test_speed_may_be_left_out(tiny_artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    done = run(tiny_artifact, tiny_artifact, "-p", 0, "-n", 0, "-t", 1, "--json", "-o", output)
    assert (done.exit_code, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    for one in facts["artifacts"]:
        assert one["tokens_per_second"] == {"pp": None, "tg": None}
        assert one["peak_bytes"] is None
        assert one["engine"] == {"name": "executorch", "version": None}  # none was loaded
    assert facts["file"] == str(output)
    assert facts["artifacts"][1]["weights"].startswith("identical to ")
    assert "speed not measured" in output.read_text()


_ENGINES = ("llama_cpp", "onnxruntime", "executorch.extension", "executorch.runtime")


@pytest.mark.slow
def test_what_files_say_needs_no_engine(tiny_artifact: Path, tmp_path: Path) -> None:
    """In a process in which no runtime can be imported, as where none is installed."""
    places = [tiny_artifact]
    for target in ("gguf", "onnx"):
        places.append(
            export_model("lfm2-tiny", tmp_path / target, target=target, context=64).folder
        )
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.startswith({_ENGINES!r}):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "edgekit", "compare", *map(str, places)]
    found = subprocess.run(
        [*command, "-p", "0", "-n", "0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.stdout.splitlines()]
    assert [row[1] for row in rows[2:5]] == ["executorch", "gguf", "onnx"]
    assert [row[-1] for row in rows[3:5]] == [f"identical to {tiny_artifact.name}"] * 2
    needed = subprocess.run(
        [*command, "-p", "8", "-n", "0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert needed.returncode != 0
    assert "pip install " in needed.stderr


def test_perplexities_of_other_tokens_are_told_apart(
    comparison: Comparison, tiny_artifact: Path, tmp_path: Path
) -> None:
    """One artifact reads the text as more tokens: of bytes alone both say the same thing."""
    other = tmp_path / "other"
    shutil.copytree(tiny_artifact, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(content))
    manifest = json.loads((other / "edgekit.json").read_text())
    manifest["files"]["tokenizer.json"] = {
        "bytes": (other / "tokenizer.json").stat().st_size,
        "sha256": sha256_of(other / "tokenizer.json"),
    }
    (other / "edgekit.json").write_text(json.dumps(manifest))
    options = {"context": 64, "chunks": 1, "prompt": 0, "generate": 0, "threads": 1}
    found = compare([tiny_artifact, other], TEXT, **options)  # type: ignore[arg-type]
    assert not found.same_tokens
    headers, rows = found.table()
    for one, row in zip(found.artifacts, rows, strict=True):
        assert one.evaluation is not None
        cells = dict(zip(headers, row, strict=True))
        assert cells["perplexity*"] == f"{one.evaluation.perplexity.value:.4f}"
        assert cells["bits/byte"] == f"{one.evaluation.bits_per_byte:.4f}"
    note = "* perplexities of different tokens, for vocabularies differ: they do not compare;"
    assert note in found.text()
    assert note in page(found)
    assert "bits per byte against bytes" in page(found)
    assert "perplexity against bytes" not in page(found)
    assert found.to_dict()["same_tokens"] is False
    assert comparison.same_tokens
    assert "bits/byte" not in comparison.text()


def test_one_repetition_has_no_deviation(tiny_artifact: Path) -> None:
    done = run(tiny_artifact, "-p", 4, "-n", 2, "-r", 1, "-t", 1)
    assert done.exit_code == 0, done.stderr
    assert "±" not in done.stdout


def test_bits_per_weight_are_those_of_inspect(tmp_path: Path) -> None:
    """And those of gguf-py: bytes of tensors, without tokenizer and metadata."""
    artifact = export_model("lfm2-tiny", tmp_path / "a", target="gguf", context=64)
    tensors = GGUFReader(artifact.model_path).tensors
    bits = (
        8 * sum(int(one.n_bytes) for one in tensors) / sum(int(one.n_elements) for one in tensors)
    )
    shown = CliRunner().invoke(main, ["inspect", str(artifact.model_path), "--json"])
    assert json.loads(shown.stdout)["bits_per_weight"] == bits
    config = ModelConfig.load(artifact.folder)
    for given in (config, None):
        assert stored_size("gguf", artifact.model_path, given).bits_per_weight == bits


def test_the_table_says_what_is_known(comparison: Comparison, tiny_artifact: Path) -> None:
    headers, (_, second) = comparison.table()
    row = dict(zip(headers, second, strict=True))
    assert row["artifact"] == "twin<script>&"
    assert row["weights"] == f"identical to {tiny_artifact.name}"
    assert row["KLD"] == f"{comparison.artifacts[1].kld:.6f}"
    assert re.fullmatch(r"[\d,.]+ ± [\d,.]+( !)?", row["pp8 tok/s"])
    assert re.fullmatch(r"[\d,.]+ ± [\d,.]+( !)?", row["tg4 tok/s"])
    assert beside_load(comparison, 0.0).text().count("\n") == 3


def test_json_holds_everything(comparison: Comparison) -> None:
    facts: dict[str, Any] = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert [one["weights"] for one in facts["artifacts"]] == [
        "baseline",
        f"identical to {comparison.read[0]}",
    ]
    assert len(facts["tensors"]) == len(comparison.tensors)
    assert facts["bench"]["kind"] == "edgekit-bench"


class Outside(HTMLParser):
    """Collects whatever a page would load or run, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.found.append((tag, None))
        self.found += [pair for pair in attrs if pair[0] in ("src", "href") or pair[0][:2] == "on"]
        if tag not in ("meta", "line", "rect", "circle", "polygon", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_needs_nothing_from_elsewhere(comparison: Comparison) -> None:
    text = page(comparison)
    parser = Outside()
    parser.feed(text)
    assert parser.found == []
    assert "@import" not in text and "url(" not in text and "http" not in text
    assert "twin<script>" not in text and "twin&lt;script&gt;&amp;" in text
    assert "prefers-color-scheme: dark" in text


def plots_of(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", text, re.DOTALL)]


def test_the_page_plots_every_question(comparison: Comparison) -> None:
    titles = re.findall(r"<figcaption>(.*?)<", page(comparison))
    assert titles == [
        "Divergence against bytes",
        "Decode against bytes",
        "Prefill",
        "Weights per layer",
    ]
    axes = {
        element.text
        for plot in plots_of(page(comparison))
        for element in plot.iter("text")
        if element.get("class") == "axis"
    }
    assert axes == {
        "model files (MB)",
        "mean KLD (nats)",
        "decode (tokens/s)",
        "prefill (tokens/s)",
        "layer",
        "SQNR (dB)",
    }


def test_without_text_and_reference_the_rest_remains(comparison: Comparison) -> None:
    bare = replace(
        comparison,
        reference=None,
        artifacts=tuple(replace(one, evaluation=None) for one in comparison.artifacts),
        tensors=tuple(replace(row, signal=None, noise=(None, None)) for row in comparison.tensors),
    )
    titles = re.findall(r"<figcaption>(.*?)<", page(bare))
    assert titles == ["Decode against bytes", "Prefill"]
    headers, (row, _) = bare.table()
    assert [row[headers.index(name)] for name in ("perplexity", "KLD")] == ["-", "-"]


def test_weights_that_differ_and_weights_that_cannot_be_read(comparison: Comparison) -> None:
    row = TensorComparison("a", (2, 2), (0.0, 0.25), (0, 1), None, (None, None))
    other = TensorComparison("b", (2,), (0.0, None), (0, None), None, (None, None))
    differing = replace(comparison, tensors=(row, other))
    assert differing.weights_verdict(comparison.artifacts[1].name) == "2 of 2 differ"
    unread = replace(
        comparison,
        read=(comparison.read[0],),
        tensors=(replace(row, differences=(0.0,), same_as=(0,), noise=(None,)),),
        artifacts=(comparison.artifacts[0], replace(comparison.artifacts[1], unread="not known")),
    )
    assert unread.weights_verdict(comparison.artifacts[1].name) is None
    assert beside_load(unread, 0.0).text().endswith("twin<script>&: not known")
    assert "twin&lt;script&gt;&amp;: not known." in page(unread)


def test_the_command_writes_its_page(tiny_artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    arguments = (tiny_artifact, "-p", 8, "-n", 0, "-r", 1, "-t", 1, "-o", output)
    done = run(*arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "| artifact" in done.stdout
    assert done.stdout.endswith(f"\nwrote {output}\n")
    assert output.read_text().startswith("<!doctype html>")
    again = run(*arguments)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "exists; give --force" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["missing"], "missing"),
        (["lfm2-tiny", "--text", "missing.txt"], "missing.txt"),
        (["lfm2-tiny", "-o", f"{__file__}/page.html"], "is no folder"),
        (["lfm2-tiny", "-o", "/proc/page.html"], "/proc: is not writable"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert word in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", "0"], "threads must be at least 1, not 0"),
        (["--context", "3"], "--context must be at least 4, not 3"),
        (["-p", "100000"], "-p 100000 needs 100000 positions"),
        (["-n", "100000"], "-n 100000 needs 100000 positions"),
    ],
)
def test_a_mistake_is_refused_before_weights_are_read(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    read_weights = Mock(return_value=iter(()))
    monkeypatch.setattr("edgekit.workflows.compare.read_weights", read_weights)
    done = run(tiny_artifact, "--text", __file__, "-p", 8, "-n", 4, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    read_weights.assert_not_called()
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "zero", "ends"),
    [
        ([3.0, 97.0], True, (0.0, 100.0)),
        ([13.4, 14.1], False, (13.4, 14.2)),
        ([5.0], False, (2.0, 8.0)),
        ([0.0], True, (-0.6, 0.6)),
        ([0.0003], True, (0.0, 0.0003)),
    ],
)
def test_linear_axes_are_round_and_cover_the_values(
    values: list[float], zero: bool, ends: tuple[float, float]
) -> None:
    axis = Axis.over("x", values, zero)
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert 3 <= len(axis.ticks) <= 9


def test_logarithmic_axes_have_ticks_inside() -> None:
    for values in ([1e-6, 0.02], [0.0007, 0.004], [3.0, 3.0]):
        axis = Axis.log_over("x", values)
        assert all(0 < axis.place(value) < 1 for value in values)
        assert axis.ticks and all(0 <= axis.place(tick) <= 1 for tick in axis.ticks)


def test_labels_of_near_points_do_not_cover_each_other() -> None:
    points = [Point(index, f"artifact-{index}", 7.0 + index / 50, 1.0) for index in range(4)]
    x, y = Axis.over("MB", [8.0]), Axis.over("KLD", [2.0])
    plot = ElementTree.fromstring(scatter("t", points, x, y))
    boxes = []
    for element in plot.iter("text"):
        if element.get("class") == "label":
            wide = 6.6 * len(element.text or "")
            left = (
                float(element.get("x", ""))
                - {"start": 0, "middle": wide / 2, "end": wide}[element.get("text-anchor", "")]
            )
            boxes.append((left, float(element.get("y", "")), left + wide))
    assert len(boxes) == 4
    for index, (left, base, right) in enumerate(boxes):
        for other_left, other_base, other_right in boxes[:index]:
            assert right <= other_left or other_right <= left or abs(base - other_base) >= 12


def test_bars_and_lines_are_drawn_to_scale() -> None:
    axis = Axis.over("tokens/s", [100.0])
    plot = ElementTree.fromstring(bars("t", [Point(0, "a", 100, 0), Point(1, "b", 25, 0)], axis))
    long, short = (
        float(bar.get("width", "")) for bar in plot.iter("rect") if bar.get("height") == "16"
    )
    assert long == pytest.approx(4 * short, rel=0.01)
    drawn = ElementTree.fromstring(
        lines("t", [(0, [(0, 10.0), (1, 20.0)])], ["0", "1"], "layer", Axis.over("dB", [20.0]))
    )
    (path,) = (line.get("points", "") for line in drawn.iter("polyline"))
    (_, low), (_, high) = (tuple(map(float, pair.split(","))) for pair in path.split())
    assert low > high  # up is more
