"""Devices and predictions as text for a terminal."""

import json
from collections.abc import Mapping, Sequence

from edgekit.common.tables import fitting_table, plain_table
from edgekit.devices.probe.machine import Cache, Cluster, Machine, probe
from edgekit.devices.profile import LOCAL, DeviceProfile, bundled_profiles, find_profile

GIB = 2**30
UNKNOWN = "unknown"
_FACTS = {
    "clusters": "CPU",
    "isa": "ISA features",
    "peak_gb_per_s": "peak bandwidth",
    "sustained_gb_per_s": "sustained bandwidth",
    "ram_gb": "RAM",
    "page_size": "page size",
}


def describe_devices(name: str | None = None, as_json: bool = False) -> str:
    """Return what `edgekit devices` prints: all devices, or the one called `name`.

    Raises `EdgekitError` for an unknown name.
    """
    if name is None:
        profiles, machine = bundled_profiles(), probe()
        listed = {LOCAL: machine.to_dict(), "profiles": [p.to_dict() for p in profiles]}
        return _json(listed) if as_json else devices_table(profiles, machine)
    if name.lower() == LOCAL:
        machine = probe()
        return _json(machine.to_dict()) if as_json else machine_text(machine)
    profile = find_profile(name)
    return _json(profile.to_dict()) if as_json else profile_text(profile)


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, allow_nan=False)


def devices_table(profiles: Sequence[DeviceProfile], machine: Machine) -> str:
    """List this machine and every profile, one row each."""
    header = ["device", "name", "GB/s", "RAM GB", "CPU"]
    local = [
        LOCAL,
        machine.device or "this machine",
        "measured by fit",
        UNKNOWN if machine.ram_bytes is None else f"{machine.ram_bytes / GIB:.1f}",
        machine.cpu or UNKNOWN,
    ]
    return fitting_table(header, [local, *map(_profile_row, profiles)], "lllll")


def profile_text(profile: DeviceProfile) -> str:
    """Describe one profile."""
    return _facts(
        {
            "device": profile.id,
            "name": profile.name,
            "aliases": ", ".join(profile.aliases) or None,
            "CPU": profile.cpu,
            "ISA features": _words(profile.isa),
            "peak bandwidth": _unit(profile.peak_gb_per_s, "GB/s"),
            "sustained bandwidth": _unit(profile.sustained_gb_per_s, "GB/s"),
            "RAM": _ram_options(profile) + (" GB" if profile.ram_gb else ""),
            "page size": profile.page_size,
        }
        | ({"no bandwidth": profile.no_bandwidth} if profile.no_bandwidth else {})
        | {f"no {feature}": reason for feature, reason in profile.withheld.items()}
        | ({"note": profile.note} if profile.note else {})
        | {f"source of {_FACTS[key]}": source for key, source in profile.sources.items()}
    )


def machine_text(machine: Machine) -> str:
    """Describe the probed machine."""
    now = machine.conditions
    load = now.load_average
    sensors = [f"{reading.sensor} {reading.celsius:.1f} C" for reading in now.temperatures]
    clocks = sorted({round(mhz) for mhz in now.frequency_mhz if mhz is not None})
    return _facts(
        {
            "device": LOCAL,
            "name": machine.device,
            "CPU": machine.cpu,
            "vendor": machine.vendor,
            "architecture": machine.architecture,
            "ISA features": _words(machine.isa),
            "cores": _cores(machine),
            "clusters": ", ".join(map(_cluster, machine.clusters)) or None,
            "clock now": f"{clocks[0]}-{clocks[-1]} MHz" if clocks else None,
            "caches": ", ".join(map(_cache, machine.caches)) or None,
            "RAM": _of(now.ram_available_bytes, machine.ram_bytes, "available"),
            "swap": _of(now.swap_used_bytes, machine.swap_bytes, "used"),
            "page size": machine.page_bytes and f"{machine.page_bytes // 1024} KiB",
            "temperatures": ", ".join(sensors) or None,
            "load average": load and " ".join(f"{value:.2f}" for value in load),
            "system": machine.os,
            "kernel": machine.kernel,
            "Python": machine.python,
        }
    )


def _profile_row(profile: DeviceProfile) -> list[str]:
    bandwidth = profile.bandwidth
    speed = UNKNOWN if bandwidth is None else f"{bandwidth[0]:g} {bandwidth[1]}"
    ram = profile.ram_gb
    sizes = "-".join(f"{size:g}" for size in dict.fromkeys((ram[0], ram[-1]))) if ram else "varies"
    return [profile.id, profile.name, speed, sizes, profile.cpu]


def _ram_options(profile: DeviceProfile) -> str:
    return ", ".join(f"{size:g}" for size in profile.ram_gb) or "varies"


def _facts(facts: Mapping[str, str | int | None]) -> str:
    return plain_table([[key, str(value or UNKNOWN)] for key, value in facts.items()], "ll")


def _words(words: Sequence[str] | None) -> str:
    return UNKNOWN if words is None else " ".join(words) or "none known"


def _unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:g} {unit}"


def _of(part: int | None, whole: int | None, what: str) -> str | None:
    if whole is None:
        return None
    seen = UNKNOWN if part is None else f"{part / GIB:.1f}"
    return f"{whole / GIB:.1f} GiB, {seen} {what}"


def _cores(machine: Machine) -> str | None:
    if machine.logical_cores is None:
        return None
    cores = f"{machine.physical_cores or UNKNOWN} physical, {machine.logical_cores} logical"
    quota = machine.cpu_quota
    return cores if quota is None else f"{cores}; a quota grants the time of {quota:.4g}"


def _cluster(cluster: Cluster) -> str:
    span = f"{_mhz(cluster.min_mhz)}-{_mhz(cluster.max_mhz)} MHz"
    governor = f"governor {cluster.governor or UNKNOWN}"
    return f"{len(cluster.cpus)}x {cluster.core or UNKNOWN} ({span}, {governor})"


def _mhz(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _cache(cache: Cache) -> str:
    letter = {"data": "d", "instruction": "i"}.get(cache.kind, "")
    return f"L{cache.level}{letter} {cache.instances} x {cache.bytes // 1024} KiB"
