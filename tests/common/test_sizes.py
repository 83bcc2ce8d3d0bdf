"""Sizes as people write them, in every option that takes one."""

import json

import pytest
from support.command_line import assert_only_one_line, run

from edgekit.common.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4M", 4_000_000),
        ("4m", 4_000_000),
        ("4MB", 4_000_000),
        ("4 MB", 4_000_000),
        (" 4mb ", 4_000_000),
        ("4MiB", 4 << 20),
        ("4Mi", 4 << 20),
        ("4_000_000", 4_000_000),
        ("4000000", 4_000_000),
        ("4000000B", 4_000_000),
        ("1.2GB", 1_200_000_000),
        (".5G", 500_000_000),
        ("2T", 2 * 10**12),
        ("1.5KiB", 1536),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "gib"), [("8", 8), ("8G", 8), ("8GB", 8), ("0.5 GiB", 0.5)])
def test_memory_is_sold_by_powers_of_two(text: str, gib: float) -> None:
    assert parse_size(text, unit="GiB") == gib * 2**30
    assert parse_size("512MB", unit="GiB") == 512 << 20
    assert parse_size("8589934592B", unit="GiB") == 8 << 30


@pytest.mark.parametrize(
    "text",
    ["", "M", "many", "4X", "4 M B", "4iB", "1e6", "-4M", "0", "0.0M", "4,5M", "4__0", "4_00"]
    + ["nan", "inf", "9" * 15 + "TB", "9" * 300, "1.2.3M", "٤M", "4\u212a"],
)
def test_what_is_no_size(text: str) -> None:
    assert parse_size(text) is None


@pytest.mark.parametrize("size", ["4M", "4MB", "4 MB", "4_000_000"])
def test_a_budget_takes_every_spelling(size: str) -> None:
    done = run(
        "quantize", "lfm2-tiny", "--target-size", size, "--calibrate", "nowhere", "--dry-run"
    )
    assert_only_one_line(done, "nowhere")  # what is looked at next


@pytest.mark.parametrize("ram", ["0.5", "512M", "512MiB", "0.5GB"])
def test_ram_takes_every_spelling(ram: str) -> None:
    done = run("fit", "lfm2-350m", "--device", "x-elite", "--ram", ram, "--json")
    assert json.loads(done.stdout)["ram"][0]["bytes"] == 512 << 20


@pytest.mark.parametrize("ram", ["nan", "0", "-1", "much"])
def test_ram_that_is_none_is_one_line(ram: str) -> None:
    done = run("fit", "lfm2-350m", "--device", "x-elite", "--ram", ram)
    assert_only_one_line(done, f"{ram!r} is no size, such as 8 (GB)")
