"""What is said of an engine's library, whether or not it can be loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Library:
    """An engine's library.

    `title` is what users call it, `distribution` what they install; `code` says where its machine
    code lies, as packages with patterns below them, and `trial` is the file of `trial_models/` that
    a first load is tried on, both empty where it needs no trial. `compile_anew` returns the shell
    command that installs it where a plain one may not do.
    """

    title: str
    distribution: str
    code: tuple[tuple[str, str], ...] = ()
    trial: str = ""
    compile_anew: Callable[[], str] | None = None

    @property
    def version(self) -> str:
        """The version that is installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "of an unknown version"

    @property
    def name(self) -> str:
        """Name and version, `llama.cpp (llama-cpp-python 1)`."""
        if self.title.lower() == self.distribution:
            return f"{self.title} {self.version}"
        return f"{self.title} ({self.distribution} {self.version})"

    def reinstall_command(self) -> str:
        """Return the shell command that installs it anew, fit for this machine."""
        if self.compile_anew is not None:
            return self.compile_anew()
        package = f"{self.distribution}=={self.version}"
        return f"pip install --force-reinstall --no-deps {package}"
