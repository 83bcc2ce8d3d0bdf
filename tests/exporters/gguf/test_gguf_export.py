"""`edgekit export --target gguf` as a whole: verified in llama.cpp, complete or absent."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.command_line import assert_one_line, edgekit, interrupted_when, killed_at
from support.gguf_models import small_model
from support.missing import uninstall

from edgekit.cli import main
from edgekit.common.install import install_command
from edgekit.errors import VerificationError
from edgekit.exporters.gguf import tokenizer_check as gguf_tokenizer_check
from edgekit.exporters.verify import decoder as verify
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.gguf.file import GgufFile

CONTEXT = 32
STAGES = (
    "quantizing",
    "computing the reference",
    "writing the file",
    "verifying in llama.cpp",
    "finishing",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "small", eos_token_id=7)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    place = tmp_path / "place"
    place.mkdir()
    return place


def arguments(model: Path | str, output: Path, *more: object) -> list[str]:
    given = ["export", model, "--target", "gguf", "--context", CONTEXT, "-o", output, *more]
    return [str(word) for word in given]


def export(model: Path | str, output: Path, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(model, output, *more))


@pytest.mark.parametrize(
    "scheme",
    ["--int8", "--int4", "--float", "--scheme=w4g32a", "--scheme=w8g32", "--scheme=w4g128"]
    + ["--scheme=w5g32", "--scheme=w6g16"],
)
def test_the_bundled_model_is_verified_in_llama_cpp(place: Path, scheme: str) -> None:
    done = export("lfm2-tiny", place / "out", scheme, "--context", 256, "--json")
    assert done.exit_code == 0, done.stderr
    manifest: dict[str, Any] = json.loads(done.stdout)
    figures = manifest["verification"]
    assert figures["verified"] is True
    assert figures["kld_engine_vs_quantized"] <= 0.003
    assert figures["kld_chunked_vs_whole_prefill"] <= 0.003
    assert figures["lengths"] == [1, 255, 256]
    assert figures["tokenizer"]["texts"] > 4000
    artifact = Artifact.open(place / "out")
    assert artifact.target == "gguf"
    assert artifact.damaged_files() == []
    assert (artifact.folder / "tokenizer.json").is_file()
    assert GgufFile.open(artifact.model_path).metadata["general.name"] == "lfm2-tiny"


def test_the_result_says_what_was_compared(place: Path) -> None:
    done = export("lfm2-tiny", place / "out", "--int8")
    assert done.exit_code == 0, done.stderr
    assert "engine against quantized model" in done.stdout
    assert re.search(r"tokenizer: the model's own ids in [\d,]+ texts of", done.stdout)


def test_random_weights_need_no_tokenizer(tmp_path: Path, place: Path) -> None:
    folder = small_model(tmp_path / "bare", tokenizer=False)
    done = export(folder, place / "out", "--int8", "--random-weights", "--json")
    assert done.exit_code == 0, done.stderr
    assert "tokenizer" not in json.loads(done.stdout)["verification"]
    file = GgufFile.open(place / "out" / "model.gguf")
    assert "stand-in" in file.metadata["general.description"]


def refused(done: Result, place: Path, *words: str) -> None:
    assert_one_line(done.exit_code, done.stderr, *words)
    assert list(place.iterdir()) == []


def test_a_scheme_that_it_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, place: Path
) -> None:
    folder = small_model(tmp_path / "odd", intermediate_size=80)
    (folder / "model.safetensors").unlink()
    refused(export(folder, place / "out", "--int8"), place, "target gguf cannot hold w8 in rows")


def test_a_tokenizer_that_llama_cpp_has_not_leaves_nothing(model: Path, place: Path) -> None:
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"normalizer": {"type": "NFKC"}}))
    refused(export(model, place / "out", "--int8"), place, "tokenizer.json: has a normalizer")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_model_leaves_nothing(model: Path, place: Path, name: str) -> None:
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    refused(export(model, place / "out", "--int8"), place, name)


def test_other_ids_leave_nothing(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: object, **options: object) -> list[int]:
        return [1, 2, 3]

    monkeypatch.setattr(gguf_tokenizer_check, "llama_token_ids", other)
    done = export(model, place / "out", "--int8")
    assert done.exit_code == VerificationError.exit_status
    assert "tokenizer: the ids of" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


def test_other_logits_leave_nothing(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that no file can hold stands for a file that does not hold the real one."""
    for bound in ("MAX_KLD", "SHARE_OF_QUANTIZATION", "TIMES"):
        monkeypatch.setattr(verify, bound, -1.0)
    done = export(model, place / "out", "--int8")
    assert done.exit_code == VerificationError.exit_status
    assert done.stderr.startswith("edgekit: verification: the file against the quantized model: ")
    assert list(place.iterdir()) == []


def test_without_the_engine_it_is_unverified_and_says_so(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`edgekit verify` verifies it later, with the tokenizer."""
    with monkeypatch.context() as patch:
        uninstall(patch, "llama_cpp", "edgekit.runtime.engines.gguf")
        done = export(model, place / "out", "--int8")
    assert done.exit_code == 0, done.stderr
    assert "is not verified: the gguf engine needs" in done.stderr
    assert install_command("gguf") in done.stderr
    assert Artifact.open(place / "out").manifest.verification["verified"] is False
    later = edgekit("verify", place / "out", "--model", model, "--json")
    assert later.returncode == 0, later.stderr
    assert json.loads(later.stdout)["verification"]["tokenizer"]["texts"] > 4000


@pytest.mark.parametrize("command", ["run", "bench", "inspect"])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty", "gone"])
def test_a_damaged_artifact(gguf_artifact: Path, tmp_path: Path, command: str, damage: str) -> None:
    folder = Path(shutil.copytree(gguf_artifact, tmp_path / "artifact"))
    path = folder / "model.gguf"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        other = {"cut": content[: len(content) // 2], "empty": b""}
        path.write_bytes(other.get(damage, b"\xff" * len(content)))
    more = {"run": ["hello"], "bench": ["-p", "4", "-n", "2", "-r", "1"], "inspect": []}
    done = edgekit(command, folder, *more[command])
    assert_one_line(done.returncode, done.stderr, "model.gguf")


@pytest.fixture(scope="module")
def gguf_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact; a test that changes it works on a copy."""
    folder = tmp_path_factory.mktemp("gguf")
    done = export(small_model(folder / "small", eos_token_id=7), folder / "out", "--int8")
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def test_a_disk_that_is_full_leaves_nothing(model: Path, place: Path) -> None:
    """A limit on file sizes: the write fails with EFBIG instead of ENOSPC."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = edgekit(*arguments(model, place / "out", "--int8"), prepare=limit)
    assert_one_line(done.returncode, done.stderr, "out: cannot be written: File too large")
    assert list(place.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_export_leaves_no_artifact(model: Path, place: Path, stage: str) -> None:
    words = arguments(model, place / "out", "--int8")
    seen = killed_at(stage, STAGES, words)
    assert seen == STAGES[: STAGES.index(stage) + 1]
    assert not (place / "out").exists()
    left = [path.name for path in place.iterdir()]
    assert all(re.fullmatch(r"\.out\.\d+\.partial", name) for name in left)
    if stage == "writing the file":  # once: the next export removes what was left and succeeds
        done = edgekit(*words)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(model: Path, place: Path) -> None:
    errors = interrupted_when(
        lambda: any(place.iterdir()), arguments(model, place / "out", "--int8")
    )
    assert errors == "edgekit: interrupted\n"
    assert list(place.iterdir()) == []
