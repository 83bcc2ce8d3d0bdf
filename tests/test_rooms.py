"""Which room may import what: the rules that keep quantizers, exporters and engines apart.

Read from the source, so that an import inside a function counts too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a room imports from those below it and from itself, never from its neighbours.
# Above them all are the entries (`cli`, `supervisor`, `__main__`) and the public names.
FLOORS = (
    ("errors", "version"),
    ("common", "metrics"),
    ("formats", "quantize", "devices"),
    ("models",),
    ("networks", "exporters", "runtime"),
    ("workflows",),
    ("commands",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# Folders beside each other that know nothing of one another, and the libraries that only they
# import: one is learned, written or deleted as a unit.
APART = {
    "exporters": ("executorch", "gguf", "onnx"),
    "runtime.engines": ("executorch", "gguf", "onnx", "torch"),
}
ENGINES_LIBRARIES = {
    "executorch": {"executorch", "torchao"},
    "gguf": {"gguf", "llama_cpp"},
    "onnx": {"onnx", "onnxruntime", "onnx_ir", "onnxscript"},
}

# What a room takes from outside besides the standard library.
LIBRARIES = {
    "errors": set[str](),
    "version": set[str](),
    "common": {"numpy"},
    "metrics": {"numpy"},
    "formats": {"numpy"},
    "quantize": {"torch", "numpy", "safetensors"},
    "devices": {"numpy"},
    "models": {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub"},
    "networks": {"torch", "numpy", "safetensors"},
    "exporters": {"torch", "numpy", "safetensors"},
    "runtime": {"torch", "numpy"},
    "workflows": {"torch", "numpy", "safetensors"},
    "commands": {"click"},
}


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    found = {
        (module, imported)
        for module, imported in _imports()
        if _room(module) == room and imported.startswith("edgekit") and not _below(room, imported)
    }
    assert found == set()


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_uses_only_its_libraries(room: str) -> None:
    found = {
        (module, imported)
        for module, imported in _imports()
        if _room(module) == room
        and (library := imported.partition(".")[0]) != "edgekit"
        and library not in sys.stdlib_module_names
        and library not in LIBRARIES[room] | _own_libraries(module)
    }
    assert found == set()


@pytest.mark.parametrize("parent", APART)
def test_folders_of_targets_and_engines_know_nothing_of_each_other(parent: str) -> None:
    found = {
        (module, imported)
        for module, imported in _imports()
        if (one := _folder(module, parent)) is not None
        and (other := _folder(imported, parent)) is not None
        and one != other
    }
    assert found == set()


def test_no_two_folders_import_each_other() -> None:
    """Nor in a longer circle: a folder is above or below another one."""
    above: dict[str, set[str]] = {}
    for module, imported in _imports():
        one, other = _package(module), _package(imported)
        inside = other.startswith(f"{one}.") or one.startswith(f"{other}.")
        if imported.startswith("edgekit.") and one != other and not inside:
            above.setdefault(one, set()).add(other)
    assert {name for name in above if name in _reached(name, above)} == set()


def test_imports_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, _ in _modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


# Where a family of models may be named: the last knows what llama.cpp asserts of foreign files.
FAMILY = re.compile(r"lfm2|qwen|smollm|^llama$", re.IGNORECASE)
FAMILIES_HOMES = (
    "edgekit.models.families",
    "edgekit.exporters.gguf.architectures",
    "edgekit.runtime.engines.gguf.checks",
)


def test_a_family_is_named_only_where_it_is_described() -> None:
    """In code, that is: as the name of a thing, or in a text that code compares or shows."""
    found = {
        (module, name)
        for path, module in _modules()
        if not module.startswith(FAMILIES_HOMES)
        for name in _spelled(ast.parse(path.read_text()))
        if FAMILY.search(name)
    }
    assert found == set()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("lfm2_norm = 1", True),
        ("if kind == 'llama': pass", True),
        ("from edgekit.models import qwen3", True),
        ("class Lfm2: pass", True),
        ("'Measured on LFM2-350M.'", False),
        ("llama = load_library('llama.cpp')", False),
    ],
)
def test_what_names_a_family(line: str, found: bool) -> None:
    assert any(FAMILY.search(name) for name in _spelled(ast.parse(line))) is found


# Who may name a target or an engine outside its folder, and why.
NAMES_TARGETS = {
    "edgekit.exporters.registry": "the registry of targets",
    "edgekit.runtime.engines.registry": "the registry of engines",
    "edgekit.formats.artifact.read": "whose a file is by the end of its name",
    # The target or the engine that is meant where nobody names one.
    "edgekit.workflows.fit": "the default target",
    "edgekit.workflows.api": "the default target",
    "edgekit.workflows.export_network": "the default target",
    "edgekit.runtime.open_model": "the reference is computed in torch",
    "edgekit.workflows.importance": "llama.cpp's importance matrix",
}
TARGET = re.compile(
    r"(executorch|gguf|onnx)"
    r"|edgekit\.exporters\.(executorch|gguf|onnx)\b.*"
    r"|edgekit\.runtime\.engines\.(executorch|gguf|onnx|torch)\b.*"
)


def test_no_generic_module_names_a_target() -> None:
    """A registry finds what a target or an engine can do; a name elsewhere is listed above."""
    found = {
        module
        for path, module in _modules()
        if all(_folder(module, parent) is None for parent in APART)
        for name in _spelled(ast.parse(path.read_text()))
        if TARGET.fullmatch(name)
    }
    assert found == set(NAMES_TARGETS)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("if engine == 'gguf': pass", True),
        ("TABLE = {'onnx': 1}", True),
        ("from edgekit.exporters.gguf.readback import read", True),
        ("from edgekit.runtime.engines.torch import decoder", True),
        ("from edgekit.formats.gguf.file import GgufFile", False),
        ("'A text on gguf and onnx.'", False),
        ("said = 'executorch, gguf or onnx'", False),
    ],
)
def test_what_names_a_target(line: str, found: bool) -> None:
    assert any(TARGET.fullmatch(name) for name in _spelled(ast.parse(line))) is found


# Flags of other programs, and lines of text that only look like some.
NAMES_FLAGS = {
    "edgekit.exporters.gguf.corpus": "texts to tokenize",
    "edgekit.runtime.engines.gguf.build": "pip's",
    "edgekit.runtime.engines.gguf.checks": "llama-gguf-split's",
    "edgekit.runtime.engines.library": "pip's",
    "edgekit.workflows.compare_page": "variables of CSS",
    "edgekit.errors": "asks whether there is a --json",
}
FLAG = re.compile(r"(?<![\w-])--[a-z]")
COMMAND_LINE = re.compile(r"`[^`]* [^`]*`")


def test_no_message_of_the_library_names_a_flag() -> None:
    """It names the field, in backticks; `commands/_flags.py` makes a flag of it for the shell.

    A whole command to give, in backticks too, has flags.
    """
    found = {
        module
        for path, module in _modules()
        if _room(module) in FLOOR and _room(module) != "commands"
        for text in _texts(ast.parse(path.read_text()))
        if FLAG.search(COMMAND_LINE.sub("", text))
    }
    assert found == set(NAMES_FLAGS)


def _texts(tree: ast.Module) -> Iterator[str]:
    """Yield what the code says, but no docstring, an f-string as a whole."""
    nodes = [*ast.walk(tree)]
    left_out = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
            parts = [it.value if isinstance(it, ast.Constant) else "X" for it in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and id(node) not in left_out:
            yield str(node.value)


@pytest.mark.parametrize(
    ("room", "imported", "allowed"),
    [
        ("quantize", "edgekit.quantize.tensor", True),
        ("quantize", "edgekit.models.config", False),
        ("quantize", "edgekit.formats.gguf.file", False),
        ("runtime", "edgekit.exporters.readback", False),
        ("runtime", "edgekit.devices.profile", True),
        ("devices", "edgekit.runtime.bench.record", False),
        ("models", "edgekit.commands.run", False),
        ("models", "edgekit", False),
    ],
)
def test_the_rule_itself(room: str, imported: str, allowed: bool) -> None:
    assert _below(room, imported) is allowed


def _spelled(tree: ast.Module) -> Iterator[str]:
    """Yield names and texts, but no docstring; `llama` alone may be the name of a library."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in prose:
                yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{node.name}()"
        elif isinstance(node, ast.Name | ast.Attribute):
            yield f"{node.id if isinstance(node, ast.Name) else node.attr}()"


