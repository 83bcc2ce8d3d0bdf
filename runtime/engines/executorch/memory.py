"""ExecuTorch packs the linears, keeps float32 caches and takes any prompt in one pass."""

from edgekit.runtime.engines.habits import Habits

HABITS = Habits()
