"""`edgekit run`: generate text from an artifact."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._engine_options import threads_option, tokenizer_option
from edgekit.commands._json import print_json_line
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.models.tokenizer import TextTokenizer
    from edgekit.runtime.engines.engine import Engine
    from edgekit.runtime.generation.chat import Chat
    from edgekit.runtime.generation.generate import Generation

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")


@click.command("run", short_help="Generate text from an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is: no chat template.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("-n", "--max-tokens", type=int, help="Most tokens to generate.")
@click.option("--temperature", "--temp", type=float, help="0 is greedy.  [else 0.3]")
@click.option("--top-k", type=int, help="0 is off.  [else 0]")
@click.option("--top-p", type=float, help="1 is off.  [else 1]")
@click.option("--min-p", type=float, help="0 is off.  [else 0.15]")
@click.option("--repeat-penalty", type=float, help="On the last 64 tokens; 1 is off.  [else 1.05]")
@click.option("--seed", type=int, help="Makes the text reproducible.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@tokenizer_option
@threads_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A line of JSON per piece of text, then one with all text and the figures.",
)
def command(artifact: Path, prompt: str | None, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Generate text from ARTIFACT, a folder that `edgekit export` wrote.

    It may also be a .gguf, .pte or .onnx file or an onnxruntime-genai folder that others made.

    PROMPT is one message to the model. It is read from standard input where that is not a
    terminal or PROMPT is `-`; in a terminal without a PROMPT a chat begins. The text ends where
    the model ends it, at --max-tokens, at a --stop or with the context; a chat then goes on
    without its oldest turns.

    Tokens are drawn as the model's makers say, in generation_config.json or in a GGUF; of one where
    they say nothing, as above (`else`), which is what Liquid AI recommends for LFM2.
    """
    with _interruptible(as_json):
        _run(artifact, prompt, as_json, options)


@contextlib.contextmanager
def _interruptible(as_json: bool) -> Iterator[None]:
    """Ctrl-C ends the line and the command, with the status a shell expects of it."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=as_json)
        sys.exit(130)


def _is_chat(prompt: str | None) -> bool:
    return prompt is None and sys.stdin is not None and sys.stdin.isatty()


def _standard_input(context: int) -> str:
    """Read standard input, less the newline with which `echo` ends its text."""
    from edgekit.common.files import decode_text
    from edgekit.runtime.generation.chat import check_length, longest_text

    # one byte too many shows that there is more, and is not waited for
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(longest_text(context) + 1)
    check_length(data, context)
    try:
        return decode_text(data).removesuffix("\n")
    except ValueError as error:
        raise EdgekitError(f"standard input {error}") from error


def _refuse_in_chat(**flags: bool) -> None:
    for name, given in flags.items():
        if given:
            raise EdgekitError(f"--{name} needs a PROMPT (or text on standard input)")


def _run(path: Path, prompt: str | None, as_json: bool, options: dict[str, Any]) -> None:
    """Check everything that costs nothing, then load the engine and generate."""
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.runtime.generation.chat import Chat
        from edgekit.runtime.generation.generate import generate
        from edgekit.runtime.model_files import find_model_file

    if _is_chat(prompt):
        _refuse_in_chat(raw=options["raw"], json=as_json)
    file = find_model_file(path)
    params = file.sampling(**{name: options[name] for name in SAMPLING})
    limits = {"max_tokens": options["max_tokens"], "stop_strings": options["stop"]}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def engine() -> "Engine":
            with interrupts_end_the_process():
                return stack.enter_context(file.load(options["threads"]))

        with interrupts_end_the_process():
            tokenizer = file.tokenizer(options["tokenizer"])
        # Of some files only the engine knows the context, which bounds the prompt.
        context = file.context or engine().context
        ids = None if _is_chat(prompt) else _prompt_ids(tokenizer, prompt, context, options)
        eos_ids = file.end_ids(engine(), tokenizer)
        if ids is None:
            _converse(Chat(engine(), tokenizer, params, eos_ids, options["system"], **limits))
            return
        answer = generate(engine(), tokenizer, ids, params, eos_ids=eos_ids, **limits)
        if as_json:
            _print_json(path, engine(), answer)
        else:
            _stream(answer)


def _prompt_ids(
    tokenizer: "TextTokenizer", prompt: str | None, context: int, options: dict[str, Any]
) -> list[int]:
    from edgekit.runtime.generation.chat import check_length, first_messages, prompt_ids

    text = _standard_input(context) if prompt in (None, "-") else prompt
    assert text is not None
    if options["raw"]:
        check_length(text, context)
        return tokenizer.encode(text)
    if not text.strip():
        raise EdgekitError("the prompt is empty")
    question = {"role": "user", "content": text}
    return prompt_ids(tokenizer, [*first_messages(options["system"]), question], context)


def _stream(answer: "Generation") -> None:
    for piece in answer:
        _write(piece)
    _write("\n")
    click.echo(answer.result().summary(), err=True)


def _print_json(path: Path, engine: "Engine", answer: "Generation") -> None:
    for piece in answer:
        print_json_line({"piece": piece})
    facts = {"artifact": str(path), "engine": engine.name, "version": engine.version}
    print_json_line(facts | answer.result().to_dict())


def _converse(chat: "Chat") -> None:
    from edgekit.runtime.generation.chat import converse

    converse(chat, _ask, _write, lambda line: click.echo(line, err=True))


def _ask() -> str:
    """Read a line; without readline Python would write the prompt where libraries write."""
    try:
        import readline  # noqa: F401  (its import gives `input` line editing)
    except ImportError:
        click.echo("> ", nl=False)
        return input()
    return input("> ")


def _write(text: str) -> None:
    """Write model text at once, as UTF-8 whatever the locale."""
    click.echo(text.encode(), nl=False)
