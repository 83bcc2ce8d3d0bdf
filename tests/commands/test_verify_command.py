"""`edgekit verify`: an artifact is compared anew with the model that it names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgekit.cli import main
from edgekit.models.source import resolve_model
from edgekit.runtime.engines import engine
from edgekit.runtime.engines.registry import ENGINES


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def manifest(artifact: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((artifact / "edgekit.json").read_text())
    return read


def rewrite(artifact: Path, **changes: object) -> None:
    (artifact / "edgekit.json").write_text(json.dumps(manifest(artifact) | changes))


def test_an_unverified_artifact_becomes_a_verified_one(artifact: Path) -> None:
    before = manifest(artifact)
    rewrite(artifact, verification={"verified": False, "reason": "no engine"})
    done = verify(artifact)
    assert done.exit_code == 0, done.stderr
    assert "engine against quantized model" in done.stdout
    assert manifest(artifact) == before


def test_json_is_the_manifest(artifact: Path) -> None:
    said = json.loads(verify(artifact, "--json").stdout)
    assert said == {"artifact": str(artifact), **manifest(artifact)}


def test_a_file_that_computes_something_else_fails(artifact: Path) -> None:
    """The manifest says int4 where the file holds int8, so the model it names is another."""
    rows = [
        row | {"scheme": "w4", "range": "mse"} if row["scheme"] == "w8" else row
        for row in manifest(artifact)["tensors"]
    ]
    rewrite(artifact, tensors=rows)
    before = manifest(artifact)
    done = verify(artifact)
    assert done.exit_code == 1
    assert done.stderr.startswith("edgekit: verification: the file against the quantized model")
    assert manifest(artifact) == before


def test_the_weights_must_be_those_of_the_artifact(artifact: Path, tmp_path: Path) -> None:
    bundled = resolve_model("lfm2-tiny").folder
    assert bundled is not None
    other = tmp_path / "other"
    shutil.copytree(bundled, other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = verify(artifact, "--model", other)
    assert done.exit_code == 2
    assert "was made of other weights" in done.stderr


def test_a_model_that_is_gone_asks_for_its_place(artifact: Path) -> None:
    made_of = manifest(artifact)["model"]
    rewrite(artifact, model=made_of | {"id": "my-folder"})
    done = verify(artifact)
    assert done.exit_code == 2
    assert "say with --model where the weights are" in done.stderr
    assert verify(artifact, "--model", "lfm2-tiny").exit_code == 0


def without_the_engine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put an engine in the place of ExecuTorch whose runtime is not installed."""
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "decoder.py").write_text("import no_such_run_time\n")
    monkeypatch.syspath_prepend(folder.parent)
    packages = {**ENGINES.packages, "executorch": folder.name}
    monkeypatch.setattr(engine, "ENGINES", replace(ENGINES, packages=packages))


def test_without_its_engine_an_artifact_cannot_be_verified(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_the_engine(monkeypatch, tmp_path / "absent_engine")
    done = verify(artifact)
    assert done.exit_code == 2
    assert "the executorch engine needs no_such_run_time: pip install" in done.stderr


def test_an_export_without_the_engine_says_that_it_is_not_verified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patches:
        without_the_engine(patches, tmp_path / "missing_engine")
        folder = _unverified(tmp_path / "out")
    assert verify(folder).exit_code == 0


def _unverified(folder: Path) -> Path:
    command = ["export", "lfm2-tiny", "--target", "executorch", "--context", "16", "-o", folder]
    done = CliRunner().invoke(main, list(map(str, command)))
    assert done.exit_code == 0
    assert "is not verified: the executorch engine needs no_such_run_time" in done.stderr
    assert f"edgekit verify {folder}" in done.stderr
    found = manifest(folder)["verification"]
    assert found["verified"] is False
    return folder


def test_a_damaged_file_is_not_verified(artifact: Path) -> None:
    """A few bytes among the weights would pass by their logits."""
    path = artifact / "model.pte"
    data = bytearray(path.read_bytes())
    data[-64] ^= 1
    path.write_bytes(data)
    done = verify(artifact)
    assert done.exit_code == 1
    assert "damaged since it was exported: model.pte" in done.stderr
