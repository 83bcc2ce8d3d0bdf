"""Every command and Python block of README and docs/ runs, and prints what the page shows.

A page is one test, in a fresh folder, its blocks in their order. What is compared is the shape:
any number stands for any other, `…` for anything, as a line of its own for any lines. Comments in
the Markdown steer a block that follows:

    <!-- not run: the reason -->
    <!-- not compared: the reason -->
    <!-- before: Python that the block needs and the page does not show -->
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "stories"
TEXTS = {"stories.txt": "valid.txt", "train.txt": "train.txt"}
TEXT_BYTES = 800_000
FAST = ("README.md", "errors.md", "devices.md", "models.md", "worker-protocol.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECONDS = 900

_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\?")
_COMMENT = re.compile(r"<!-- (not run|not compared|before):(.*?)-->", re.DOTALL)
_BLOCK = re.compile(
    r"(?P<comment><!--.*?-->)|^```(?P<kind>\w+)\n(?P<code>.*?)^```"
    r"|(?P<shell>(?:^    [^\n]*\n|^\n(?=    ))+)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A piece of a page: `shell` or a language, its text, and what a comment before it says."""

    kind: str
    text: str
    said: Mapping[str, str]


def blocks(page: str) -> Iterator[Block]:
    """Yield what a page shows as commands or code."""
    said: dict[str, str] = {}
    for found in _BLOCK.finditer(page):
        if found["comment"]:
            steering = _COMMENT.match(found["comment"])
            if steering is not None:
                said = {steering[1]: steering[2].strip("\n ")}
            continue
        if found["kind"]:
            yield Block(found["kind"], found["code"], said)
        else:
            text = "".join(line[4:] or "\n" for line in found["shell"].splitlines(keepends=True))
            yield Block("shell", text, said)
        said = {}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a transcript and the lines that follow it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        found = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", part, re.DOTALL)
        assert found is not None
        yield found[1], [line for line in found[2].splitlines() if line.strip()]


def shape(line: str) -> str:
    """Return a line with its numbers, rules and widths levelled."""
    line = _NUMBER.sub("#", line.replace(" !", ""))
    line = re.sub(r"-+:?(?= \|)", "-", line)
    return re.sub(r"[# ]*#[# ]*|\s+", lambda one: "#" if "#" in one[0] else " ", line).strip()


def matches(shown: list[str], printed: list[str]) -> bool:
    """Return whether the lines printed have the shape of those shown."""
    if not shown:
        return True
    if shown[0].strip() == "…":
        return any(matches(shown[1:], printed[at:]) for at in range(len(printed) + 1))
    if not printed:
        return False
    pattern = ".*".join(map(re.escape, shape(shown[0]).split("…")))
    return bool(re.fullmatch(pattern, shape(printed[0]))) and matches(shown[1:], printed[1:])


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "COLUMNS": "120"}
    environment.pop("EDGEKIT_TRACEBACK", None)
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def run_shell(block: Block, folder: Path) -> None:
    for command, shown in commands(block.text):
        done = run(["bash", "-c", command], folder)
        printed = [
            line
            for line in done.stdout.splitlines()
            if line.strip() and not re.match(r"\[ *[\d.]+ ?s?\]|\[\d+/\d+\]", line)  # progress
        ]
        told = any(re.match(r"edgekit: (?!warning)", line) for line in shown)
        assert bool(done.returncode) == told, f"$ {command}\n{done.stdout}"
        missing = f"$ {command}\nprinted\n{done.stdout}\nbut the page shows\n" + "\n".join(shown)
        assert "not compared" in block.said or matches(shown, printed), missing


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=() if page.name in FAST else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    needed = [name for name in TEXTS if re.search(rf"\b{re.escape(name)}", text)]
    if needed and not DATA.is_dir():
        pytest.skip(f"{page.name} needs TinyStories: examples/get_stories.py fetches them")
    for name in needed:
        (tmp_path / name).write_bytes((DATA / TEXTS[name]).read_bytes()[:TEXT_BYTES])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    code = []
    for block in blocks(text):
        if "not run" in block.said:
            continue
        if block.kind == "shell":
            run_shell(block, tmp_path)
        elif block.kind == "python":
            code += [block.said.get("before", ""), block.text]
        elif block.kind == "toml":
            (tmp_path / "mixed.toml").write_text(block.text, encoding="utf-8")
    if code:  # a page's blocks follow from each other, and from its commands
        program = tmp_path / "page.py"
        program.write_text("\n".join(code), encoding="utf-8")
        done = run([sys.executable, str(program)], tmp_path)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a 12,5 MB"], ["a   7 MB"], True),
        (["| x | ---: |"], ["| xx | ---: |"], False),
        (["a", "…", "c"], ["a", "b", "b", "c"], True),
        (["a", "…", "c"], ["a", "b"], False),
        (["a … b"], ["a and b"], True),
        (["a", "b"], ["a"], False),
    ],
)
def test_a_shape_is_told_from_another(shown: list[str], printed: list[str], same: bool) -> None:
    assert matches(shown, printed) is same


def test_what_is_not_run_or_compared_says_why() -> None:
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            assert all(len(reason) > 10 for reason in block.said.values()), page
