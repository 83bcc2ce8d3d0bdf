"""What is installed of PyTorch."""

from edgekit.runtime.engines.library import Library

LIBRARY = Library("PyTorch", "torch")
