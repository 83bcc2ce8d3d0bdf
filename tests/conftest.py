"""Fixtures that several files share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TINY_CONTEXT = 512

# Tables are one whatever the terminal, or its absence, of who runs the tests.
os.environ["COLUMNS"] = "200"

# A shell starts its background jobs with Ctrl-C ignored, and children inherit that: the tests
# that send it must not depend on how they were started.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 lfm2-tiny for ExecuTorch, exported once for all tests and all test processes.

    It is shared: a test that changes it works on a copy.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the workers' folders lie in one
    folder = shared / "lfm2-tiny-int8"
    with _one_process_at_a_time(shared / "lfm2-tiny-int8.lock"):
        if not folder.exists():
            _export(folder)
    return folder


def _export(folder: Path) -> None:
    arguments = ["export", "lfm2-tiny", "--target", "executorch", "--int8", "--json"]
    arguments += ["--context", str(TINY_CONTEXT), "-o", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["verified"]


@contextmanager
def _one_process_at_a_time(lock: Path) -> Iterator[None]:
    while True:
        try:
            lock.touch(exist_ok=False)
            break
        except FileExistsError:
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.unlink()
