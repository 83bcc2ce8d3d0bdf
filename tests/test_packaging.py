"""What is installed: `edgekit` alone, with every package and every data file, each once.

Slow, because a wheel and an sdist are built: `make package` runs this file, `make test` does not.
"""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ROOMS = ("exporters", "quantize", "runtime", "devices")
SOURCES = ("edgekit", *ROOMS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked and the new files, so that building leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in _files_of_the_tree():
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("--wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("--sdist", checkout, tmp_path_factory.mktemp("sdist"))


def test_every_package_of_the_tree_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(_installed(name).parent.parts)
        for name in _package_sources()
        if name.name == "__init__.py"
    }
    assert set(listed) == found
    assert len(listed) == len(found)


def test_wheel_holds_the_files_of_the_tree_and_nothing_else(wheel: Path) -> None:
    expected = {str(_installed(name)) for name in _package_sources()}
    assert _package_files(wheel) == expected
    assert {
        "edgekit/py.typed",
        "edgekit/models/catalogue.toml",
        "edgekit/models/lfm2_tiny/model.safetensors",
        "edgekit/models/lfm2_tiny/tokenizer.json",
        "edgekit/devices/profiles/raspberry-pi-5.toml",
        *(f"edgekit/runtime/engines/trial_models/model.{end}" for end in ("gguf", "onnx", "pte")),
    } <= expected


def test_wheel_holds_every_file_once_and_no_room_at_the_top(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    assert max(Counter(names).values()) == 1
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edgekit"}
    assert len(tops) == 2


def test_wheel_carries_licence_command_and_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    folder = info.removesuffix("METADATA")
    assert f"{folder}licenses/LICENSE" in archive.namelist()
    assert "edgekit = edgekit.__main__:main" in archive.read(f"{folder}entry_points.txt").decode()
    metadata = archive.read(info).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch==2.13.0" in metadata


def test_sdist_makes_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    assert max(Counter(names).values()) == 1
    (unpacked,) = tmp_path.iterdir()
    again = _build("--wheel", unpacked, tmp_path / "dist")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    _run([*pip, "--target", str(site), str(wheel)], elsewhere)
    script = (
        "import edgekit, edgekit.devices.profile, edgekit.formats.artifact.write\n"
        "import edgekit.runtime.bench.decoder\n"
        "from edgekit.quantize.recipe import preset\n"
        "from edgekit.models.source import resolve_model\n"
        "preset('int4')\n"
        "source = resolve_model('lfm2-tiny')\n"
        "source.checkpoint.tensor('model.embed_tokens.weight')\n"
        "print(edgekit.__file__)\n"
    )
    said = _run([sys.executable, "-c", script], elsewhere, PYTHONPATH=str(site))
    assert Path(said.strip()).is_relative_to(site)
    said = _run([sys.executable, "-m", "edgekit", "devices"], elsewhere, PYTHONPATH=str(site))
    assert "raspberry-pi-5" in said
    assert (site / "bin" / "edgekit").is_file()


def _files_of_the_tree() -> list[PurePosixPath]:
    """Names of all files that git tracks or would add; an unpacked sdist has no git."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout, to know which files belong to it")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {PurePosixPath(name) for name in listed.split("\0") if name}
    return sorted(name for name in names if (ROOT / name).exists())  # one may be deleted by now


def _package_sources() -> list[PurePosixPath]:
    """Names of the files that are installed; the links under edgekit/ are none."""
    files = [name for name in _files_of_the_tree() if name.parts[0] in SOURCES]
    return [name for name in files if not (ROOT / name).is_symlink()]


def _installed(name: PurePosixPath) -> PurePosixPath:
    """Where a source file lies when installed: the rooms move into edgekit."""
    return PurePosixPath("edgekit", name) if name.parts[0] in ROOMS else name


def _package_files(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if name.startswith("edgekit/") and not name.endswith("/")}


def _build(kind: str, source: Path, output: Path) -> Path:
    """Build with the setuptools of this environment: nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(output)]
    _run([*command, str(source)], output.parent)
    (built,) = output.iterdir()
    return built


def _run(command: list[str], folder: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=env | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
