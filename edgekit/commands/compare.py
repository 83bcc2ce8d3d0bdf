"""`edgekit compare`: artifacts side by side, as a table and as an HTML page."""

from pathlib import Path

import click

from edgekit.commands._completion import models
from edgekit.commands._engine_options import threads_option, tokenizer_option
from edgekit.commands._json import print_json
from edgekit.commands._progress import progress_line


@click.command("compare", short_help="Compare artifacts in size, quality, speed and weights.")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="UTF-8 file to measure quality on.",
)
@click.option(
    "--reference",
    metavar="MODEL",
    shell_complete=models,
    help="The float model that they were made of.",
)
@click.option(
    "--context", type=int, default=512, show_default=True, help="Tokens in a chunk of the text."
)
@click.option("--chunks", type=click.IntRange(min=1), help="Most chunks to score  [default: all]")
@tokenizer_option
@click.option(
    "-p",
    "--prompt",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="Tokens to prefill; 0 skips.",
)
@click.option(
    "-n",
    "--generate",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Tokens to decode; 0 skips.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(1, 1_000_000),
    default=3,
    show_default=True,
    help="Timed repetitions, after one warm-up.",
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a page with plots, such as page.html.",
)
@click.option("--force", is_flag=True, help="Overwrite the file of --output.")
def command(
    artifacts: tuple[Path, ...],
    text_file: Path | None,
    reference: str | None,
    context: int,
    chunks: int | None,
    tokenizer: Path | None,
    prompt: int,
    generate: int,
    repetitions: int,
    threads: int | None,
    as_json: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Compare ARTIFACTS: size, quality, speed, memory, and whether weights are the same.

    They are folders that `edgekit export` wrote, or files of others: a .gguf, a .pte, a folder of
    onnxruntime-genai's. What cannot be known of one is a dash. Quality needs a --text, divergence
    and the weights' noise a --reference. Speeds are those of `edgekit bench`, repetition by
    repetition in turn; -p 0 -n 0 skips them, and then no engine has to be installed, but for
    quality. Weights are read back from the files.
    """
    from edgekit.common.files import check_output_file, new_file, read_text
    from edgekit.common.interrupts import interrupts_end_the_process
    from edgekit.common.quiet import quiet_imports

    if output is not None:  # before the measuring, which may take long
        check_output_file(output, force)
    text = None if text_file is None else read_text(text_file)
    with interrupts_end_the_process(), quiet_imports():
        from edgekit.workflows.compare import compare
        from edgekit.workflows.compare_page import page
    with progress_line() as show:
        found = compare(
            artifacts,
            text,
            reference,
            context=context,
            chunks=chunks,
            prompt=prompt,
            generate=generate,
            repetitions=repetitions,
            threads=threads,
            tokenizer=tokenizer,
            progress=show,
        )
    try:
        if as_json:
            print_json(found.to_dict() | {"file": None if output is None else str(output)})
        else:
            click.echo(found.text())
    finally:  # what took long is kept in one place where the other is full or gone
        if output is not None:
            with new_file(output) as scratch:
                scratch.write_text(page(found), encoding="utf-8")
    if output is not None and not as_json:
        click.echo(f"\nwrote {output}")
