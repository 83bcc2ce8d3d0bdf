"""`edgekit eval`: perplexity of an artifact, and how far it strays from a reference."""

from pathlib import Path

import click

from edgekit.commands._completion import models
from edgekit.commands._engine_options import threads_option, tokenizer_option
from edgekit.commands._json import print_json
from edgekit.commands._progress import progress_line


@click.command("eval", short_help="Measure quality: perplexity, and divergence from a reference.")
@click.argument("artifact")
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(path_type=Path),
    help="UTF-8 file to score.",
)
@click.option(
    "--reference",
    metavar="MODEL|ARTIFACT",
    shell_complete=models,
    help="Compare with it: a model runs in torch, float.",
)
@click.option(
    "--context", type=int, default=512, show_default=True, help="Tokens in a chunk of the text."
)
@click.option("--chunks", type=click.IntRange(min=1), help="Most chunks to score  [default: all]")
@tokenizer_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def command(
    artifact: str,
    text_file: Path,
    reference: str | None,
    context: int,
    chunks: int | None,
    tokenizer: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score ARTIFACT, or a model, on a text by llama-perplexity's conventions.

    The text is cut into chunks, and of each the second half is scored. With --reference, the
    figures of `llama-perplexity --kl-divergence` follow: divergence of the next token's
    distribution, change of the right token's probability, equal most likely tokens.
    """
    from edgekit.common.files import read_text
    from edgekit.common.interrupts import interrupts_end_the_process

    text = read_text(text_file)
    with interrupts_end_the_process():
        from edgekit.runtime.evaluation.evaluate import evaluate
    with progress_line() as show:
        result = evaluate(
            artifact,
            text,
            reference,
            context=context,
            chunks=chunks,
            threads=threads,
            tokenizer=tokenizer,
            progress=show,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        from edgekit.runtime.evaluation.table import render

        click.echo(render(result))
