"""How llama.cpp is compiled: which compilers drop a tile configuration, and what make does then."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from edgekit.devices.probe.cpuinfo import Processor
from edgekit.runtime.engines.gguf.build import (
    AVOIDING,
    cxx_compiler,
    drops_tile_stores,
    reinstall_command,
    wanted_flags,
)

ROOT = Path(__file__).parents[3]
SAPPHIRE_RAPIDS = (
    Processor(0, {"model name": "Xeon", "flags": "avx512_vnni amx_bf16 amx_tile amx_int8"}),
)
ZEN_3 = (Processor(0, {"model name": "EPYC", "flags": "avx2"}),)

# `_tile_loadconfig` as preprocessors give it out: with 8 bytes, and with all 64.
GCC_12 = r"""_tile_loadconfig (const void *__config)
{ __asm__ volatile ("ldtilecfg\t%X0" :: "m" (*((const void **)__config))); }"""
GCC_14 = "_tile_loadconfig (const void *__config)\n{ __builtin_ia32_ldtilecfg (__config); }"
CLANG = "_tile_loadconfig(const void *__config) { __builtin_ia32_tile_loadconfig(__config); }"


@pytest.mark.parametrize(("header", "drops"), [(GCC_12, True), (GCC_14, False), (CLANG, False)])
def test_a_compilers_header_says_whether_it_drops_stores(
    tmp_path: Path, header: str, drops: bool
) -> None:
    compiler = _script(tmp_path / "c++", f"cat <<'END'\n{header}\nEND")
    assert drops_tile_stores([str(compiler)]) is drops


def test_a_compiler_that_knows_no_amx_needs_no_flags(tmp_path: Path) -> None:
    old = _script(tmp_path / "c++", "echo 'unrecognized option -mamx-tile' >&2; exit 1")
    assert not drops_tile_stores([str(old)])
    assert not drops_tile_stores([str(tmp_path / "none")])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AMX is x86's")
def test_what_the_header_says_is_what_this_machines_compiler_does(tmp_path: Path) -> None:
    """A value that is stored into byte 48 either is in the assembly, or has been dropped."""
    compiler = cxx_compiler(os.environ) or ["c++"]
    knows = [*compiler, "-mamx-tile", "-fsyntax-only", "-x", "c++", "/dev/null"]
    if shutil.which(compiler[0]) is None or subprocess.run(knows, check=False).returncode:
        pytest.skip("no C++ compiler that knows AMX")
    source = tmp_path / "tile.cpp"
    source.write_text(
        "#include <immintrin.h>\n"
        "void load(unsigned char rows) {\n"
        "    alignas(64) unsigned char config[64] = {1};\n"
        "    config[48] = rows;\n"
        "    _tile_loadconfig(config);\n"
        "}\n"
    )
    command = [*compiler, "-O3", "-mamx-tile", "-S", "-o", "-", str(source)]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ldtilecfg" in assembly
    assert drops_tile_stores(compiler) is ("%dil" not in assembly and "%edi" not in assembly)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC")
@pytest.mark.parametrize("order", ["{0} {1}", "{1} {0}"])
def test_what_is_left_out_stays_out_beside_march_native(order: str) -> None:
    """GCC writes a native -march out as flags, which must not come after ours."""
    flags = order.format("-mno-sse4.2", "-march=native").split()
    done = subprocess.run(
        ["g++", *flags, "-x", "c++", "-dM", "-E", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "__SSE4_2__" not in done.stdout


def test_the_compiler_is_the_one_that_cmake_takes(tmp_path: Path) -> None:
    path = str(tmp_path)
    assert cxx_compiler({"PATH": path}) is None
    clang = _script(tmp_path / "clang++", "")
    assert cxx_compiler({"PATH": path}) == [str(clang)]
    gnu = _script(tmp_path / "c++", "")
    assert cxx_compiler({"PATH": path}) == [str(gnu)]
    assert cxx_compiler({"PATH": path, "CXX": "ccache g++-14"}) == ["ccache", "g++-14"]
    arguments = "-DLLAVA_BUILD=OFF -DCMAKE_CXX_COMPILER:FILEPATH=/opt/clang++"
    assert cxx_compiler({"PATH": path, "CXX": "g++", "CMAKE_ARGS": arguments}) == ["/opt/clang++"]
    twice = "-DCMAKE_CXX_COMPILER=/opt/g++ -D CMAKE_CXX_COMPILER=/opt/clang++"
    assert cxx_compiler({"PATH": path, "CMAKE_ARGS": twice}) == ["/opt/clang++"]
    assert cxx_compiler({"PATH": path, "CXX": "ccache g++", "CMAKE_ARGS": "'"}) == ["ccache", "g++"]


def test_flags_are_for_a_cpu_with_amx_and_a_compiler_that_needs_them(tmp_path: Path) -> None:
    gcc = {"CXX": str(_script(tmp_path / "g++", f"cat <<'END'\n{GCC_12}\nEND"))}
    clang = {"CXX": str(_script(tmp_path / "clang++", f"cat <<'END'\n{CLANG}\nEND"))}
    assert wanted_flags(SAPPHIRE_RAPIDS, gcc) == AVOIDING
    assert wanted_flags(SAPPHIRE_RAPIDS, clang) == ()
    assert wanted_flags(ZEN_3, gcc) == ()


def test_the_command_to_reinstall_is_one_that_a_shell_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgekit.runtime.engines.gguf.build.read_processors", lambda root: SAPPHIRE_RAPIDS
    )
    monkeypatch.setenv("CXX", str(_script(tmp_path / "g++", f"cat <<'END'\n{GCC_12}\nEND")))
    *settings, pip, install, force, no_deps, no_cache, package = shlex.split(reinstall_command())
    flags = " ".join(AVOIDING)
    assert settings == [f"CFLAGS={flags}", f"CXXFLAGS={flags}"]
    assert (pip, install, force) == ("pip", "install", "--force-reinstall")
    assert (no_deps, no_cache) == ("--no-deps", "--no-cache-dir")
    assert package.startswith("llama-cpp-python")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_compiles_llama_cpp_by_the_flags_and_anew_where_they_change(tmp_path: Path) -> None:
    make = _Make(tmp_path)
    make.answer("cpu=EPYC\namx=no\nflags=\n")
    assert make.run() == ["install| | |-DLLAVA_BUILD=OFF -DMINE=1"]
    assert make.run() == []
    flags = " ".join(AVOIDING)
    make.answer(f"cpu=Xeon\namx=yes\nflags={flags}\n")
    anew = ["uninstall", "cache remove", f"install|{flags} |{flags} |-DLLAVA_BUILD=OFF -DMINE=1"]
    assert make.run() == anew
    assert make.run() == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_of_before_is_compiled_anew_on_a_cpu_with_amx(tmp_path: Path) -> None:
    make = _Make(tmp_path)
    (tmp_path / ".venv/.installed-dev").touch()
    make.answer(f"cpu=Xeon\namx=yes\nflags={' '.join(AVOIDING)}\n")
    assert [line.partition("|")[0] for line in make.run()] == [
        "uninstall",
        "cache remove",
        "install",
    ]


class _Make:
    """The Makefile over an environment whose Python writes down what pip is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / ".venv/bin").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy2(ROOT / name, folder)
        _script(
            folder / ".venv/bin/python",
            'case "$*" in\n'
            "*engines.gguf.build*) cat answer ;;\n"
            '*" uninstall "*) echo uninstall >>log ;;\n'
            '*" cache remove "*) echo cache remove >>log ;;\n'
            '*" install "*) echo "install|$CFLAGS|$CXXFLAGS|$CMAKE_ARGS" >>log ;;\n'
            "esac",
        )

    def answer(self, text: str) -> None:
        """What `edgekit.runtime.engines.gguf.build` prints from now on."""
        (self._folder / "answer").write_text(text)

    def run(self) -> list[str]:
        """Make the environment; what pip was asked for."""
        log = self._folder / "log"
        log.write_text("")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "C", "MFLAGS"))}
        subprocess.run(
            ["make", "-s", ".venv/.installed-dev"],
            cwd=self._folder,
            env={**environ, "CMAKE_ARGS": "-DMINE=1"},
            capture_output=True,
            check=True,
        )
        _later_than(self._folder / ".venv/.installed-dev")
        return log.read_text().splitlines()


def _later_than(path: Path) -> None:
    """Wait until files that are written get a later time: make compares them."""
    before, scratch = path.stat().st_mtime_ns, path.with_name("clock")
    while True:
        scratch.touch()
        if scratch.stat().st_mtime_ns > before:
            return
        time.sleep(0.001)


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
