"""What a saved calibration holds: the range of each tensor, and the codes that follow from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.common.tables import markdown_table
from edgekit.exporters.inspect.tables import joined
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import activation_parameters


@dataclass(frozen=True)
class Report:
    """What `edgekit inspect` shows of a calibration."""

    path: Path
    calibration: Calibration

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        found = self.calibration
        return {
            "path": str(self.path),
            "method": found.method,
            "samples": found.samples,
            "batches": found.batches,
            "tensors": [
                {"tensor": name, "min": low, "max": high, **_codes(low, high)}
                for name, (low, high) in found.ranges.items()
            ],
        }

    def text(self) -> str:
        """Return the report as a Markdown table."""
        facts = self.to_dict()
        rows = [
            [row["tensor"], f"{row['min']:.6g}", f"{row['max']:.6g}", *_cells(row)]
            for row in facts["tensors"]
        ]
        title = (
            f"{self.path}: calibration by {facts['method']} over {facts['samples']:,} inputs in "
            f"{facts['batches']:,} mini-batches"
        )
        columns = ["tensor", "min", "max", "scale", "zero point"]
        return joined([title, markdown_table(columns, rows, "lrrrr")])


def report(path: Path) -> Report:
    """Read a calibration; EdgekitError where it is none."""
    return Report(path, Calibration.load(path))


def _codes(low: float, high: float) -> dict[str, Any]:
    """Return the parameters of a tensor on its own: joined ones share a wider range."""
    try:
        found = activation_parameters(low, high)
    except ValueError:
        return {"scale": None, "zero_point": None}
    return {"scale": found.scale, "zero_point": found.zero_point}


def _cells(row: dict[str, Any]) -> list[str]:
    if row["scale"] is None:
        return ["-", "-"]
    return [f"{row['scale']:.6g}", str(row["zero_point"])]
