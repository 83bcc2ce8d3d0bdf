"""Which package may import what: the rule that keeps quantizers, exporters and engines apart.

Read from the source, so that an import inside a function counts too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import itself, the standard library and what it lists; `edgekit` is the package's
# own version string. Everything left out is forbidden: quantize knows no file format, a runtime
# runs files that it did not make, and no library code knows the command line.
ROOMS = {
    "quantize": r"edgekit\.(errors|files|limits|tables|words)|torch|numpy|safetensors",
    "edgekit/models": (
        r"edgekit\.(errors|files|limits|progress|quantize)|torch|numpy|safetensors|tokenizers|jinja2"
        r"|huggingface_hub"
    ),
    "exporters": (
        r"edgekit|edgekit\.(artifact|crash|errors|files|genai_config|gguf_file|last_words|llama_vocabulary"
        r"|logits|models|onnx_(file|model)|progress|pte_header|quantize|quiet|tables|words)"
        r"|torch|torchao|numpy|safetensors|executorch|gguf|onnx|onnxruntime|llama_cpp"
    ),
    "devices": r"edgekit\.(errors|tables|words)|numpy",
    "runtime": (
        r"edgekit|edgekit\.(artifact|crash|devices|errors|files|genai_config|gguf_file|last_words"
        r"|llama_vocabulary|logits|models|onnx_(file|model)|progress|pte_header|quantize|tables|words)"
        r"|torch|numpy|executorch|onnxruntime|llama_cpp"
    ),
    "edgekit/commands": r"edgekit\..+|click",
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    found = {pair for pair in _imports(room) if not _allowed(room, pair[1])}
    assert found == set()


def test_imports_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for path, node in _import_nodes(room)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


@pytest.mark.parametrize(
    ("room", "module", "allowed"),
    [
        ("quantize", "torch.nn", True),
        ("quantize", "edgekit.quantize.tensor", True),
        ("quantize", "edgekit.models.config", False),
        ("quantize", "torchao", False),
        ("runtime", "edgekit.formats.artifact.write", False),
        ("devices", "edgekit.runtime.bench.record", False),
        ("exporters", "edgekit.runtime.engines.engine", False),
        ("edgekit/models", "edgekit.commands.run", False),
    ],
)
def test_the_rule_itself(room: str, module: str, allowed: bool) -> None:
    assert _allowed(room, module) is allowed


def _allowed(room: str, module: str) -> bool:
    own = "edgekit." + room.removeprefix("edgekit/")
    if module.partition(".")[0] in sys.stdlib_module_names or f"{module}.".startswith(f"{own}."):
        return True
    names = _with_parents(module) if module != "edgekit" else [module]
    return any(re.fullmatch(ROOMS[room], name) for name in names)


def _with_parents(module: str) -> Iterator[str]:
    """`a.b.c` gives a.b.c, a.b and a; `edgekit` alone stands for no more than itself."""
    parts = module.split(".")
    for end in range(len(parts), 1 if parts[0] == "edgekit" else 0, -1):
        yield ".".join(parts[:end])


def _imports(room: str) -> Iterator[tuple[str, str]]:
    """Pairs of file and imported module; `from edgekit import quantize` counts as both."""
    for path, node in _import_nodes(room):
        file = path.relative_to(ROOT).as_posix()
        if isinstance(node, ast.Import):
            yield from ((file, alias.name) for alias in node.names)
        elif node.module == "edgekit":
            yield from ((file, _member(alias.name)) for alias in node.names)
        else:
            yield file, node.module or ""


def _member(name: str) -> str:
    """Where `from edgekit import name` leads: a module, or the package's own attribute."""
    is_module = any((ROOT / "edgekit" / f"{name}{end}").exists() for end in ("", ".py"))
    return f"edgekit.{name}" if is_module else "edgekit"


def _import_nodes(room: str) -> Iterator[tuple[Path, ast.Import | ast.ImportFrom]]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, room
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield path, node
