"""Predictions against numbers computed by hand for LFM2-1.2B, and the command around them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgekit.cli import main
from edgekit.errors import EdgekitError
from edgekit.exporters.executorch import blocks as xnnpack_blocks
from edgekit.models.config import ModelConfig
from edgekit.runtime.engines.memory_model import MemoryModel
from edgekit.runtime.fit import (
    PREFILL_CHUNK,
    Fit,
    activation_bytes,
    conv_state_bytes,
    kv_bytes_per_position,
    predict,
)

ATTENTION = (2, 5, 8, 10, 12, 14)
LFM2_1_2B = ModelConfig.from_dict(
    {
        "model_type": "lfm2",
        "vocab_size": 65_536,
        "hidden_size": 2048,
        "layer_types": ["full_attention" if i in ATTENTION else "conv" for i in range(16)],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 128_000,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "block_auto_adjust_ff_dim": False,
    }
)


@dataclass(frozen=True)
class Row:
    tensor: str
    shape: tuple[int, ...]
    nbytes: int


def int8_rows(config: ModelConfig) -> list[Row]:
    """One byte per code and a float32 scale per row for matrices, float32 for the rest."""
    shapes = config.tensor_shapes() | {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    return [Row(name, shape, _int8_bytes(shape)) for name, shape in shapes.items()]


def _int8_bytes(shape: tuple[int, ...]) -> int:
    if len(shape) == 2:
        return shape[0] * shape[1] + 4 * shape[0]
    count = 4
    for size in shape:
        count *= size
    return count


@pytest.fixture(scope="module")
def int8() -> Fit:
    return predict(LFM2_1_2B, int8_rows(LFM2_1_2B), context=2048)


def test_kv_cache_of_one_position() -> None:
    """6 attention layers x (keys, values) x 8 heads x 64 x 4 bytes: twice the 12 KiB of bf16."""
    assert kv_bytes_per_position(LFM2_1_2B) == 24_576


def test_conv_state() -> None:
    """10 layers x 2 positions x 2048 x 4 bytes."""
    assert conv_state_bytes(LFM2_1_2B) == 163_840


def test_activations() -> None:
    """2048 positions x (2048 + 2 x 8192), 65,536 logits, 32 x 512 x 2048 scores, 4 bytes each."""
    assert activation_bytes(LFM2_1_2B, 2048) == 151_257_088 + 134_217_728
    assert PREFILL_CHUNK == xnnpack_blocks.PREFILL_CHUNK
    assert activation_bytes(LFM2_1_2B, 2) == 4 * (2 * 18_432 + 65_536 + 32 * 2 * 2)


def test_int8_memory(int8: Fit) -> None:
    """Linears 1,035,993,088 codes + 407,552 scales; vocabulary matrices 134,479,872 bytes each;
    norms and convolutions 129,792 floats."""
    assert int8.packed_bytes == 1_035_993_088 + 4 * 407_552 + 134_479_872
    assert int8.file_bytes == int8.packed_bytes + 134_479_872 + 4 * 129_792 == 1_307_102_208
    assert int8.kv_cache_bytes == 2048 * 24_576
    state = 50_331_648 + 163_840 + 151_257_088 + 134_217_728
    assert int8.resident_bytes == 1_307_102_208 + state
    assert int8.peak_bytes == 1_307_102_208 + 1_172_103_168 + state


def test_int8_decode_reads_one_embedding_row(int8: Fit) -> None:
    """All but the embedding, of which 2048 codes and a scale; its own position of the cache."""
    assert int8.weight_bytes == 1_307_102_208 - 134_479_872 + 2052
    assert int8.bytes_per_token == 1_172_624_388 + 24_576
    assert int8.decode_ceiling(34.0) == pytest.approx(28.994, abs=0.001)


def test_depth_adds_the_cache_before_it() -> None:
    rows = int8_rows(LFM2_1_2B)
    deep = predict(LFM2_1_2B, rows, context=4096, depth=4000)
    assert deep.bytes_per_token == 1_172_624_388 + 4001 * 24_576
    assert deep.kv_cache_bytes == 4096 * 24_576


def test_engine_that_does_not_pack_needs_the_file_once(int8: Fit) -> None:
    mapped = predict(
        LFM2_1_2B, int8_rows(LFM2_1_2B), context=2048, memory_model=MemoryModel(packs_linears=False)
    )
    assert mapped.packed_bytes == 0
    assert mapped.peak_bytes == mapped.resident_bytes == int8.resident_bytes


@pytest.mark.parametrize("packs", [True, False])
def test_a_shared_head_is_in_the_file_once_and_packed_all_the_same(packs: bool) -> None:
    """A vocabulary matrix is 134,479,872 bytes; all is read per token as before."""
    rows = int8_rows(LFM2_1_2B)
    memory_model = MemoryModel(packs_linears=packs)
    once = predict(LFM2_1_2B, rows, 2048, memory_model=memory_model, shared=["lm_head.weight"])
    twice = predict(LFM2_1_2B, rows, 2048, memory_model=memory_model)
    assert twice.file_bytes - once.file_bytes == 134_479_872
    assert twice.peak_bytes - once.peak_bytes == 134_479_872
    assert twice.resident_bytes - once.resident_bytes == (0 if packs else 134_479_872)
    assert (once.packed_bytes, once.bytes_per_token) == (twice.packed_bytes, twice.bytes_per_token)


@pytest.mark.parametrize(
    ("recipe", "row"),
    [(["--int8"], 260), (["--int4"], 260), (["--float"], 1024), (["--recipe", "r.json"], 0)],
)
def test_a_shared_table_is_in_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: list[str], row: int
) -> None:
    """`row` is the bytes of a shared row, which stay for the embedding beside the head's copy."""
    monkeypatch.chdir(tmp_path)
    rules = [{"pattern": r"lm_head\..*", "scheme": "w4g32"}, {"pattern": ".*", "scheme": "w8"}]
    Path("r.json").write_text(json.dumps({"rules": rules}))
    facts = json.loads(run("lfm2-tiny", "--no-measure", *recipe, "--json").stdout)["bytes"]
    state = facts["kv_cache_bytes"] + facts["conv_state_bytes"] + facts["activation_bytes"]
    assert facts["resident_bytes"] == facts["file_bytes"] + state + 4096 * row


