"""The machine a result belongs to, and whether anything else is using it."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# what the kernels of the compared engines choose by
FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve", "sve2"),
)
PACKAGES = ("edgekit", "executorch", "onnxruntime", "torch", "torchao")
QUIET_SHARE = 0.05
QUIET_SECONDS = 1.0


def facts() -> dict[str, object]:
    """Return what a reader needs to judge a speed; nothing that identifies the machine."""
    cpu = _first_cpu()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual": "hypervisor" in flags,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def busy_share(seconds: float = QUIET_SECONDS) -> float:
    """Return the share of all cores' time that others used, or the host took, just now."""
    idle, total = _cpu_times()
    time.sleep(seconds)
    later_idle, later_total = _cpu_times()
    return 1 - (later_idle - idle) / max(later_total - total, 1)


def wait_until_quiet(deadline_seconds: float) -> float:
    """Wait until the machine is idle; return its busy share, which is high if it never was."""
    deadline = time.monotonic() + deadline_seconds
    while (share := busy_share()) > QUIET_SHARE and time.monotonic() < deadline:
        pass
    return share


def _cpu_times() -> tuple[int, int]:
    # user nice system idle iowait irq softirq steal ...; guest time is already inside user
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _first_cpu() -> dict[str, str]:
    block = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
