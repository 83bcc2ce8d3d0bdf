"""Physical cores and CPU quotas, on recorded trees and in a control group of the live machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from edgekit.devices.cpus import (
    cpu_quota,
    default_threads,
    physical_cores,
    quota_groups,
    throttled_seconds,
    usable_cpus,
)
from edgekit.devices.hosts.local import LocalHost
from edgekit.devices.probe.machine import probe
from edgekit.devices.report import machine_text

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 32 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1_FOLDER = "sys/fs/cgroup/cpu,cpuacct"
V1_STAT = "nr_periods 50\nnr_throttled 49\nthrottled_time 2450000000\n"
V2_STAT = "usage_usec 9\nnr_periods 50\nnr_throttled 49\nthrottled_usec 2450000\nnr_bursts 0\n"


def tree(root: Path, membership: str, mounts: str, **files: str) -> LocalHost:
    """A machine with these files."""
    named = {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts} | files
    for name, text in named.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return LocalHost(root)


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    place = f"{V1_FOLDER}{folder}"
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": f"{period}\n"}


def test_version_2_takes_the_least_of_all_ancestors(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/a.slice/b.slice/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a.slice/b.slice/c.scope/cpu.max": "40000 20000\n",
        "sys/fs/cgroup/other.slice/cpu.max": "1000 100000\n",
    }
    host = tree(tmp_path, "0::/a.slice/b.slice/c.scope\n", V2_MOUNT, **files)
    assert [group.cpus for group in quota_groups(host)] == [2.0, 1.5]
    assert cpu_quota(host) == 1.5


def test_version_2_in_a_container_is_the_root_of_what_it_sees(tmp_path: Path) -> None:
    host = tree(tmp_path, "0::/\n", V2_MOUNT, **{"sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert cpu_quota(host) == 0.5


@pytest.mark.parametrize(
    ("membership", "top"),
    [
        ("4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n", "/docker/abc"),
        ("4:cpu,cpuacct:/docker/abc\n", "/"),  # Docker's own path, of which nothing is mounted
        ("4:cpu,cpuacct:/../../elsewhere\n", "/"),  # outside this namespace
        ("4:cpu,cpuacct:/a\n", "/../.."),  # mounted outside this namespace
    ],
)
def test_version_1_in_a_container_is_what_is_mounted(
    tmp_path: Path, membership: str, top: str
) -> None:
    mounts = V1_MOUNT.replace(" / ", f" {top} ", 1)
    assert cpu_quota(tree(tmp_path, membership, mounts, **v1("", 50_000))) == 0.5


def test_version_1_takes_the_least_of_all_ancestors(tmp_path: Path) -> None:
    files = v1("", -1) | v1("/a", 350_000) | v1("/a/b", -1) | v1("/c", 1000)
    membership = "5:memory:/c\n4:cpu,cpuacct:/a/b\n3:cpuset:/c\n1:name=systemd:/c\n"
    assert cpu_quota(tree(tmp_path, membership, V1_MOUNT, **files)) == 3.5


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    """A hybrid machine: the cpu controller is version 1's, the unified tree has none."""
    mounts = V1_MOUNT + V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    host = tree(tmp_path, "4:cpu,cpuacct:/a\n0::/a\n", mounts, **v1("/a", 250_000))
    assert cpu_quota(host) == 2.5


@pytest.mark.parametrize(
    ("membership", "mounts", "limit"),
    [
        ("", "", "50000 100000"),
        ("0::/\n", "", "50000 100000"),
        ("nonsense\n", "nonsense\n - \n1 2 3 4 5 - cgroup2\n", "50000 100000"),
        ("0::/\n", V2_MOUNT, "max 100000"),
        ("0::/\n", V2_MOUNT, "50000"),
        ("0::/\n", V2_MOUNT, "0 100000"),
        ("0::/\n", V2_MOUNT, "50000 0"),
        ("0::/\n", V2_MOUNT, "half all"),
    ],
)
def test_no_quota_where_none_is_stated(
    tmp_path: Path, membership: str, mounts: str, limit: str
) -> None:
    host = tree(tmp_path, membership, mounts, **{"sys/fs/cgroup/cpu.max": limit})
    assert cpu_quota(host) is None
    assert throttled_seconds(quota_groups(host), host) is None
    assert usable_cpus(host) == len(os.sched_getaffinity(0))


