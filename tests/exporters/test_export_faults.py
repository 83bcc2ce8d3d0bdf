"""What goes wrong around an export ends in one line and leaves no artifact."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from support.command_line import assert_one_line, edgekit, interrupted_when, killed_at

from edgekit.cli import main
from edgekit.errors import EdgekitError
from edgekit.exporters.verify import decoder as verify
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.pte.program import Program
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model
from edgekit.workflows.verify import verification_tokens

CONTEXT = 32
STAGES = (
    "quantizing",
    "computing the reference",
    "tracing",
    "lowering to XNNPACK",
    "planning memory",
    "writing the program",
    "verifying in ExecuTorch",
    "finishing",
)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One convolution layer with random bf16 weights and the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    bundled = resolve_model("lfm2-tiny").folder
    assert bundled is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled / name, folder / name)
    raw: dict[str, Any] = {
        "model_type": "lfm2",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 64,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 7,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()
        for name, shape in ModelConfig.from_dict(raw).tensor_shapes().items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    place = tmp_path / "place"
    place.mkdir()
    return place


def arguments(model: Path | str, output: Path, *more: object) -> list[str]:
    """Return an export's arguments; what `more` repeats wins."""
    given = ["export", model, "--target", "executorch", "--int8", "--context", CONTEXT]
    return [str(word) for word in (*given, "-o", output, *more)]


def export(model: Path | str, output: Path, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(model, output, *more))


def assert_refused(done: Result, place: Path, *words: str) -> None:
    assert_one_line(done.exit_code, done.stderr, *words)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--target", "tflite"), "unknown target 'tflite': allowed are executorch, gguf"),
        (("--target", ""), "unknown target ''"),
        (("--context", "65"), "--context 65: "),
        (("--context", "15"), "takes 16 to 64 tokens"),
        (("--context", "-3"), "takes 16 to 64 tokens"),
        (("--context", str(1 << 70)), "takes 16 to 64 tokens"),
        (("--revision", "main"), "is a local folder"),
    ],
)
def test_a_request_that_cannot_be(
    small_model: Path, place: Path, more: tuple[str, ...], words: str
) -> None:
    assert_refused(export(small_model, place / "out", *more), place, words)


def test_a_model_that_is_not_there(place: Path) -> None:
    assert_refused(export("lfm2-9000b", place / "out"), place, "lfm2-9000b")
    assert_refused(export(place, place / "out"), place, "holds no config.json")


