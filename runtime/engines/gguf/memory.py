"""llama.cpp multiplies from the file's bytes, keeps float16 caches and takes prompts in parts."""

from edgekit.runtime.engines.habits import Habits

HABITS = Habits(packs_linears=False, cache_bytes=2, whole_prompt=False)
