"""Fields in a message of the library, by the flags that a user of the shell gives them with.

The library writes a field as Python's callers know it, in backticks: `target_size`. What is the
name of an option of any command becomes that option: --target-size.
"""

import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import click

from edgekit import commands

_FIELD = re.compile(r"`([a-z]+(?:_[a-z]+)*)`")
_OPTION = re.compile(r"(?<![\w-])(?:--[a-z][a-z-]*|-[a-z]\b)")
_COMMAND_LINE = re.compile(r"`[^`]* [^`]*`")
_OTHERS = {"measure": "--no-measure", "ram_bytes": "--ram", "output": "-o"} | {
    "prompts": "-p",
    "generates": "-n",
    "depths": "-d",
}


def with_flags(text: str) -> str:
    """Return the text with flags for fields; other words in backticks stay as they are."""
    return _FIELD.sub(lambda match: _flags().get(match[1], match[0]), text)


def field_in(text: str) -> str | None:
    """Return the field whose flag a message names first, None where it names none.

    A whole command to give, in backticks, is a remedy and says nothing of it.
    """
    named = _OPTION.search(_COMMAND_LINE.sub("", text))
    fields = {flag: field for field, flag in _flags().items()}
    return None if named is None else fields.get(named[0])


@cache
def _flags() -> dict[str, str]:
    found: dict[str, str] = {}
    for module in iter_modules(commands.__path__):
        if module.name.startswith("_"):
            continue
        command: click.Command = import_module(f"edgekit.commands.{module.name}").command
        found |= {option[2:].replace("-", "_"): option for option in _long_options(command)}
    return found | _OTHERS


def _long_options(command: click.Command) -> Iterable[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from (option for option in parameter.opts if option.startswith("--"))