def _below(room: str, imported: str) -> bool:
    other = _room(imported)
    return other == room or FLOOR.get(other, len(FLOORS)) < FLOOR[room]


def _room(module: str) -> str:
    """`edgekit.models.config` is in models; `edgekit` itself is the roof."""
    return f"{module}.__init__".split(".")[1]


def _folder(module: str, parent: str) -> str | None:
    """Which of the folders in `APART` a module is in, if any."""
    inside = module.removeprefix(f"edgekit.{parent}.")
    name = inside.partition(".")[0]
    return name if inside != module and name in APART[parent] else None


def _own_libraries(module: str) -> set[str]:
    folder = next((found for parent in APART if (found := _folder(module, parent))), None)
    return ENGINES_LIBRARIES.get(folder or "", set())


def _package(module: str) -> str:
    """The folder that a module lies in; the module itself on the ground floor."""
    if module.count(".") == 1:
        return module
    return module if _is_folder(module) else module.rpartition(".")[0]


def _is_folder(module: str) -> bool:
    return ROOT.joinpath(*module.split(".")).is_dir()


def _reached(start: str, above: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in above.get(waiting.pop(), set()) - found:
            found.add(name)
            waiting.append(name)
    return found


@cache
def _modules() -> tuple[tuple[Path, str], ...]:
    """Every file of the package with its module's name, through the links in `edgekit/`."""
    found = []
    for path in sorted(ROOT.glob("edgekit/**/*.py")) + [
        path for room in _linked() for path in sorted(room.rglob("*.py"))
    ]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "__pycache__" not in parts:
            found.append((path, ".".join(parts).removesuffix(".__init__")))
    assert len(found) > 200
    return tuple(dict(found).items())


def _linked() -> list[Path]:
    """Python 3.11's `**` does not follow links."""
    return [path for path in (ROOT / "edgekit").iterdir() if path.is_symlink()]


@cache
def _imports() -> tuple[tuple[str, str], ...]:
    """Pairs of module and imported module."""
    found = []
    for path, module in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            found += [(module, name) for name in _names(node)]
    return tuple(found)


def _names(node: ast.AST) -> Iterator[str]:
    """What an import brings: `from edgekit.models import config` the module `config`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parent = node.module or ""
        for alias in node.names:
            member = f"{parent}.{alias.name}"
            yield member if parent.startswith("edgekit") and _is_module(member) else parent


def _is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or place.is_dir()
