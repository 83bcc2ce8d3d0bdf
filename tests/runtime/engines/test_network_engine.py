"""Engines of modules, of which a process may have several open."""

from pathlib import Path

import numpy as np
import pytest
from support.traced_nets import batch_for, make_net

import edgekit
from edgekit.common import last_words
from edgekit.runtime.engines.network_engine import load_module


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_the_engine_that_computes_is_known_though_another_was_opened_later(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash is reported with the file whose engine it was."""
    inputs = batch_for("residual", 2)
    path = edgekit.export_module(
        make_net("residual"), (inputs,), tmp_path / "out", target=target, recipe="float"
    ).model_path
    shared = last_words.SharedWords()
    monkeypatch.setattr(last_words, "_words", last_words.Words())
    monkeypatch.setattr(last_words, "_shared", shared)
    with load_module(target, path) as first, load_module(target, path) as second:
        for engine, number in ((first, 0), (second, 1), (first, 0)):
            engine.run([np.asarray(inputs)])
            assert shared.read().active == number
    assert shared.read().active == last_words.NO_ENGINE
    assert [tuple(each) for each in shared.read().engines] == [(target, str(path))] * 2
