"""Device profiles: what is known of a device before a program runs on it, one TOML file each.

A profile holds published or measured facts, each with its source; nothing in it is derived from a
core's name, for vendors switch features off. The machine at hand is not a profile: it is probed
(`edgekit.devices.probe.machine`).
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from edgekit.devices.probe.cpuinfo import ISA_FEATURES
from edgekit.errors import EdgekitError

LOCAL = "local"
PROFILES_FOLDER = Path(__file__).parent / "profiles"

# What needs a source, where it is given.
FACTS = ("clusters", "isa", "peak_gb_per_s", "sustained_gb_per_s", "ram_gb", "page_size")


@dataclass(frozen=True)
class ProfileCluster:
    """`count` equal cores; `max_ghz` is their highest clock, None where no source states it."""

    core: str
    count: int
    max_ghz: float | None = None

    def __post_init__(self) -> None:
        """Refuse wrong types and values that no CPU has."""
        _require_text("core", self.core)
        _require(_is_count(self.count), "count", self.count, "an integer above 0")
        _require_positive("max_ghz", self.max_ghz)


@dataclass(frozen=True)
class DeviceProfile:
    """One device; bandwidth in GB/s (1e9 bytes), RAM in GiB as sold.

    `isa` lists the features that a program finds, in the probe's spellings; `withheld` those that
    the cores have but the device does not offer, each with the reason. `ram_gb` holds the sizes
    that are sold, smallest first; empty where they vary. `peak_gb_per_s` is the memory interface's
    arithmetic limit, `sustained_gb_per_s` a measured streaming figure; None is unknown, and where
    both are `no_bandwidth` says why. `sources` names the source of each of `FACTS` that is given.
    """

    id: str
    name: str
    clusters: tuple[ProfileCluster, ...]
    isa: tuple[str, ...]
    sources: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    withheld: Mapping[str, str] = field(default_factory=dict)
    peak_gb_per_s: float | None = None
    sustained_gb_per_s: float | None = None
    no_bandwidth: str | None = None
    ram_gb: tuple[float, ...] = ()
    page_size: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        """Refuse wrong types, unknown ISA features, contradictory bandwidths, unsourced facts."""
        for key in ("id", "name"):
            _require_text(key, getattr(self, key))
        for key in ("page_size", "note", "no_bandwidth"):
            value = getattr(self, key)
            _require(value is None or isinstance(value, str), key, value, "a text")
        _require(self.id != LOCAL, "id", self.id, "another word: it means this machine")
        _require(bool(self.clusters), "clusters", self.clusters, "at least one [[clusters]]")
        self._check_lists()
        self._check_withheld()
        self._check_bandwidth()
        self._check_sources()

    def _check_lists(self) -> None:
        for alias in self.aliases:
            _require(isinstance(alias, str) and alias != LOCAL, "aliases", alias, "texts")
        for feature in self.isa:
            _require(feature in ISA_FEATURES, "isa", feature, f"of {', '.join(ISA_FEATURES)}")
        for size in self.ram_gb:
            _require(_is_positive(size), "ram_gb", size, "numbers above 0")
        ordered = tuple(sorted(set(self.ram_gb)))
        _require(self.ram_gb == ordered, "ram_gb", list(self.ram_gb), "smallest first, each once")

    def _check_withheld(self) -> None:
        for feature, reason in self.withheld.items():
            known = feature in ISA_FEATURES and feature not in self.isa
            _require(known, "withheld", feature, "a feature that isa does not list")
            _require_text(f"withheld.{feature}", reason)

    def _check_sources(self) -> None:
        for key, source in self.sources.items():
            _require(key in FACTS and self._states(key), "sources", key, "of a fact that is given")
            _require_text(f"sources.{key}", source)
        bare = [key for key in FACTS if self._states(key) and key not in self.sources]
        if bare:
            raise EdgekitError(f"no source for {', '.join(bare)}: name it under [sources]")

    def _states(self, key: str) -> bool:
        return getattr(self, key) not in (None, ())

    def _check_bandwidth(self) -> None:
        peak, sustained = self.peak_gb_per_s, self.sustained_gb_per_s
        _require_positive("peak_gb_per_s", peak)
        _require_positive("sustained_gb_per_s", sustained)
        if peak is not None and sustained is not None:
            allowed = f"at most the peak of {peak}"
            _require(sustained <= peak, "sustained_gb_per_s", sustained, allowed)
        if (self.no_bandwidth is None) == (self.bandwidth is None):
            raise EdgekitError(
                "give peak_gb_per_s or sustained_gb_per_s, or no_bandwidth to say why there is none"
            )

    @property
    def bandwidth(self) -> tuple[float, str] | None:
        """Return the GB/s to predict with and its kind, `sustained` before `peak`."""
        if self.sustained_gb_per_s is not None:
            return self.sustained_gb_per_s, "sustained"
        return None if self.peak_gb_per_s is None else (self.peak_gb_per_s, "peak")

    @property
    def cpu(self) -> str:
        """Return the clusters in one line: `1x Cortex-X4 3.3 GHz + 5x Cortex-A720`."""
        return " + ".join(
            f"{c.count}x {c.core}" + (f" {c.max_ghz:g} GHz" if c.max_ghz else "")
            for c in self.clusters
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON's types."""
        return asdict(self)


