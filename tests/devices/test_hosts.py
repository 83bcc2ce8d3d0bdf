"""A machine as a parameter: this one's files and processes, and a recorded tree's files."""

import os
import signal
import sys
from pathlib import Path

import pytest

from edgekit.devices.hosts.host import End, Host, Process, boot_id
from edgekit.devices.hosts.local import LOCAL, LocalHost
from edgekit.errors import EdgekitError

ECHO = """
import sys
for line in sys.stdin:
    print(line.rstrip("\\n")[::-1], flush=True)
print("good-bye", file=sys.stderr)
"""


def python(program: str) -> Process:
    return LOCAL.start([sys.executable, "-c", program])


def test_a_recorded_tree_is_read_like_a_machine(tmp_path: Path) -> None:
    (tmp_path / "sys/class").mkdir(parents=True)
    (tmp_path / "sys/class/name").write_bytes(b"\0\xff")
    host: Host = LocalHost(tmp_path)
    assert host.entries("/sys/class") == ["name"]
    assert host.read("/sys/class/name") == b"\0\xff"
    assert (host.read("/sys/class"), host.read("/sys/none")) == (None, None)
    assert (host.entries("/sys/none"), host.entries("/sys/class/name")) == ([], [])


def test_a_file_is_put_and_fetched_whole(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(range(256)))
    place = LOCAL.put(tmp_path / "model")
    LOCAL.get(place, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(range(256))
    assert Path(place).is_absolute()
    assert sorted(LOCAL.entries(LOCAL.put(tmp_path))) == ["copy", "model"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(EdgekitError, match="none: No such file or directory"):
        LOCAL.put(missing)
    with pytest.raises(EdgekitError, match="none: cannot be read on this machine"):
        LOCAL.get(str(missing), tmp_path / "copy")
    with pytest.raises(EdgekitError, match="none: cannot be started: No such file"):
        LOCAL.start([str(missing)])
    assert list(tmp_path.iterdir()) == []


def test_a_process_takes_and_gives_lines() -> None:
    process = python(ECHO)
    process.send("a line")
    process.send("")
    process.send("größer")
    assert [process.receive() for _ in range(3)] == ["enil a", "", "reßörg"]
    process.kill()


def test_a_process_says_how_it_ended() -> None:
    process = python("import sys; sys.exit('no such model')")
    assert process.receive() is None
    process.send("nobody reads this")
    assert process.wait() == End(1, "no such model")
    process.kill()
    process = python("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert process.wait() == End(-signal.SIGTERM, "")
    process.kill()


def test_cpus_are_those_of_the_affinity() -> None:
    assert LOCAL.cpus() == os.sched_getaffinity(0)


def test_a_start_of_the_machine_has_a_name(tmp_path: Path) -> None:
    assert boot_id(LocalHost(tmp_path)) is None
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("some-uuid\n")
    assert boot_id(LocalHost(tmp_path)) == "some-uuid"


def test_the_interpreter_of_this_machine_has_edgekit() -> None:
    assert LOCAL.python is not None
    process = LOCAL.start([*LOCAL.python.command, "-m", "edgekit", "--version"])
    assert (process.receive() or "").startswith("edgekit")
    assert process.wait().status == 0
    process.kill()
