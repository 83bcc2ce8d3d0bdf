"""ExecuTorch packs the linears, keeps float32 caches and takes any prompt in one pass."""

from edgekit.runtime.engines.memory_model import MemoryModel

MEMORY_MODEL = MemoryModel()
