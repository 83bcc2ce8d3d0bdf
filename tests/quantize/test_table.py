"""Markdown tables, and the benchmark record printed with them."""

from dataclasses import replace

import pytest

from edgekit.common.tables import markdown_table, plain_table
from edgekit.devices.probe.bandwidth import ReadBandwidth
from edgekit.runtime.bench.decoder import DecoderResult, ShapeResult
from edgekit.runtime.bench.record import (
    Bandwidth,
    Gate,
    Interference,
    Memory,
    Record,
    Sample,
    Settings,
)
from edgekit.runtime.bench.tables import render
from edgekit.runtime.decode_bytes import Shape, Traffic
from edgekit.runtime.engines.engine import Threads


def test_numbers_go_right_and_words_left() -> None:
    assert markdown_table(["name", "tok/s"], [["a", "9.5"], ["longer", "-"], ["b", "100"]]) == (
        "| name   | tok/s |\n"
        "| ------ | ----: |\n"
        "| a      |   9.5 |\n"
        "| longer |     - |\n"
        "| b      |   100 |"
    )


def test_align_overrides_what_the_cells_look_like() -> None:
    assert markdown_table(["id", "n"], [["1", "x"]], align="lr") == (
        "| id  |   n |\n| --- | --: |\n| 1   |   x |"
    )


def test_a_plain_table_lines_up_and_ends_its_lines_with_words() -> None:
    assert plain_table([["name", "n", "at"], ["a", "10", ""], ["bc", "9", "x y"]], "lrl") == (
        "name   n  at\na     10\nbc     9  x y"
    )


def test_a_table_without_rows_is_its_header() -> None:
    assert markdown_table(["a", "b"], []) == "| a   | b   |\n| --- | --- |"


def test_cells_cannot_steer_the_terminal() -> None:
    assert "| a?[31m?b |" in markdown_table(["x"], [["a\x1b[31m\ud800b"]])


def test_cells_cannot_break_the_table() -> None:
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[2] == "| x\\|y z |"


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 headers but a row of 1"):
        markdown_table(["a", "b"], [["1"]])


@pytest.mark.parametrize("align", ["c", "lrl"])
def test_a_malformed_alignment_is_refused(align: str) -> None:
    with pytest.raises(ValueError, match="align"):
        markdown_table(["a", "b"], [], align=align)


def artifact(name: str, other: float, temperature: bool | None) -> DecoderResult:
    load = Interference(own=0.9, other=other, waited=0.02)
    gates = (Gate("temperature", 85.0, "below 80 C", temperature),)
    prefill = Sample(0, 16_000_000, (), 20_000_000, load, gates, {})
    decode = Sample(1, 40_000_000, (10_000_000, 30_000_000), None, load, gates, {})
    return DecoderResult(
        name=name,
        path=name,
        target="executorch",
        model={"id": "some-model"},
        schemes={"w8": {"tensors": 3, "bytes": 300}},
        file_bytes=1_500_000,
        context=64,
        engine="executorch",
        engine_version="1.5.1",
        affinity=(0,),
        import_ns=1,
        load_ns=2_500_000,
        memory=Memory(peak=None, before_load=None),
        traffic=Traffic(100_000_000, 0),
        tests=(ShapeResult(Shape("pp", 32), (prefill,)), ShapeResult(Shape("tg", 2), (decode,))),
    )


def record_of(*artifacts: DecoderResult, cache_bytes: int = 1_000_000) -> Record[DecoderResult]:
    once = ReadBandwidth(10.0, "memchr", 1, 100, {"memchr": (10,)})
    cache = {"level": 3, "kind": "unified", "bytes": cache_bytes, "instances": 1}
    return Record(
        edgekit_version="0.1.0",
        timestamp_utc="2026-01-02T03:04:05+00:00",
        machine={"cpu": "a CPU", "isa": ("avx2", "fma"), "cpu_quota": None, "caches": (cache,)},
        settings=Settings({"prompts": [32]}, 1, 1, 0.0, 0),
        conditions_before={},
        conditions_after={},
        bandwidth=Bandwidth(once, once),
        artifacts=artifacts,
    )


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_a_quiet_run_shows_figures_and_no_warning() -> None:
    text = render(record_of(artifact("a", other=0.0, temperature=True)))
    assert text.startswith("a CPU (avx2, fma); 1 thread; 1 repetition; edgekit 0.1.0;")
    assert "read bandwidth 10.0 GB/s before, 10.0 after (1 thread)" in text
    found = rows(text)
    assert ["a", "1.5", "executorch 1.5.1", "2.5", "-", "-", "some-model", "3 w8"] in found
    assert ["a", "pp32", "2000", "2000", "20.0", "-", "-", "-", "-"] in found
    assert ["a", "tg2", "50.00", "50.00", "-", "20.00", "29.00", "5.0", "50%"] in found
    assert "!" not in text
    assert "against" not in text


def test_other_load_marks_the_figures_it_touched() -> None:
    text = render(
        record_of(
            artifact("a", other=0.0, temperature=None), artifact("b", other=0.2, temperature=None)
        )
    )
    speeds = {(row[0], row[1]): row[2] for row in rows(text) if len(row) == 9}
    assert speeds["a", "pp32"] == "2000"
    assert speeds["b", "pp32"] == "2000 !"
    assert "! other load was visible in 2 of 4 repetitions: up to 20% of the CPUs" in text


def test_a_quota_is_not_called_another_load() -> None:
    record = record_of(artifact("a", other=0.0, temperature=None))
    held = Interference(own=0.5, other=0.0, waited=0.49, throttled=0.48)
    tests = tuple(
        replace(test, samples=tuple(replace(one, interference=held) for one in test.samples))
        for test in record.artifacts[0].tests
    )
    artifacts = (replace(record.artifacts[0], tests=tests),)
    machine = {**record.machine, "cpu_quota": 0.5}
    text = render(replace(record, artifacts=artifacts, machine=machine))
    assert "1 thread (a quota grants the time of 0.5 CPUs); 1 repetition" in text
    quota = "the CPU quota of this control group held the threads back in 2 of 2 repetitions: up to"
    assert f"{quota} 48% of their time" in text
    assert "!" not in text


def test_a_failed_gate_is_shown() -> None:
    text = render(record_of(artifact("a", other=0.0, temperature=False)))
    assert "temperature was not below 80 C before 2 of 2 repetitions (up to 85)" in text


def test_several_artifacts_are_compared_with_the_first() -> None:
    pair = record_of(
        artifact("a", other=0.0, temperature=True), artifact("b", other=0.0, temperature=True)
    )
    found = rows(render(pair))
    assert ["artifact", "test", "speed against a", "min-max of pairs"] in found
    assert ["b", "tg2", "1.00x", "1.00-1.00"] in found


def test_fewer_threads_for_decoding_are_said_to_be() -> None:
    both = artifact("a", other=0.0, temperature=True)
    assert "for decoding" not in render(record_of(replace(both, threads=Threads(2, 2))))
    fewer = replace(both, threads=Threads(2, 1))
    note = "a: 1 thread for decoding: a token's weights are 100.0 MB"
    assert note in render(record_of(fewer)).splitlines()


def test_weights_that_fit_the_cache_are_said_to() -> None:
    small = artifact("a", other=0.0, temperature=True)
    assert "no limit" not in render(record_of(small))
    assert "a: the weights of a token (100.0 MB) fit" in render(
        record_of(small, cache_bytes=100_000_000)
    )
