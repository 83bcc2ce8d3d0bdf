"""Chat templates: jinja text that comes with a model and turns messages into a prompt.

The environment is the one transformers gives to templates (`apply_chat_template`), so that the
prompt is the same character for character. A template is code from the hub: it runs in jinja2's
immutable sandbox, within bounds of time and memory, and an error in it is a one-line error here.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgekit.common.files import decode_text, load_json_object
from edgekit.common.limits import bounded
from edgekit.errors import EdgekitError, one_line

TEMPLATE_FILE = "chat_template.jinja"
OLDER_TEMPLATE_FILE = "chat_template.json"


class ChatTemplate:
    """A compiled chat template; `place` names its file in errors."""

    def __init__(self, text: str, place: str = TEMPLATE_FILE) -> None:
        """Compile a template; refuse one with a syntax error."""
        self.text, self.place = text, place
        try:
            with bounded():  # jinja2 computes constants when it compiles
                self._template = _environment().from_string(text)
        except Exception as error:  # jinja2 passes on what Python's compiler raises, too
            raise EdgekitError(f"{place}: broken chat template: {one_line(error)}") from error

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Read a model folder's template, the one named `default` of several; None for none.

        It is chat_template.jinja, or the chat_template of tokenizer_config.json, or that of
        chat_template.json, where transformers' processors had it.
        """
        file = folder / TEMPLATE_FILE
        if file.is_file():
            try:
                text = decode_text(file.read_bytes())
            except OSError as error:
                raise EdgekitError(f"{file}: cannot be read: {one_line(error)}") from error
            except ValueError as error:
                raise EdgekitError(f"{file}: {error}") from error
            # as in transformers, lines may have any end
            return cls(text.replace("\r\n", "\n").replace("\r", "\n"), str(file))
        for name in ("tokenizer_config.json", OLDER_TEMPLATE_FILE):
            config = folder / name
            found = load_json_object(config).get("chat_template") if config.is_file() else None
            if found is not None:
                return cls(_named_default(found, config), str(config))
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Render a conversation, by default up to where the assistant's answer begins.

        `variables` are what the template sees besides, such as bos_token or tools.
        """
        try:
            with bounded():
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    **({"tools": None, "documents": None} | dict(variables or {})),
                )
        except Exception as error:  # template code can raise anything, such as a TypeError
            raise EdgekitError(f"{self.place}: chat template: {one_line(error)}") from error


def _named_default(found: object, config: Path) -> str:
    """Take the template itself, or of several named ones the one named `default`."""
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise EdgekitError(
            f"{config}: chat_template must be a text or a list with one named 'default'"
        )
    return found


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        # the sandbox would hand out the class itself, and a namespace that takes any name
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """Accept `{% generation %}`, which marks the assistant's part for training, as plain text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 types it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """jinja2's namespace without underscored names, which lead to Python's internals."""

    def __init__(self, /, *args: Mapping[str, object], **kwargs: object) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")
        super().__setitem__(name, value)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
