"""The facts of a machine that change while it works; taken before and after a measurement."""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from edgekit.devices.hosts.host import Host
from edgekit.devices.hosts.local import LOCAL
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


def conditions(host: Host = LOCAL) -> Conditions:
    """Read the volatile facts; takes about a millisecond."""
    memory = meminfo_bytes(host)
    return Conditions(
        temperatures=read_temperatures(host),
        frequency_mhz=tuple(_frequency_mhz(host, cpu) for cpu in read_processors(host)),
        load_average=_load_average(host),
        ram_available_bytes=memory.get("MemAvailable"),
        swap_used_bytes=_difference(memory.get("SwapTotal"), memory.get("SwapFree")),
    )


def read_temperatures(host: Host) -> tuple[Temperature, ...]:
    """Return every readable sensor: thermal zones first, then hwmon's."""
    return (*_thermal_zones(host), *_hwmon_sensors(host))


def _thermal_zones(host: Host) -> list[Temperature]:
    found = []
    for zone in list_folder(host, "/sys/class/thermal", "thermal_zone"):
        folder = f"/sys/class/thermal/{zone}"
        celsius = read_scaled(host, f"{folder}/temp", 1000)
        if celsius is not None:
            found.append(Temperature(read_text(host, f"{folder}/type") or zone, celsius))
    return found


def _hwmon_sensors(host: Host) -> list[Temperature]:
    found = []
    for chip in list_folder(host, "/sys/class/hwmon", "hwmon"):
        folder = f"/sys/class/hwmon/{chip}"
        name = read_text(host, f"{folder}/name") or chip
        for channel in _hwmon_channels(host, folder):
            celsius = read_scaled(host, f"{folder}/{channel}_input", 1000)
            label = read_text(host, f"{folder}/{channel}_label") or channel
            if celsius is not None:
                found.append(Temperature(f"{name} {label}", celsius))
    return found


def _hwmon_channels(host: Host, folder: str) -> list[str]:
    names = [name for name in host.entries(folder) if fnmatchcase(name, "temp*_input")]
    return sorted((name.removesuffix("_input") for name in names), key=lambda n: (len(n), n))


def _frequency_mhz(host: Host, processor: Processor) -> float | None:
    path = f"{CPU_FOLDER}/cpu{processor.cpu}/cpufreq/scaling_cur_freq"
    scaled = read_scaled(host, path, 1000)
    return processor.mhz if scaled is None else scaled


def _load_average(host: Host) -> tuple[float, float, float] | None:
    words = (read_text(host, "/proc/loadavg") or "").split()
    try:
        return float(words[0]), float(words[1]), float(words[2])
    except (IndexError, ValueError):
        return None


def _difference(total: int | None, free: int | None) -> int | None:
    return None if total is None or free is None else total - free