def parse_profile(raw: Mapping[str, Any]) -> DeviceProfile:
    """Build a profile from a TOML file's tables.

    Raises `EdgekitError` naming the unknown, missing or wrong key.
    """
    _check_keys(raw, DeviceProfile, "")
    values = dict(raw)
    for key in ("sources", "withheld"):
        if key in values:
            _require(isinstance(values[key], dict), key, values[key], f"a table [{key}]")
    for key in ("isa", "aliases", "ram_gb", "clusters"):
        if key in values:
            _require(isinstance(values[key], list), key, values[key], "a list")
            values[key] = tuple(values[key])
    values["clusters"] = tuple(map(_parse_cluster, values["clusters"]))
    return DeviceProfile(**values)


def load_profile(path: Path) -> DeviceProfile:
    """Read one file, which is named after the profile's id.

    Raises `EdgekitError` that begins with the path for a file that is missing, no TOML or wrong.
    """
    try:
        profile = parse_profile(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise EdgekitError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise EdgekitError(f"{path}: not a TOML file: {error}") from error
    except EdgekitError as error:
        raise EdgekitError(f"{path}: {error}") from error
    if profile.id != path.stem:
        raise EdgekitError(f"{path}: id is {profile.id!r} but the file's name says {path.stem!r}")
    return profile


@cache
def bundled_profiles() -> tuple[DeviceProfile, ...]:
    """Return the profiles that come with edgekit, by id."""
    return tuple(load_profile(path) for path in sorted(PROFILES_FOLDER.glob("*.toml")))


def find_profile(name: str) -> DeviceProfile:
    """Return the bundled profile with this id or alias, letter case aside.

    Raises `EdgekitError` with the nearest names, or with all of them when none is near.
    """
    known = {word: p for p in bundled_profiles() for word in (p.id, *p.aliases)}
    wanted = name.lower()
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, [LOCAL, *known], n=3)
    ids = ", ".join([LOCAL, *(p.id for p in bundled_profiles())])
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {ids}"
    raise EdgekitError(f"unknown device {name!r}: {hint}", field="device")


def _parse_cluster(raw: object) -> ProfileCluster:
    if not isinstance(raw, dict):
        raise EdgekitError(f"clusters holds {raw!r}; it must hold [[clusters]] tables")
    _check_keys(raw, ProfileCluster, "clusters.")
    return ProfileCluster(**raw)


def _check_keys(raw: Mapping[str, Any], kind: type[Any], prefix: str) -> None:
    known = [each.name for each in fields(kind)]
    unknown = [f"{prefix}{key}" for key in raw if key not in known]
    if unknown:
        raise EdgekitError(f"unknown key {', '.join(unknown)}; allowed: {', '.join(known)}")
    required = [
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    ]
    missing = [f"{prefix}{key}" for key in required if key not in raw]
    if missing:
        raise EdgekitError(f"missing key {', '.join(missing)}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _require_text(key: str, value: object) -> None:
    _require(isinstance(value, str) and bool(value), key, value, "a text")


def _require_positive(key: str, value: object) -> None:
    _require(value is None or _is_positive(value), key, value, "a number above 0")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise EdgekitError(f"{key} is {value!r}; it must be {allowed}")