def test_verdicts(int8: Fit) -> None:
    """Peak 2.82 GB, resident 1.64 GB, against three quarters of 1, 2, 3 and 4 GiB."""
    sizes = [gib * 1024**3 for gib in (1, 2, 3, 4)]
    verdicts = [int8.verdict(size) for size in sizes]
    assert verdicts == ["does not fit", "does not fit", "tight", "fits"]


def test_verdict_limits_are_inclusive() -> None:
    fit = Fit(
        context=8,
        depth=0,
        file_bytes=600,
        packed_bytes=300,
        kv_cache_bytes=0,
        conv_state_bytes=0,
        activation_bytes=0,
        resident_bytes=600,
        peak_bytes=900,
        weight_bytes=500,
        kv_bytes_per_position=0,
    )
    judged = [fit.verdict(size) for size in (1200, 1199, 800, 799)]
    assert judged == ["fits", "tight", "tight", "does not fit"]


@pytest.mark.parametrize(
    ("context", "depth", "message"),
    [
        (0, 0, r"context is 0; this model takes 1 to 128000"),
        (128_001, 0, r"context is 128001"),
        (2048, 2048, r"depth is 2048; a context of 2048 allows 0 to 2047"),
        (2048, -1, r"depth is -1"),
    ],
)
def test_impossible_positions_are_refused(context: int, depth: int, message: str) -> None:
    with pytest.raises(EdgekitError, match=message):
        predict(LFM2_1_2B, int8_rows(LFM2_1_2B), context, depth)


