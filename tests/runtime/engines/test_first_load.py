"""The trial of an engine's library: its model is there, loads, and computes."""

from importlib.util import find_spec

import pytest

from edgekit.runtime.engines import first_load


def test_every_engine_with_machine_code_has_a_trial_model() -> None:
    assert first_load._FILES.keys() == first_load._CODE.keys()
    for name in first_load._FILES.values():
        assert (first_load._MODELS / name).is_file(), name


@pytest.mark.parametrize("engine", first_load._FILES)
def test_a_trial_model_loads_and_runs(engine: str) -> None:
    """In a process of its own, as for users; False is what users would not hear of."""
    if find_spec(first_load._CODE[engine][0][0]) is None:
        pytest.skip(f"{engine} is not installed")
    assert first_load._survives(engine)
