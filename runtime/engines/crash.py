"""What is said where a native library ends its process: who, on which file, and what to do."""

import signal
from importlib import metadata

from edgekit.common.last_words import NO_ENGINE, Words
from edgekit.common.process_end import how_it_ended, last_line, quoted
from edgekit.errors import line_for_user

# What users call an engine, and what they install of it.
_LIBRARIES = {
    "executorch": ("ExecuTorch", "executorch"),
    "gguf": ("llama.cpp", "llama-cpp-python"),
    "onnx": ("ONNX Runtime", "onnxruntime"),
    "torch": ("PyTorch", "torch"),
}


_OUT_OF_MEMORY = (
    "the system does this when memory runs out: take a smaller model or context, or end other work"
)


def crash_line(number: int, words: Words, written: str) -> str:
    """Return the line for a command that died of a signal; `written` is what it wrote to stderr."""
    said, end = words.said or last_line(written), how_it_ended(-number)
    if words.active == NO_ENGINE:
        again = "EDGEKIT_TRACEBACK=1 shows where"
        advice = _OUT_OF_MEMORY if number == signal.SIGKILL else again
        return line_for_user(f"the command was ended by {end}{quoted(said)}; {advice}")
    engine, path = words.engines[words.active]
    return line_for_user(
        f"{path}: {library(engine)} was ended by {end}{quoted(said)}; "
        f"{advice_after(number, engine)}"
    )


def library(engine: str) -> str:
    """Return the name and version of an engine's library, `llama.cpp (llama-cpp-python 1)`."""
    title, package = _LIBRARIES[engine]
    version = _version(package)
    if title.lower() == package:
        return f"{title} {version}"
    return f"{title} ({package} {version})"


def advice_after(number: int, engine: str) -> str:
    """Return what to do where an engine ran, was at work on a file, and died of a signal."""
    if number == signal.SIGKILL:
        return _OUT_OF_MEMORY
    if number == signal.SIGILL:
        return f"it was made for another CPU: {reinstall_command(engine)}"
    return (
        f"the file is damaged or the library broken: {reinstall_command(engine)}; "
        "EDGEKIT_TRACEBACK=1 shows where"
    )


def reinstall_command(engine: str) -> str:
    """Return the shell command that installs an engine's library anew, fit for this machine."""
    if engine == "gguf":
        from edgekit.runtime.engines.gguf.build import reinstall_command as compile_anew

        return compile_anew()
    package = _LIBRARIES[engine][1]
    return f"pip install --force-reinstall --no-deps {package}=={_version(package)}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of an unknown version"
