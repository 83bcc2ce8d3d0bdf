"""ONNX Runtime is taken to pack the linears; it keeps float32 caches and takes prompts in parts."""

from edgekit.runtime.engines.memory_model import MemoryModel

MEMORY_MODEL = MemoryModel(whole_prompt=False)
