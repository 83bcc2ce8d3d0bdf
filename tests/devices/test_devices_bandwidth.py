"""Reading bandwidth: the buffer's size rule, and that every kernel reads all of the buffer."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.devices.hosts.local import LocalHost
from edgekit.devices.probe.bandwidth import _kernels, choose_buffer_bytes, measure_read_bandwidth
from edgekit.devices.probe.conditions import Conditions
from edgekit.devices.probe.machine import Cache, Machine, probe
from edgekit.errors import EdgekitError

MIB = 1024**2


def machine(tmp_path: Path, l3_bytes: int | None, available: int | None) -> Machine:
    blank = probe(LocalHost(tmp_path))  # an empty tree: nothing known
    caches = () if l3_bytes is None else (Cache(3, "unified", l3_bytes // 2, 2),)
    return replace(
        blank, caches=caches, conditions=Conditions((), (), None, available, swap_used_bytes=None)
    )


@pytest.mark.parametrize(
    ("l3_bytes", "available", "expected"),
    [
        (48 * MIB, 16_384 * MIB, 192 * MIB),  # four times the cache, both instances together
        (256 * MIB, 65_536 * MIB, 512 * MIB),  # at most 512 MiB
        (2 * MIB, 4096 * MIB, 64 * MIB),  # at least 64 MiB
        (None, None, 64 * MIB),
        (2 * MIB, 100 * MIB, 25 * MIB),  # never more than a quarter of what is available
    ],
)
def test_buffer_size(
    tmp_path: Path, l3_bytes: int | None, available: int | None, expected: int
) -> None:
    assert choose_buffer_bytes(machine(tmp_path, l3_bytes, available)) == expected


def test_no_room_for_a_fair_buffer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match=r"last-level cache \(33554432 bytes\)"):
        choose_buffer_bytes(machine(tmp_path, 32 * MIB, 100 * MIB))


def test_measurement_keeps_raw_samples() -> None:
    result = measure_read_bandwidth(threads=2, passes=2, buffer_bytes=8 * MIB)
    assert set(result.samples_ns) == {"memchr", "memcmp", "numpy max"}
    assert all(len(times) == 2 for times in result.samples_ns.values())
    fastest = min(min(times) for times in result.samples_ns.values())
    assert result.gb_per_s == result.buffer_bytes / fastest
    assert result.buffer_bytes == 8 * MIB
    assert 0 < result.median_gb_per_s <= result.gb_per_s
    assert result.to_dict()["threads"] == 2


def test_buffer_is_cut_so_that_threads_share_it_evenly() -> None:
    result = measure_read_bandwidth(threads=3, passes=1, buffer_bytes=MIB)
    assert result.buffer_bytes == MIB // (3 * 128) * (3 * 128)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(EdgekitError, match="threads and passes"):
        measure_read_bandwidth(threads=0)
    with pytest.raises(EdgekitError, match="threads and passes"):
        measure_read_bandwidth(passes=0)
    with pytest.raises(EdgekitError, match="100 bytes is too small for 2 threads"):
        measure_read_bandwidth(threads=2, buffer_bytes=100)


@pytest.mark.parametrize("name", ["memchr", "memcmp", "numpy max"])
def test_kernels_read_to_the_end(name: str) -> None:
    """On the fill pattern none may stop early; a changed last word must change the result."""
    kernel = _kernels()[name]
    buffer = ctypes.create_string_buffer(b"\1" * 4096, 4096)
    untouched = kernel(ctypes.addressof(buffer), 4096)
    buffer.raw = b"\1" * 4092 + b"\0\0\0\x40"  # contains memchr's byte; as a float 2.0, the maximum
    assert kernel(ctypes.addressof(buffer), 4096) != untouched
