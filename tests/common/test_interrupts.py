"""Ctrl-C before a command has begun its work: no library can swallow it."""

import signal
import subprocess
import sys

import pytest

from edgekit.cli import COMMANDS

# The first import of what does the work gets the signal and swallows the exception, as numpy's
# and torch's imports do here and there.
_SWALLOWING = """
import os, signal, sys, time
from importlib.abc import MetaPathFinder

class Swallow(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith(("edgekit.formats.artifact.read", "edgekit.export", "edgekit.model",
                            "edgekit.devices", "edgekit.runtime", "edgekit.quantize")):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, Swallow())
from edgekit.__main__ import main
main()
"""

_ARGUMENTS = {
    "export": ("lfm2-tiny", "--target", "executorch", "--dry-run"),
    "verify": ("artifact",),
    "run": ("artifact", "hello"),
    "bench": ("artifact",),
    "eval": ("artifact", "--text", __file__),
    "compare": ("artifact",),
    "inspect": ("artifact",),
    "quantize": ("lfm2-tiny", "--dry-run"),
    "imatrix": ("lfm2-tiny", "--text", __file__),
    "fit": ("lfm2-tiny", "--device", "pixel-9"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_during_the_imports_ends_a_command(name: str) -> None:
    done = _python(_SWALLOWING, name, *_ARGUMENTS.get(name, ()))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_sigterm_ends_work_in_order_and_imports_at_once() -> None:
    script = (
        "import os, signal, sys\n"
        "from edgekit.common.interrupts import *\n"
        "clean_up_on_sigterm()\n"
        "if sys.argv[1] == 'imports':\n"
        "    with interrupts_end_the_process():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "with interrupts_end_the_process():\n"
        "    pass\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "finally:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('cleaned')\n"
    )
    in_order = _python(script, "work")
    assert (in_order.returncode, in_order.stdout, in_order.stderr) == (143, "cleaned\n", "")
    at_once = _python(script, "imports")
    assert (at_once.returncode, at_once.stdout, at_once.stderr) == (-signal.SIGTERM, "", "")


def test_the_usual_handler_is_there_again_afterwards() -> None:
    script = (
        "import os, signal\n"
        "from edgekit.common.interrupts import interrupts_end_the_process\n"
        "with interrupts_end_the_process(), interrupts_end_the_process():\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with interrupts_end_the_process():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "print('ignored, as the caller wished')\n"
    )
    assert _python(script).stdout == "ignored, as the caller wished\n"


def _python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
