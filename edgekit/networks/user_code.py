"""The user's own Python: `path/to/file.py:function`, whose file is executed and function called."""

import contextlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekit.common.files import check_file
from edgekit.errors import EdgekitError, Terminated, one_line

_SPELLING = re.compile(r"(?P<file>.+\.py)(?::(?P<function>[A-Za-z_]\w*))?", re.DOTALL)


@dataclass(frozen=True)
class Factory:
    """A function of a file of the user's, to be called without arguments."""

    file: Path
    function: str

    @classmethod
    def parse(cls, text: str) -> "Factory | None":
        """Return what `path/to/file.py:function` names; None for a text that is no such name.

        EdgekitError for a `.py` file without a function.
        """
        match = _SPELLING.fullmatch(text)
        if match is None:
            return None
        if match["function"] is None:
            raise EdgekitError(f"{text}: name a function of the file, as in {text}:make_net")
        return cls(Path(match["file"]), match["function"])

    def __str__(self) -> str:
        """Return the spelling that `parse` reads."""
        return f"{self.file}:{self.function}"

    def call(self) -> Any:  # noqa: ANN401 - whatever the user's function returns
        """Execute the file, once a process, and call the function; what it prints goes to stderr.

        EdgekitError names the line of the user's that failed.
        """
        check_file(self.file)
        with self.errors():
            function = getattr(_execute(self.file.resolve()), self.function, None)
        if not callable(function):
            if function is not None:
                raise EdgekitError(f"{self.file}: {self.function} is no function")
            raise EdgekitError(f"{self.file}: defines no function {self.function}")
        return self.guard(function)

    def guard(self, function: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Call a function that runs code of the file, as `call` does."""
        with self.errors():
            return function()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the user's code raises into one line that names its place."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (EdgekitError, Terminated, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit too, and what a user derives from it
            raise EdgekitError(f"{_place(self.file, error)}: {_said(error)}") from error


@lru_cache
def _execute(file: Path) -> ModuleType:
    """Import a file under a name of its own, its folder importable as for `python file.py`."""
    name = f"_user_code_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # of a name that ends in .py
    module = importlib.util.module_from_spec(spec)
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(file: Path, error: BaseException) -> str:
    """Return the last line of the user's file that ran, as `net.py:12: its text`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    if not frames:
        return str(file)
    return f"{file}:{frames[-1].lineno}: {(frames[-1].line or '').strip():.100}"


def _said(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    text = one_line(error, 300)
    return f"exit {text}" if isinstance(error, SystemExit) else f"{type(error).__name__}: {text}"
