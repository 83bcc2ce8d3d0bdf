"""What is stored once in a `.pte` is read by both that need it, and nothing else changes."""

from pathlib import Path

import pytest

from edgekit.exporters.executorch import sharing as pte_sharing
from edgekit.exporters.executorch.readback import embedding, linears
from edgekit.exporters.executorch.sharing import _equal, _remove, store_once
from edgekit.formats.pte.program import Program, Span
from edgekit.models.source import resolve_model


def test_a_tied_table_lies_once_in_the_file(tiny_artifact: Path) -> None:
    path = tiny_artifact / "model.pte"
    program = Program.open(path)
    table = embedding(program)
    vocabulary = resolve_model("lfm2-tiny").config.vocab_size
    (head,) = (linear for linear in linears(program) if linear.shape[0] == vocabulary)
    assert (head.data, head.scales) == (table.data, table.scales)
    codes = program.read(table.data)
    assert path.read_bytes().count(codes[:4096]) == 1


def test_nothing_is_left_to_share(tiny_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    content = (tiny_artifact / "model.pte").read_bytes()
    path.write_bytes(content)
    store_once(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("cut", [Span(0, 5), Span(3, 4), Span(8, 2), Span(2, 0)])
def test_removing_a_run_of_bytes(
    cut: Span, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pte_sharing, "_BLOCK", block)
    path, content = tmp_path / "bytes", bytes(range(10))
    path.write_bytes(content)
    with path.open("r+b") as file:
        _remove(file, cut)
    assert path.read_bytes() == content[: cut.offset] + content[cut.offset + cut.size :]


@pytest.mark.parametrize("different", [None, 0, 2, 3, 4])
def test_comparing_two_runs_of_bytes(
    different: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pte_sharing, "_BLOCK", 3)
    content = bytearray(b"abcdeabcde")
    if different is not None:
        content[different] ^= 1
    path = tmp_path / "bytes"
    path.write_bytes(content)
    with path.open("rb") as file:
        assert _equal(file, Span(0, 5), Span(5, 5)) == (different is None)
