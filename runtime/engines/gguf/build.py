"""How llama.cpp is to be compiled here, so that its AMX kernels do not end the process.

In the headers of GCC before 14 (11.5, 12.4 and 13.3 apart) `_tile_loadconfig` says that it reads 8
of the 64 bytes of a tile configuration (GCC PR target/114098). So the optimizer drops the stores
into the others, and llama.cpp, compiled for a CPU with AMX, ends in SIGSEGV at `ldtilecfg`, in its
first product. `AVOIDING` leaves those kernels out, wherever `-march=native` stands beside it;
clang and newer GCCs keep them.

    python -m edgekit.runtime.engines.gguf.build

prints what the Makefile compiles by, and keeps to see when that changes.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata

from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.cpuinfo import Processor, read_processors

AVOIDING = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
_PACKAGE = "llama-cpp-python"
_COMPILERS = ("c++", "g++", "clang++")  # the order in which CMake looks for them
_EIGHT_BYTES = re.compile(r"ldtilecfg[^;]*\(\s*const\s+void\s*\*\s*\*\s*\)")


def main() -> None:
    """Print the CPU and the flags that it and the compiler ask for, a line each."""
    processors = read_processors(LOCAL)
    flags = wanted_flags(processors, os.environ)
    print(f"cpu={processors[0].core if processors else None}")
    print(f"amx={'yes' if _has_amx(processors) else 'no'}")
    print(f"flags={' '.join(flags)}")


def reinstall_command() -> str:
    """Return the shell command that compiles llama.cpp anew, as this machine needs it."""
    flags = " ".join(wanted_flags(read_processors(LOCAL), os.environ))
    setting = f"CFLAGS='{flags}' CXXFLAGS='{flags}' " if flags else ""
    return f"{setting}pip install --force-reinstall --no-deps --no-cache-dir {_PACKAGE}{_pin()}"


def wanted_flags(processors: tuple[Processor, ...], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the flags for C and C++ that this CPU needs of the compiler that CMake will take."""
    if not _has_amx(processors):
        return ()
    compiler = cxx_compiler(environ)
    return AVOIDING if compiler and drops_tile_stores(compiler) else ()


def cxx_compiler(environ: Mapping[str, str]) -> list[str] | None:
    """Return the C++ compiler that CMake takes: by CMAKE_ARGS, by CXX, or the first on PATH."""
    arguments = "\n".join(_words(environ.get("CMAKE_ARGS", ""))).replace("-D\n", "-D")
    given = (
        re.fullmatch(r"-DCMAKE_CXX_COMPILER(?::\w+)?=(.+)", each) for each in arguments.split("\n")
    )
    if named := [match[1] for match in given if match]:
        return named[-1:]  # the last counts
    if words := _words(environ.get("CXX", "")):
        return words
    found = (shutil.which(name, path=environ.get("PATH")) for name in _COMPILERS)
    return next(([path] for path in found if path), None)


def _words(text: str) -> list[str]:
    """Take a shell's words apart; none of a text with a quote that does not end."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def drops_tile_stores(compiler: list[str]) -> bool:
    """Whether the compiler's own header says that a tile configuration has 8 bytes.

    False for a compiler that knows no AMX, or that is not there.
    """
    try:
        done = subprocess.run(
            [*compiler, "-mamx-tile", "-x", "c++", "-E", "-"],
            input="#include <immintrin.h>\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and _EIGHT_BYTES.search(done.stdout) is not None


def _has_amx(processors: tuple[Processor, ...]) -> bool:
    return any("amx_tile" in processor.flags for processor in processors)


def _pin() -> str:
    try:
        return f"=={metadata.version(_PACKAGE)}"
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