def test_table_without_a_head_is_refused() -> None:
    rows = [row for row in int8_rows(LFM2_1_2B) if row.tensor != "lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        predict(LFM2_1_2B, rows, context=8)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fit", *arguments])


def test_command_as_json() -> None:
    """The numbers computed by hand above, the tied head in the file once."""
    result = run("lfm2-1.2b", "--device", "pi5", "--int8", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert facts["device"] == "raspberry-pi-5"
    assert facts["recipe"] == "int8"
    assert facts["bytes"]["file_bytes"] == 1_307_102_208 - 134_479_872
    assert facts["bytes"]["bytes_per_token"] == 1_172_624_388 + 24_576
    assert facts["bandwidth_gb_per_s"] == 12.6
    assert facts["bandwidth_kind"] == "sustained"
    assert facts["decode_ceiling_tok_per_s"] == pytest.approx(10.7449, abs=0.0001)
    assert [(row["bytes"] >> 30, row["verdict"]) for row in facts["ram"]] == [
        (2, "does not fit"),
        (4, "fits"),
        (8, "fits"),
        (16, "fits"),
    ]


def test_command_as_text() -> None:
    result = run("lfm2-350m", "--device", "galaxy-s25", "--scheme", "w4g32", "--depth", "1000")
    assert result.exit_code == 0
    assert "w4g32, executorch, on galaxy-s25" in result.stdout
    assert "| KV cache, 2048 positions   |  50.3 |" in result.stdout
    assert "| 12 GB                       | fits    |" in result.stdout
    assert "after 1,000 positions at 84.8 GB/s, peak)." in result.stdout


def test_codebooks_weigh_in_the_engine_what_int8_does() -> None:
    given = ("lfm2-350m", "--device", "raspberry-pi-5", "--json")
    learned, eight = (json.loads(run(*given, *more).stdout) for more in (("--scheme", "cb3"), ()))
    changed = {key for key in eight if learned[key] != eight[key]}
    assert changed <= {"recipe"}


def test_unknown_bandwidth_and_ram_can_be_given() -> None:
    assert "ceiling is unknown" in run("lfm2-350m", "--device", "pixel-9").stdout
    assert "RAM is unknown: give --ram" in run("lfm2-350m", "--device", "x-elite").stdout
    options = ("--device", "x-elite", "--ram", "0.5", "--bandwidth", "34", "--json")
    facts = json.loads(run("lfm2-350m", *options).stdout)
    assert facts["ram"] == [{"bytes": 512 * 1024**2, "verdict": "does not fit"}]
    assert (facts["bandwidth_gb_per_s"], facts["bandwidth_kind"]) == (34, "given")


def test_bundled_model_on_this_machine_without_measuring() -> None:
    result = run("lfm2-tiny", "--no-measure", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["device"] == "local"
    assert facts["decode_ceiling_tok_per_s"] is None


@pytest.mark.slow
def test_this_machine_measured() -> None:
    facts = json.loads(run("lfm2-350m", "--json").stdout)
    assert facts["bandwidth_kind"].startswith("measured with ")
    ceiling = facts["bandwidth_gb_per_s"] * 1e9 / facts["bytes"]["bytes_per_token"]
    assert facts["decode_ceiling_tok_per_s"] == pytest.approx(ceiling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lfm2-350m", "--device", "galaxys25"], "did you mean galaxy-s25"),
        (["lfm2-350m", "--device", "pi5", "--int8", "--int4"], "--int8 and --int4 exclude"),
        (["lfm2-350m", "--device", "pi5", "--context", "200000"], "context is 200000"),
        (["lfm2-350m", "--device", "pi5", "--depth", "2048"], "depth is 2048"),
        (["lfm2-350x", "--device", "pi5"], "lfm2-350x"),
        (["lfm2-350m", "--device", "pi5", "--recipe", "none.toml"], "none.toml"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_bandwidths_that_are_none(value: str) -> None:
    result = run("lfm2-350m", "--device", "pi5", "--bandwidth", value)
    assert result.exit_code == 2
    assert "is not a number above 0" in result.stderr
