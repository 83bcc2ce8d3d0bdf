"""`edgekit inspect --sensitivity`, held against whole runs of a model with one tensor quantized."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from edgekit.cli import main
from edgekit.errors import EdgekitError
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.formats.artifact.read import Artifact
from edgekit.metrics.logits import kld
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.random_weights import RandomCheckpoint
from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.workflows import sensitivity as module
from edgekit.workflows.sensitivity import FIRST, Sensitivity, sensitivity

W4 = parse_scheme("w4g32")
SHORT = TEXT[:200]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgekit" / "sensitivity"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return sensitivity("lfm2-tiny", W4, SHORT)


@pytest.mark.parametrize(
    "name",
    [
        EMBEDDING,
        "model.layers.0.conv.in_proj.weight",
        "model.layers.4.self_attn.v_proj.weight",
        "model.layers.7.feed_forward.w2.weight",
        HEAD,
    ],
)
def test_a_tensors_cost_is_that_of_a_whole_run(measured: Sensitivity, name: str) -> None:
    source = resolve_model("lfm2-tiny")
    assert source.folder is not None
    tokens = Tokenizer.load(source.folder).encode(SHORT)
    read = float_reader(source.config, source.checkpoint)

    def quantized(wanted: str) -> Tensor:
        weight = read(wanted)
        return quantize_weight(W4, weight.float()).dequantize() if wanted == name else weight

    batch, start = torch.tensor([tokens]), torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        exact, other = (
            build_eager(source.config, reader, len(tokens)).all_logits(batch, start).numpy()
            for reader in (read, quantized)
        )
    (cost,) = [cost for cost in measured.costs if cost.tensor == name]
    assert cost.kld == pytest.approx(kld(exact[FIRST:], other[FIRST:]), rel=1e-3)


def test_every_matrix_is_ranked(measured: Sensitivity) -> None:
    shapes = resolve_model("lfm2-tiny").config.tensor_shapes()
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    assert {cost.tensor for cost in measured.costs} == matrices | {HEAD}
    figures = [cost.kld for cost in measured.costs]
    assert figures == sorted(figures, reverse=True)
    assert figures[-1] > 0
    for cost in measured.costs:
        rows, columns = shapes[EMBEDDING if cost.tensor == HEAD else cost.tensor]
        assert cost.bytes_saved == rows * columns * 4 - rows * columns // 2 - rows * columns // 16


class Killed(BaseException):
    """What no handler of the work catches."""


def test_what_was_measured_before_a_kill_is_not_measured_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, measured: Sensitivity
) -> None:
    def kill_at_the_third(done: int, total: int, label: str) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        sensitivity("lfm2-tiny", W4, SHORT, kill_at_the_third)
    (file,) = cache.glob("*.json")
    kept = json.loads(file.read_text())["figures"]
    assert len(kept) == 3

    steps = []
    again = sensitivity("lfm2-tiny", W4, SHORT, lambda done, total, label: steps.append(label))
    assert len(steps) == len(measured.costs) - 3 + 1
    assert not kept.keys() & set(steps)
    assert again.costs == measured.costs

    def no_run(*arguments: object) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(module._FloatRun, "of", no_run)
    assert sensitivity("lfm2-tiny", W4, SHORT).costs == measured.costs


@pytest.mark.parametrize(
    "change", [{"version": 0}, {"figures": [1]}, {"figures": {"a": "b"}}, None]
)
def test_a_cache_that_is_not_ours_is_measured_anew(
    cache: Path, change: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._FloatRun, "cost", lambda self, name, scheme: (1.0, 0.5))
    sensitivity("lfm2-tiny", W4, SHORT)
    (file,) = cache.glob("*.json")
    facts = json.loads(file.read_text())
    file.write_text("{" if change is None else json.dumps(facts | change))
    monkeypatch.setattr(module._FloatRun, "cost", lambda self, name, scheme: (2.0, 0.5))
    assert {cost.kld for cost in sensitivity("lfm2-tiny", W4, SHORT).costs} == {2.0}


def test_two_runs_at_once_keep_each_others_figures(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first tensor is measured another run ends, whose other figures must stay."""
    monkeypatch.setattr(module._FloatRun, "cost", lambda self, name, scheme: (1.0, 0.5))
    whole = len(sensitivity("lfm2-tiny", W4, SHORT).costs)
    (file,) = cache.glob("*.json")
    finished = file.read_text()
    file.unlink()

    def overtaken(self: object, name: str, scheme: Scheme) -> tuple[float, float]:
        if file.exists():
            raise KeyboardInterrupt
        file.write_text(finished)
        return (2.0, 0.5)

    monkeypatch.setattr(module._FloatRun, "cost", overtaken)
    with pytest.raises(KeyboardInterrupt):
        sensitivity("lfm2-tiny", W4, SHORT)
    figures = json.loads(file.read_text())["figures"]
    assert len(figures) == whole
    assert sorted(kld for kld, _ in figures.values()) == [*[1.0] * (whole - 1), 2.0]


def test_other_schemes_and_texts_have_their_own_figures(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._FloatRun, "cost", lambda self, name, scheme: (1.0, 0.5))
    for scheme, text in ((W4, SHORT), (parse_scheme("w8"), SHORT), (W4, TEXT)):
        sensitivity("lfm2-tiny", scheme, text)
    assert len(list(cache.glob("*.json"))) == 3


def test_an_artifact_stands_for_the_model_it_was_made_of(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._FloatRun, "cost", lambda self, name, scheme: (1.0, 0.5))
    assert sensitivity(str(tiny_artifact), W4, SHORT).model == "lfm2-tiny"
    monkeypatch.setattr(RandomCheckpoint, "sha256", lambda self: "another")
    manifest = Artifact.open(tiny_artifact).decoder
    monkeypatch.setattr(
        "edgekit.formats.artifact.read._read_manifest",
        lambda path: replace(manifest, model=replace(manifest.model, sha256="0" * 64)),
    )
    with pytest.raises(EdgekitError, match="was made of other weights than those of lfm2-tiny"):
        sensitivity(str(tiny_artifact), W4, SHORT)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *arguments])


def test_the_command_prints_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module._FloatRun, "cost", lambda self, name, scheme: (len(name) / 1000, 0.0001)
    )
    done = run("lfm2-tiny", "--sensitivity", "--json")
    facts = json.loads(done.stdout)
    assert (done.exit_code, facts["scheme"], facts["costs"][0]["kld"]) == (0, "w4g32", 0.040)
    table = run("lfm2-tiny", "--sensitivity", "--scheme", "w8").stdout
    assert "one tensor at w8" in table
    assert "| 0.040000 | ± 0.000100 |" in table


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["lfm2-tiny", "--sensitivity", "--scheme", "float"], "--scheme float costs nothing"),
        (["lfm2-tiny", "--sensitivity", "--scheme", "w5"], "unknown scheme 'w5'"),
        (["lfm2-tiny", "--sensitivity", "--scheme", "w4g96"], "cannot be w4g96"),
        (["lfm2-tiny", "--sensitivity", "--check"], "exclude each other"),
        (["lfm2-tiny", "--scheme", "w8"], "are for --sensitivity"),
        (["no-such", "--sensitivity"], "no-such"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], word: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_made_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EdgekitError, match="cannot be made: .*XDG_CACHE_HOME"):
        sensitivity("lfm2-tiny", W4, SHORT)


def test_a_short_text_is_refused() -> None:
    with pytest.raises(EdgekitError, match="has 2 tokens; at least 32"):
        sensitivity("lfm2-tiny", W4, "a")
