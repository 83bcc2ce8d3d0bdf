"""What is installed of ONNX Runtime."""

from edgekit.runtime.engines.library import Library

LIBRARY = Library("ONNX Runtime", "onnxruntime", (("onnxruntime", "capi/*.so*"),), "model.onnx")
