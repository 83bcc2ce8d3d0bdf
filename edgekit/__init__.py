"""edgekit: quantize once, export to edge engines, prove each file, run it and measure it.

The folders `exporters`, `quantize`, `runtime` and `devices` at the top of the repository are the
packages `edgekit.exporters` and so on: setuptools maps them (pyproject.toml), and the symbolic
links in this folder show them to a bare checkout, mypy and editors.
"""

__version__ = "0.1.0"
