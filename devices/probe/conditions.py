"""The facts of a machine that change while it works; taken before and after a measurement."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.devices.probe.cpuinfo import Processor, read_processors
from edgekit.devices.probe.rootfs import (
    CPU_FOLDER,
    list_folder,
    meminfo_bytes,
    read_scaled,
    read_text,
)


@dataclass(frozen=True)
class Temperature:
    """One sensor, in degrees Celsius as the kernel gives it."""

    sensor: str
    celsius: float


@dataclass(frozen=True)
class Conditions:
    """Temperatures, current clock of each online core, load, free memory and swap in use."""

    temperatures: tuple[Temperature, ...]
    frequency_mhz: tuple[float | None, ...]
    load_average: tuple[float, float, float] | None
    ram_available_bytes: int | None
    swap_used_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON's types; an unreadable one is None."""
        return asdict(self)


def conditions(root: Path = Path("/")) -> Conditions:
    """Read the volatile facts below `root`; takes about a millisecond."""
    memory = meminfo_bytes(root)
    return Conditions(
        temperatures=read_temperatures(root),
        frequency_mhz=tuple(_frequency_mhz(root, cpu) for cpu in read_processors(root)),
        load_average=_load_average(root),
        ram_available_bytes=memory.get("MemAvailable"),
        swap_used_bytes=_difference(memory.get("SwapTotal"), memory.get("SwapFree")),
    )


def read_temperatures(root: Path) -> tuple[Temperature, ...]:
    """Return every readable sensor: thermal zones first, then hwmon's."""
    return (*_thermal_zones(root), *_hwmon_sensors(root))


def _thermal_zones(root: Path) -> list[Temperature]:
    found = []
    for zone in list_folder(root, "sys/class/thermal", "thermal_zone"):
        folder = f"sys/class/thermal/{zone}"
        celsius = read_scaled(root, f"{folder}/temp", 1000)
        if celsius is not None:
            found.append(Temperature(read_text(root, f"{folder}/type") or zone, celsius))
    return found


def _hwmon_sensors(root: Path) -> list[Temperature]:
    found = []
    for chip in list_folder(root, "sys/class/hwmon", "hwmon"):
        folder = f"sys/class/hwmon/{chip}"
        name = read_text(root, f"{folder}/name") or chip
        for channel in _hwmon_channels(root, folder):
            celsius = read_scaled(root, f"{folder}/{channel}_input", 1000)
            label = read_text(root, f"{folder}/{channel}_label") or channel
            if celsius is not None:
                found.append(Temperature(f"{name} {label}", celsius))
    return found


def _hwmon_channels(root: Path, folder: str) -> list[str]:
    try:
        names = [entry.name for entry in (root / folder).glob("temp*_input")]
    except OSError:
        return []
    return sorted((name.removesuffix("_input") for name in names), key=lambda n: (len(n), n))


def _frequency_mhz(root: Path, processor: Processor) -> float | None:
    path = f"{CPU_FOLDER}/cpu{processor.cpu}/cpufreq/scaling_cur_freq"
    scaled = read_scaled(root, path, 1000)
    return processor.mhz if scaled is None else scaled


def _load_average(root: Path) -> tuple[float, float, float] | None:
    words = (read_text(root, "proc/loadavg") or "").split()
    try:
        return float(words[0]), float(words[1]), float(words[2])
    except (IndexError, ValueError):
        return None


def _difference(total: int | None, free: int | None) -> int | None:
    return None if total is None or free is None else total - free
