"""What a `.pte` whose linears run in XNNPACK can hold, and in how many bytes."""

from collections.abc import Sequence

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options
from edgekit.models.architecture import Attention, GatedMlp, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.quantize.names import EMBEDDING
from edgekit.quantize.recipe import Resolved, Table

NAME = "executorch"
ENGINE = "ExecuTorch"
MODEL_FILE = "model.pte"
OPTIONS: frozenset[str] = frozenset()
BLOCK_KINDS = (Attention, ShortConv, GatedMlp)
NATIVE_SCHEMES: frozenset[str] = frozenset()
LINEAR_SCHEMES = "float, w8, w4 and w4gN"


def check_config(config: ModelConfig, options: Options) -> None:
    """Refuse nothing: each block's every form is traced, of whatever shapes."""


def check_rows(rows: Sequence[Resolved]) -> None:
    """Refuse, before any work, a scheme that XNNPACK cannot hold."""
    for row in rows:
        if not row.scheme.symmetric:
            raise EdgekitError(
                f"{row.tensor}: target executorch cannot hold {row.scheme.name}: XNNPACK takes no "
                f"zero points for weights; it holds {LINEAR_SCHEMES}, and w8gN for the embedding"
            )
        grouped_int8 = row.scheme.bits == 8 and row.scheme.granularity == "group"
        if grouped_int8 and row.tensor != EMBEDDING:
            raise EdgekitError(
                f"{row.tensor}: target executorch cannot hold {row.scheme.name}; for linear "
                f"layers XNNPACK holds {LINEAR_SCHEMES}"
            )


def stored_once(table: Table) -> list[str]:
    """Return the tensors whose bytes the file holds under another's name (`pte_sharing`).

    Codes of 4 bits are not among them: lookup and product pack them differently.
    """
    twins = table.shared
    return [row.tensor for row in table if row.tensor in twins and row.scheme.bits != 4]


def stored_bytes(row: Resolved) -> int:
    """Return the bytes of a tensor in the file: what the table counts."""
    return row.nbytes


def model_file(rows: Sequence[Resolved], options: Options) -> str:
    """Return the program's name."""
    return MODEL_FILE


def requires(options: Options) -> dict[str, str]:
    """Return nothing beyond the versions: a program runs in the ExecuTorch that wrote it."""
    return {}
