"""The arithmetic of the benchmark record, against figures worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgekit.devices.probe.bandwidth import ReadBandwidth
from edgekit.devices.probe.conditions import Conditions, Temperature
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.parts import TensorRow
from edgekit.models.config import ModelConfig
from edgekit.runtime.bench.accounting import Clocks, interference
from edgekit.runtime.bench.decoder import DecoderResult, ShapeResult
from edgekit.runtime.bench.gates import check_gates
from edgekit.runtime.bench.network import BurstResult, NetworkResult
from edgekit.runtime.bench.record import (
    Bandwidth,
    Interference,
    Memory,
    Record,
    Sample,
    Settings,
    paired_ratio,
    percentile,
    rate,
    spread,
)
from edgekit.runtime.bench.traffic import count_schemes, decode_traffic
from edgekit.runtime.decode_bytes import Shape, Traffic

QUIET = Interference(own=0.9, other=0.01, waited=0.0)
BANDWIDTH = Bandwidth(
    before=ReadBandwidth(20.0, "memchr", 2, 100, {"memchr": (5,)}),
    after=ReadBandwidth(25.0, "memchr", 2, 100, {"memchr": (4,)}),
)


def prefill_sample(order: int, elapsed_ns: int) -> Sample:
    return Sample(order, elapsed_ns, (), elapsed_ns + 1_000_000, QUIET, (), {})


def decode_sample(order: int, *token_ns: int) -> Sample:
    return Sample(order, sum(token_ns), token_ns, None, QUIET, (), {})


def artifact_result(name: str, *tests: ShapeResult) -> DecoderResult:
    return DecoderResult(
        name=name,
        path=f"folder/{name}",
        target="executorch",
        model={"id": "some-model", "revision": "1", "sha256": "ab"},
        schemes={"w8": {"tensors": 2, "bytes": 300}},
        file_bytes=400,
        context=64,
        engine="executorch",
        engine_version="1.5.1",
        affinity=(0, 1),
        import_ns=7,
        load_ns=9,
        memory=Memory(peak=900, before_load=500),
        traffic=Traffic(weight_bytes=100_000_000, kv_bytes_per_position=1000),
        tests=tests,
    )


def record_of(*artifacts: DecoderResult) -> Record[DecoderResult]:
    return Record(
        edgekit_version="0.1.0",
        timestamp_utc="2026-01-02T03:04:05+00:00",
        machine={"cpu": "a CPU", "isa": ("avx2",), "cpu_quota": None, "caches": ()},
        settings=Settings({"prompts": [8], "generates": [4], "depths": [0]}, 2, 2, 0.0, 0),
        conditions_before={},
        conditions_after={},
        bandwidth=BANDWIDTH,
        artifacts=artifacts,
    )


def two_artifacts() -> Record[DecoderResult]:
    shape = Shape("pp", 8)
    first = ShapeResult(shape, (prefill_sample(0, 4_000_000), prefill_sample(2, 2_000_000)))
    second = ShapeResult(shape, (prefill_sample(1, 2_000_000), prefill_sample(3, 4_000_000)))
    return record_of(artifact_result("a", first), artifact_result("b", second))


def test_shape_has_llama_bench_names() -> None:
    assert Shape("pp", 512).name == "pp512"
    assert Shape("tg", 128, 1024).name == "tg128 @ d1024"
    assert Shape("tg", 128, 1024).positions == 1152


@pytest.mark.parametrize(("tokens", "depth"), [(0, 0), (-1, 0), (1, -1)])
def test_shape_refuses_what_measures_nothing(tokens: int, depth: int) -> None:
    with pytest.raises(ValueError, match="tokens >= 1"):
        Shape("pp", tokens, depth)


def test_rate_is_tokens_per_second() -> None:
    assert rate(512, 2_000_000_000) == 256.0


def test_spread_uses_the_sample_standard_deviation() -> None:
    # mean 5, squared deviations 9 + 1 + 1 + 9 = 20, over n - 1 = 3
    result = spread([2.0, 4.0, 6.0, 8.0])
    assert result["mean"] == 5.0
    assert result["median"] == 5.0
    assert result["stdev"] == pytest.approx((20 / 3) ** 0.5)


def test_spread_of_one_value_has_no_deviation() -> None:
    assert spread([3.0]) == {"mean": 3.0, "stdev": None, "median": 3.0}


def test_percentile_interpolates_between_neighbours() -> None:
    values = [40.0, 10.0, 30.0, 20.0]
    assert percentile(values, 0) == 10.0
    assert percentile(values, 50) == 25.0
    assert percentile(values, 95) == pytest.approx(38.5)  # place 2.85: 30 + 0.85 * 10
    assert percentile(values, 100) == 40.0
    assert percentile([7.0], 95) == 7.0


def test_ratios_pair_repetitions_that_ran_side_by_side() -> None:
    assert paired_ratio([20.0, 30.0, 50.0], [10.0, 20.0, 50.0]) == {
        "median": 1.5,
        "min": 1.0,
        "max": 2.0,
    }


def test_traffic_grows_by_the_mean_number_of_positions() -> None:
    # 4 tokens after 10 attend to 11, 12, 13 and 14 positions: 12.5 on average
    assert Traffic(1000, 8).bytes_per_token(Shape("tg", 4, 10)) == 1000 + 8 * 12.5


def test_summary_of_a_decode() -> None:
    test = ShapeResult(
        Shape("tg", 4),
        (
            decode_sample(0, 10_000_000, 10_000_000, 10_000_000, 10_000_000),
            decode_sample(1, 5_000_000, 5_000_000, 5_000_000, 5_000_000),
        ),
    )
    summary = test.summary(Traffic(100_000_000, 0), BANDWIDTH)
    assert test.rates == [100.0, 200.0]
    assert summary["tokens_per_second"]["mean"] == 150.0
    assert summary["inter_token_ms"] == {"p50": 7.5, "p95": 10.0}
    assert summary["read_gb_per_s"] == pytest.approx(15.0)
    assert summary["bandwidth_share"] == pytest.approx(0.6)  # of 25 GB/s, the better measurement


def test_summary_of_a_prefill_gives_time_to_first_token() -> None:
    test = ShapeResult(Shape("pp", 8), (prefill_sample(0, 4_000_000),))
    summary = test.summary(Traffic(1, 0), BANDWIDTH)
    assert summary["tokens_per_second"]["mean"] == pytest.approx(2000.0)
    assert summary["ttft_ms"]["mean"] == pytest.approx(5.0)
    assert "bandwidth_share" not in summary


def test_a_wrong_number_of_timed_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="3 timed tokens, not 4"):
        ShapeResult(Shape("tg", 4), (decode_sample(0, 1, 2, 3),))


def test_tokens_must_add_up_to_the_elapsed_time() -> None:
    with pytest.raises(ValueError, match="each_ns sum to 3, not 4"):
        Sample(0, 4, (1, 2), None, QUIET, (), {})


@pytest.mark.parametrize(
    ("other", "waited", "visible"),
    [(0.04, 0.04, False), (0.06, 0.0, True), (None, 0.06, True), (None, None, False)],
)
def test_interference_is_visible_above_five_percent(
    other: float | None, waited: float | None, visible: bool
) -> None:
    assert Interference(1.0, other, waited).visible is visible


@pytest.mark.parametrize(
    ("other", "waited", "throttled", "visible", "limited"),
    [
        (0.0, 0.5, 0.5, False, True),
        (0.0, 0.5, 0.48, False, True),
        (0.0, 0.5, 0.2, True, True),
        (0.3, 0.5, 0.5, True, True),
        (0.0, 0.04, 0.04, False, False),
        (0.0, 0.0, 0.5, False, True),
        (None, None, None, False, False),
    ],
)
def test_waiting_for_a_quota_is_not_another_load(
    other: float | None, waited: float | None, throttled: float | None, visible: bool, limited: bool
) -> None:
    seen = Interference(0.5, other, waited, throttled)
    assert (seen.visible, seen.limited) == (visible, limited)
    assert seen.to_dict()["throttled_share"] == throttled
    assert seen.to_dict()["limited_by_quota"] is limited


def test_interference_is_what_the_clocks_leave_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    before = Clocks(wall=10.0, own=1.0, busy=50.0, waited=0.5, throttled=3.0)
    after = Clocks(wall=12.0, own=4.0, busy=55.04, waited=0.7, throttled=3.12)
    seen = interference(before, after, threads=2)
    assert seen.own == pytest.approx(0.75)  # 3 s of 2 s x 2 threads
    assert seen.other == pytest.approx(0.25)  # 5.04 - 3 - 0.04 (a tick per CPU) of 2 s x 4 CPUs
    assert seen.waited == pytest.approx(0.05)  # 0.2 s of 2 s x 2 threads
    assert seen.throttled == pytest.approx(0.03)  # 0.12 s of 2 s x 2 threads


def test_interference_is_unknown_without_a_kernel_that_says() -> None:
    before, after = Clocks(0.0, 0.0, None, None, None), Clocks(1.0, 1.0, None, None, None)
    assert interference(before, after, threads=1) == Interference(1.0, None, None, None)


def conditions_of(celsius: float | None, swap: int | None) -> Conditions:
    sensors = () if celsius is None else (Temperature("cpu", 41.0), Temperature("cpu", celsius))
    return Conditions(sensors, (), None, None, swap)


def test_gates_pass_fail_or_stay_unknown() -> None:
    start = conditions_of(50.0, 1000)
    cool = {gate.name: gate.passed for gate in check_gates(start, conditions_of(79.0, 1000))}
    hot = {gate.name: gate.passed for gate in check_gates(start, conditions_of(80.0, 1001))}
    dark = {gate.name: gate.passed for gate in check_gates(start, conditions_of(None, None))}
    assert cool == {"temperature": True, "swap_growth_bytes": True}
    assert hot == {"temperature": False, "swap_growth_bytes": False}
    assert dark == {"temperature": None, "swap_growth_bytes": None}


def test_decode_reads_one_row_of_the_embedding_and_everything_else() -> None:
    rows = [
        TensorRow("model.embed_tokens.weight", "w8", (10, 4), 60),
        TensorRow("lm_head.weight", "w8", (10, 4), 60),
        TensorRow("model.embedding_norm.weight", "float", (4,), 16),
    ]
    config = ModelConfig.from_dict(
        {
            "model_type": "lfm2",
            "vocab_size": 10,
            "hidden_size": 4,
            "layer_types": ["conv", "full_attention", "full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "intermediate_size": 8,
            "max_position_embeddings": 16,
            "bos_token_id": 1,
            "eos_token_id": 7,
            "block_auto_adjust_ff_dim": False,
        }
    )
    traffic = decode_traffic(rows, config)
    assert traffic.weight_bytes == 6 + 60 + 16
    assert traffic.kv_bytes_per_position == 2 * 2 * 1 * 2 * 4  # K and V, layers, heads, dim, float
    assert count_schemes(rows) == {
        "w8": {"tensors": 2, "bytes": 120},
        "float": {"tensors": 1, "bytes": 16},
    }


def test_sequence_follows_the_order_in_which_repetitions_ran() -> None:
    assert two_artifacts().sequence() == [("a", "pp8"), ("b", "pp8"), ("a", "pp8"), ("b", "pp8")]


def test_record_states_ratios_against_the_first_artifact() -> None:
    assert two_artifacts().ratios() == [
        {"artifact": "b", "against": "a", "test": "pp8", "median": 1.25, "min": 0.5, "max": 2.0}
    ]


def test_record_has_the_fields_of_a_benchmark_record() -> None:
    written: dict[str, Any] = json.loads(two_artifacts().to_json())
    assert set(written) == {
        "schema_version",
        "kind",
        "edgekit_version",
        "timestamp_utc",
        "machine",
        "settings",
        "conditions_before",
        "conditions_after",
        "bandwidth",
        "artifacts",
        "sequence",
        "ratios",
    }
    assert set(written["artifacts"][0]) == {
        "name",
        "path",
        "target",
        "model",
        "schemes",
        "file_bytes",
        "context",
        "threads",
        "engine",
        "affinity",
        "import_ns",
        "load_ns",
        "memory",
        "traffic",
        "tests",
    }
    assert set(written["artifacts"][0]["tests"][0]["samples"][0]) == {
        "order",
        "elapsed_ns",
        "token_ns",
        "first_token_ns",
        "interference",
        "gates",
        "conditions_before",
    }


def network_result(name: str, *samples: Sample) -> NetworkResult:
    return NetworkResult(
        name=name,
        path=name,
        target="onnx",
        model="Net",
        recipe="w8a8",
        file_bytes=400,
        batch=3,
        engine="onnx",
        engine_version="1",
        affinity=(0,),
        import_ns=7,
        load_ns=9,
        memory=Memory(peak=900, before_load=500),
        tests=(BurstResult(3, samples),),
    )


def burst(order: int, *run_ns: int) -> Sample:
    return Sample(order, sum(run_ns), run_ns, None, QUIET, (), {})


def test_summary_of_bursts_is_over_all_runs() -> None:
    bursts = BurstResult(3, (burst(0, 1_000_000, 3_000_000, 8_000_000), burst(1, 5_000_000)))
    assert bursts.medians_ms == [3.0, 5.0]
    assert bursts.rates == [1000.0, 600.0]  # 3 inputs in 3 and in 5 ms
    summary = bursts.summary()
    assert summary["ms"]["median"] == 4.0  # of 1, 3, 5, 8
    assert summary["ms"]["min"] == 1.0
    assert summary["inputs_per_second"] == 750.0
    assert summary["repetition_median_ms"]["mean"] == 4.0


def test_a_record_of_networks_has_the_same_form() -> None:
    first, second = burst(0, 2_000_000), burst(1, 1_000_000)
    record = Record(
        edgekit_version="0.1.0",
        timestamp_utc="2026-01-02T03:04:05+00:00",
        machine={},
        settings=Settings({"batch": 3}, 1, 2, 0.0, 0),
        conditions_before={},
        conditions_after={},
        bandwidth=None,
        artifacts=(network_result("a", first), network_result("b", second)),
    )
    written: dict[str, Any] = json.loads(record.to_json())
    assert set(written) == set(json.loads(two_artifacts().to_json()))
    assert (written["kind"], written["bandwidth"]) == ("edgekit-module-bench", None)
    assert written["settings"]["batch"] == 3
    assert written["sequence"] == [["a", "run"], ["b", "run"]]
    assert written["ratios"][0]["median"] == 2.0
    artifact = written["artifacts"][1]
    assert (artifact["model"], artifact["recipe"], artifact["batch"]) == ({"id": "Net"}, "w8a8", 3)
    assert artifact["samples"][0]["run_ns"] == [1_000_000]
    assert artifact["summary"]["inputs_per_second"] == 3000.0


def test_save_writes_the_record_and_leaves_no_scratch_file(tmp_path: Path) -> None:
    record = two_artifacts()
    record.save(tmp_path / "r.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(record.to_json())


def test_save_names_a_place_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    (tmp_path / "r.json" / "inside").touch()
    with pytest.raises(EdgekitError, match="r.json: cannot be written"):
        two_artifacts().save(tmp_path / "r.json")
