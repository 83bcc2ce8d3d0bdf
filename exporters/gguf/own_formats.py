"""llama.cpp's own formats: scales of scales, and a type for each tensor, by its quantizer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgekit.errors import VerificationError
from edgekit.exporters.gguf.layout import stored_once
from edgekit.exporters.gguf.llama.formats import FORMATS as FORMATS_BY_NAME
from edgekit.exporters.gguf.llama.quantize import StoredTensor, planned_tensors, quantizer_version
from edgekit.exporters.gguf.names import gguf_names
from edgekit.exporters.gguf.planned import divisor_tensors, model_metadata, planned_tensor
from edgekit.formats.gguf.file import GgufFile
from edgekit.formats.gguf.writer import write_hollow_gguf
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved, Table

if TYPE_CHECKING:
    from torch import Tensor

ENGINE = "llama.cpp"
FORMATS = tuple(FORMATS_BY_NAME)
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own
LIKE_ONE = re.compile(r"(I?Q|TQ|MXFP|NVFP)\d\w*", re.IGNORECASE | re.ASCII)

_FLOAT_FILE = "float.gguf"


def planned_table(
    config: ModelConfig,
    table: Table,
    name: str,
    imatrix: Path | None,
) -> list[dict[str, Any]]:
    """Ask llama.cpp's quantizer what it would store, of a file without weights."""
    from edgekit.exporters.gguf.llama.imatrix import Imatrix

    tied = table.tied
    once = stored_once(table)
    names = gguf_names(config)
    sources = {names[row.tensor]: row for row in table if row.tensor not in once}
    kinds = {row.tensor: "BF16" if len(row.shape) == 2 else "F32" for row in table}
    floats = [planned_tensor(row, stored, kinds) for stored, row in sources.items()]
    floats += divisor_tensors(config)
    if imatrix is not None:
        shapes = {each.name: each.shape for each in floats}
        Imatrix.load(imatrix).check_model(imatrix, shapes)
    metadata = model_metadata(config, floats)
    with TemporaryDirectory() as folder:
        hollow = Path(folder) / _FLOAT_FILE
        write_hollow_gguf(hollow, metadata, floats)
        made = {each.name: each for each in planned_tensors(hollow, FORMATS_BY_NAME[name], imatrix)}
    return [_table_row(row, made[names[tied.get(row.tensor, row.tensor)]], tied) for row in table]


def check_table(path: Path, config: ModelConfig, table: Sequence[Mapping[str, Any]]) -> None:
    """VerificationError where a written file does not store what `planned_table` said."""
    names = gguf_names(config)
    stored = {name: (each.type, each.nbytes) for name, each in GgufFile.open(path).tensors.items()}
    planned = {
        names[row["tensor"]]: (row["scheme"], row["bytes"]) for row in table if "same_as" not in row
    }
    planned |= {each.name: (each.type, each.nbytes) for each in divisor_tensors(config)}
    for name in [*planned, *stored]:
        if planned.get(name) != stored.get(name):
            raise VerificationError(
                f"{name}: llama.cpp was to store it as {_said(planned.get(name))}, and the file "
                f"has {_said(stored.get(name))}"
            )


def _said(stored: tuple[str, int] | None) -> str:
    return "nothing" if stored is None else f"{stored[0]}, {stored[1]:,} bytes"


def _table_row(row: Resolved, made: StoredTensor, tied: Mapping[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = row.to_dict() | {"scheme": made.type, "bytes": made.nbytes}
    entry["range"] = None
    if made.instead_of is not None:
        entry["instead_of"] = made.instead_of
    if row.tensor in tied:
        entry["same_as"] = tied[row.tensor]
    return entry


def stored_weights(path: Path, config: ModelConfig) -> Mapping[str, "Tensor"]:
    """Return what the file holds."""
    from edgekit.exporters.gguf.readback import StoredWeights

    return StoredWeights(path, config)


def versions() -> dict[str, str]:
    """Return the version of the package that holds llama.cpp's quantizer."""
    return quantizer_version()
