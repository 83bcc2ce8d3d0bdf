"""llama.cpp multiplies from the file's bytes, keeps float16 caches and takes prompts in parts."""

from edgekit.runtime.engines.memory_model import MemoryModel

MEMORY_MODEL = MemoryModel(packs_linears=False, cache_bytes=2, whole_prompt=False)
