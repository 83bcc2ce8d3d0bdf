"""What is installed of llama.cpp."""

from edgekit.runtime.engines.gguf.build import reinstall_command
from edgekit.runtime.engines.library import Library

LIBRARY = Library(
    "llama.cpp",
    "llama-cpp-python",
    (("llama_cpp", "lib/*.so*"),),
    "model.gguf",
    reinstall_command,
)