def test_the_time_held_back_is_that_of_the_group_that_did_most(tmp_path: Path) -> None:
    two = {
        "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/a/cpu.stat": V2_STAT,
        "sys/fs/cgroup/a/b/cpu.max": "70000 100000\n",
        "sys/fs/cgroup/a/b/cpu.stat": V2_STAT.replace("2450000", "80000"),
    }
    host = tree(tmp_path / "v2", "0::/a/b\n", V2_MOUNT, **two)
    assert throttled_seconds(quota_groups(host), host) == 2.45
    one = v1("/a", 50_000) | {f"{V1_FOLDER}/a/cpu.stat": V1_STAT}
    host = tree(tmp_path / "v1", "4:cpu,cpuacct:/a\n", V1_MOUNT, **one)
    assert throttled_seconds(quota_groups(host), host) == 2.45
    (tmp_path / f"v1/{V1_FOLDER}/a/cpu.stat").unlink()
    assert throttled_seconds(quota_groups(host), host) is None


def test_a_quota_bounds_the_threads_and_is_told(tmp_path: Path) -> None:
    host = tree(tmp_path, "0::/\n", V2_MOUNT, **{"sys/fs/cgroup/cpu.max": "50000 100000\n"})
    block = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A Processor\nflags\t: avx\n"
    (tmp_path / "proc/cpuinfo").write_text(block)
    assert default_threads(host) == usable_cpus(host) == 1
    machine = probe(host)
    assert machine.cpu_quota == 0.5
    assert "1 logical; a quota grants the time of 0.5" in machine_text(machine)


@pytest.mark.parametrize(("quota", "cpus"), [(10_000, 1), (190_000, 1), (200_000, 2), (990_000, 9)])
def test_part_of_a_cpu_counts_only_where_there_is_no_whole_one(
    tmp_path: Path, quota: int, cpus: int
) -> None:
    host = tree(tmp_path, "0::/\n", V2_MOUNT, **{"sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert usable_cpus(host) == min(cpus, len(os.sched_getaffinity(0)))


def test_physical_cores_are_sets_of_siblings(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    host = LocalHost(tmp_path)
    assert physical_cores(range(4), host) == 2
    assert physical_cores([0, 2], host) == 1
    assert physical_cores(range(5), host) is None
    assert physical_cores([], host) is None


def test_default_threads_are_at_most_the_allowed_cpus() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))


@pytest.fixture
def a_fiftieth_of_a_core() -> Iterator[Path]:
    """The membership file of a new control group; skips without the right to make one.

    So little that the group uses it up on any machine, however busy.
    """
    for top, name, limit in (
        ("/sys/fs/cgroup", "cpu.max", "2000 100000"),
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "2000"),
        ("/sys/fs/cgroup/cpu,cpuacct", "cpu.cfs_quota_us", "2000"),
    ):
        group = Path(top) / f"edgekit-test-{uuid4().hex}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).open("r+").write(limit)
            yield group / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no control group can be made here")


LIVE = """
import os, sys
with open(sys.argv[1], "w") as procs:
    procs.write(str(os.getpid()))
from edgekit.devices.cpus import cpu_quota, default_threads, quota_groups, throttled_seconds
while not throttled_seconds(quota_groups()):
    pass
print(cpu_quota(), default_threads())
"""


def test_a_real_control_group(a_fiftieth_of_a_core: Path) -> None:
    command = [sys.executable, "-c", LIVE, str(a_fiftieth_of_a_core)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0.02 1\n", "")


WAITING = """
import os
from edgekit.devices.cpus import share_cpus_well
share_cpus_well()
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_is_short_unless_the_user_says_otherwise(given: dict[str, str], said: str) -> None:
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | given
    command = [sys.executable, "-c", WAITING]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    threads = "None" if cpu_quota() is None else str(default_threads())
    assert done.stdout == f"{said} {threads}\n"
