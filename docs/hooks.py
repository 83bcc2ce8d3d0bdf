"""What the site has beyond the pages in this folder: the reference of commands, the benchmarks."""

import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from edgekit.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
REPOSITORY_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|[\w-]+\.md)([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `commands.md`, made from click, and `benchmarks.md`, benchmarks/README.md."""
    files.append(File.generated(config, "commands.md", content=reference()))
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "benchmarks.md", content=benchmarks))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to files of the repository be what they can be on the site."""
    return REPOSITORY_LINK.sub(_on_the_site, markdown)


def _on_the_site(link: re.Match[str]) -> str:
    path, _, anchor = link[2].partition("#")
    if path == "../benchmarks/README.md":
        return f"[{link[1]}](benchmarks.md{'#' + anchor if anchor else ''})"
    return f"{link[1]} (`{path.removeprefix('../')}` in the repository)"


def reference() -> str:
    """Return the help of every command as Markdown."""
    parts = ["# Commands", "", "What `edgekit COMMAND --help` prints."]
    group = click.Context(main, info_name="edgekit")
    for name in COMMANDS:
        command = main.get_command(group, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=group, terminal_width=100)
        parts += ["", f"## edgekit {name}", "", "```text", command.get_help(context), "```"]
    return "\n".join(parts) + "\n"