def test_an_existing_folder_is_kept_without_force(small_model: Path, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("kept")
    done = export(small_model, place / "out")
    assert_one_line(done.exit_code, done.stderr, "exists; give --force")
    done = export(small_model, place / "out", "--force")
    assert_one_line(done.exit_code, done.stderr, "is no edgekit artifact")
    assert (place / "out" / "mine").read_text() == "kept"


def test_a_place_that_cannot_be_written(small_model: Path) -> None:
    """Nobody, root included, makes a folder in /proc."""
    done = export(small_model, Path("/proc/self/out"))
    assert_one_line(done.exit_code, done.stderr, "/proc/self", "writ")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"PK\3\4 not what it was \xff\n" * 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", [cut, overwrite, empty, Path.unlink])
def test_a_damaged_model(
    model: Path, place: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(model / name)
    assert_refused(export(model, place / "out"), place, name)


def test_a_weight_that_is_no_number(model: Path, place: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xc0\x7f"  # the last tensor's last bf16 becomes NaN
    path.write_bytes(content)
    assert_refused(export(model, place / "out"), place, "tensor model.", "NaN")


def test_a_tokenizer_larger_than_the_vocabulary(model: Path, place: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 4000}))
    rows = 4000
    table = torch.zeros(rows, 64, dtype=torch.bfloat16)
    shapes = ModelConfig.load(model).tensor_shapes()
    weights = {name: torch.ones(shape).bfloat16() for name, shape in shapes.items()}
    save_file(weights | {"model.embed_tokens.weight": table + 1}, model / "model.safetensors")
    assert_refused(export(model, place / "out"), place, "has 4096 tokens", "only 4000")


def test_only_random_weights_are_verified_without_a_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    tokens = verification_tokens(resolve_model(str(model), random_weights=True), CONTEXT)
    assert len(tokens) == CONTEXT
    assert max(tokens) < 4096
    with pytest.raises(EdgekitError, match="tokenizer.json: cannot be read"):
        verification_tokens(resolve_model(str(model)), CONTEXT)


@pytest.mark.slow
def test_random_weights_need_a_configuration_alone(model: Path, place: Path) -> None:
    """Verified on random tokens; what ends a text is the same in all that says it."""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    done = export(model, place / "out", "--random-weights")
    assert done.exit_code == 0, done.stderr
    artifact = Artifact.open(place / "out")
    assert artifact.eos_ids == (7, 9)
    assert Program.open(artifact.model_path).constant_methods["get_eos_ids"] == [7, 9]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((artifact.folder / name).read_text())["eos_token_id"] == [7, 9]


@pytest.mark.parametrize("command", ["run", "bench", "inspect"])
@pytest.mark.parametrize("name", ["model.pte", "edgekit.json"])
@pytest.mark.parametrize("damage", [cut, overwrite, empty, Path.unlink])
def test_a_damaged_artifact(
    tiny_artifact: Path, tmp_path: Path, command: str, name: str, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    damage(folder / name)
    more = {"run": ["hello"], "bench": ["-p", "4", "-n", "2", "-r", "1"], "inspect": []}
    done = CliRunner().invoke(main, [command, str(folder), *more[command]])
    assert_one_line(done.exit_code, done.stderr, name)


@pytest.mark.parametrize("command", ["run", "bench", "inspect"])
def test_a_program_of_the_right_size_and_wrong_content(
    tiny_artifact: Path, tmp_path: Path, command: str
) -> None:
    """In a process of its own: native code reads the file."""
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    content = bytearray((folder / "model.pte").read_bytes())
    content[60:6000] = b"\xff" * 5940
    (folder / "model.pte").write_bytes(content)
    more = {"run": ["hello"], "bench": ["-p", "4", "-n", "2", "-r", "1"], "inspect": []}
    done = edgekit(command, folder, *more[command])
    assert_one_line(done.returncode, done.stderr, "model.pte")


@pytest.mark.slow
def test_an_export_that_fails_its_verification(
    small_model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that no file can hold stands for a file that does not hold the real one."""
    for bound in ("MAX_KLD", "SHARE_OF_QUANTIZATION", "TIMES"):
        monkeypatch.setattr(verify, bound, -1.0)
    done = export(small_model, place / "out")
    assert done.exit_code == 1
    assert done.stderr.startswith("edgekit: verification: the file against the quantized model: ")
    assert done.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_file_that_may_not_grow(small_model: Path, place: Path) -> None:
    """A limit on file sizes: the write fails with EFBIG instead of ENOSPC."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = edgekit(*arguments(small_model, place / "out"), prepare=limit)
    assert_one_line(done.returncode, done.stderr, "out: cannot be written: File too large")
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk(small_model: Path, place: Path) -> None:
    """On a file system of its own, too small for the program."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    prepare = 'mount -t tmpfs -o size=400k tmpfs "$1" || exit 99\n'
    script = prepare + 'shift; "$@"; status=$?; ls -A "$0" >&2; exit $status'
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not there: no file system can be made for the test")
    command = [sys.executable, "-m", "edgekit", *arguments(small_model, place / "out")]
    done = subprocess.run(
        [*mount, script, str(place), str(place), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode in (1, 99) and "edgekit:" not in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    # One line of edgekit's, and none of `ls`: nothing is left.
    assert_one_line(done.returncode, done.stderr, "out: cannot be written: no space left")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_export_leaves_no_artifact(small_model: Path, place: Path, stage: str) -> None:
    words = arguments(small_model, place / "out")
    seen = killed_at(stage, STAGES, words)
    assert seen == STAGES[: STAGES.index(stage) + 1]
    assert not (place / "out").exists()
    left = [path.name for path in place.iterdir()]
    assert all(re.fullmatch(r"\.out\.\d+\.partial", name) for name in left)
    if stage == "writing the program":  # once: the next export removes what was left and succeeds
        assert left
        done = edgekit(*words)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in place.iterdir()] == ["out"]
        assert Artifact.open(place / "out").damaged_files() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_leaves_nothing(
    small_model: Path, place: Path, number: signal.Signals, status: int, word: str
) -> None:
    errors = interrupted_when(
        lambda: any(place.iterdir()), arguments(small_model, place / "out"), number, status
    )
    assert errors == f"edgekit: {word}\n"
    assert list(place.iterdir()) == []
