"""ONNX Runtime is taken to pack the linears; it keeps float32 caches and takes prompts in parts."""

from edgekit.runtime.engines.habits import Habits

HABITS = Habits(whole_prompt=False)
