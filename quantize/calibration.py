"""Calibrations: the observed range of each activation, as a JSON file that can be read and reused.

{"format_version": 1, "method": "moving-average", "samples": 512, "batches": 16,
 "ranges": {"x": {"min": -2.1, "max": 2.6}, "features.0.relu": {"min": 0.0, "max": 6.0}}}
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.common.files import new_file, os_reason, refuse_irregular
from edgekit.errors import EdgekitError
from edgekit.quantize.observers import OBSERVER_METHODS

FORMAT_VERSION = 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Calibration:
    """Minimum and maximum of each tensor by name, and what they were found with.

    `samples` counts the inputs (rows of the first axis) and `batches` the mini-batches.
    """

    ranges: Mapping[str, tuple[float, float]]
    method: str
    samples: int
    batches: int

    def covering(self, tensors: list[str]) -> tuple[float, float]:
        """Return the range that covers those of some tensors; EdgekitError names one it lacks."""
        missing = next((name for name in tensors if name not in self.ranges), None)
        if missing is not None:
            raise EdgekitError(
                f"the calibration has no range of {missing!r}: it was made for another module or "
                "recipe; calibrate again"
            )
        found = [self.ranges[name] for name in tensors]
        return min(low for low, _ in found), max(high for _, high in found)

    def save(self, path: Path) -> None:
        """Write the file, or nothing; an existing one is replaced."""
        document = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "samples": self.samples,
            "batches": self.batches,
            "ranges": {
                name: {"min": low, "max": high} for name, (low, high) in self.ranges.items()
            },
        }
        with new_file(path) as file:
            file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read a file; EdgekitError where it is no whole calibration."""
        document = _read(path)
        if document.get("format_version") != FORMAT_VERSION:
            raise EdgekitError(f"{path}: is no calibration of format {FORMAT_VERSION}")
        if document.get("method") not in OBSERVER_METHODS:
            raise EdgekitError(f"{path}: method must be one of {', '.join(OBSERVER_METHODS)}")
        for key in ("samples", "batches"):
            if type(document.get(key)) is not int or document[key] < 1:
                raise EdgekitError(f"{path}: {key} must be a positive integer")
        ranges = document.get("ranges")
        if not isinstance(ranges, dict):
            raise EdgekitError(f"{path}: ranges must be an object")
        return cls(
            {name: _range(path, name, value) for name, value in ranges.items()},
            document["method"],
            document["samples"],
            document["batches"],
        )


def _read(path: Path) -> dict[str, Any]:
    refuse_irregular(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise EdgekitError(f"{path}: is too large to be a calibration")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise EdgekitError(f"{path}: must be a JSON object")
    return document


def _range(path: Path, name: str, value: object) -> tuple[float, float]:
    if isinstance(value, dict) and set(value) == {"min", "max"}:
        low, high = value["min"], value["max"]
        if _is_number(low) and _is_number(high) and low <= high:
            return float(low), float(high)
    raise EdgekitError(
        f"{path}: ranges[{name!r:.60}] must hold min and max, finite and in order: {value!r:.60}"
    )


def _is_number(value: object) -> bool:
    # Compared, not converted: an integer of JSON may have more digits than a float holds.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
