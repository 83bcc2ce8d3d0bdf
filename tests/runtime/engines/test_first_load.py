"""The trial of an engine's library: its model is there, loads, and computes."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from edgekit.runtime.engines import first_load
from edgekit.runtime.engines.crash import library_of
from edgekit.runtime.engines.registry import ENGINES

LIBRARIES = {name: library_of(name) for name in ENGINES.packages}
TRIED = [name for name, library in LIBRARIES.items() if library.code]


def test_every_engine_with_machine_code_has_a_trial_model() -> None:
    assert TRIED == ["executorch", "gguf", "onnx"]
    for name in TRIED:
        assert (first_load._MODELS / LIBRARIES[name].trial).is_file(), name


@pytest.mark.parametrize("engine", TRIED)
def test_a_trial_model_loads_and_runs(engine: str) -> None:
    """In a process of its own, as for users; False is what users would not hear of."""
    if find_spec(LIBRARIES[engine].code[0][0]) is None:
        pytest.skip(f"{engine} is not installed")
    assert first_load._survives(engine)


@pytest.mark.parametrize(
    "content", ["", "processor : 0\n", "model : a\ncpu MHz : 1\n\nmodel : b\n"]
)
def test_whatever_the_kernel_says_of_the_cpu_ends(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cpuinfo"
    place.write_text(content)
    monkeypatch.setattr(first_load, "_CPUINFO", place)
    assert first_load._cpu() == [line for line in content.splitlines()[:1] if line]
