"""The ways an edgekit command can fail; all reach the user as one line on stderr.

With `--json` a line of JSON on stdout says the same to the program that asked for it.
"""

import json
from collections.abc import Sequence

_LONGEST_LINE = 1000


class EdgekitError(Exception):
    """A user's mistake: the message names the thing, what was given and what to do (exit 2).

    `field` is the argument that is wrong, where the message does not begin with it in backticks.
    """

    exit_status = 2

    def __init__(self, *arguments: object, field: str | None = None) -> None:
        super().__init__(*arguments)
        self.field = field


class VerificationError(EdgekitError):
    """An exported file does not compute what the model computes (exit 1, no artifact left)."""

    exit_status = 1


class EngineCrash(EdgekitError):
    """A native library ended its process; the message says which and what to do (exit 1)."""

    exit_status = 1


class Interrupted(EdgekitError):
    """Ctrl-C ended work of which something is kept, which the message says (exit 130)."""

    exit_status = 130


class Terminated(SystemExit):
    """SIGTERM came; what is half-written is removed on the way out (exit 143).

    No `Exception`, as KeyboardInterrupt is none: nothing may go on after it.
    """

    exit_status = 143  # 128 + SIGTERM, what a shell reports


class QuantizationWarning(UserWarning):
    """A file is what the quantized module computes, but that is far from the float module."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return what a library says, without its line breaks and stack frames; never empty."""
    text = " ".join(text_of(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text
    kept = text[: limit + 1].rpartition(" ")[0]
    return f"{kept if 2 * len(kept) > limit else text[:limit]} ..."  # a long word is cut


def text_of(error: BaseException) -> str:
    """Return what an exception says; nothing where its own `__str__` fails, as a user's may."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  (whatever a user's code does)
        return ""


def line_for_user(message: str) -> str:
    """Return the one line that a command ends with, printable whatever stands in the message."""
    if len(message) > _LONGEST_LINE:  # a name of a hundred thousand letters hides what is wrong
        message = f"{message[: _LONGEST_LINE // 2]} ... {message[-_LONGEST_LINE // 2 :]}"
    return f"edgekit: {''.join(map(_printable, message))}"


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON; behind `--` there are no options."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return "--json" in arguments[:end]


def json_for_program(message: str, status: int, field: str | None = None) -> str:
    """Return the last line of stdout of a command that was to print JSON and fails.

    `field` is the argument that the message is about, left out where that is not known.
    """
    about = {} if field is None else {"field": field}
    return json.dumps({"error": {"message": message, **about, "status": status}})


def _printable(char: str) -> str:
    """Escape what would break the line or steer the terminal."""
    return char if char.isprintable() else char.encode("unicode_escape").decode()
