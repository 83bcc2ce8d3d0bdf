"""What is installed of ExecuTorch."""

from edgekit.runtime.engines.library import Library

LIBRARY = Library(
    "ExecuTorch",
    "executorch",
    (
        ("executorch", "extension/pybindings/*.so"),
        ("executorch", "extension/llm/custom_ops/*.so"),
        ("executorch", "kernels/quantized/*.so"),
        ("torch", "lib/libtorch_cpu.so"),
    ),
    "model.pte",
)
