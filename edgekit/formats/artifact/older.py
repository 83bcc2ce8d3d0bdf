"""What older manifests lack: artifacts of modules did not always name what they return."""

import json
import struct
from pathlib import Path
from typing import Any

from edgekit.common.files import os_reason, refuse_irregular
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import MODULE, REFERENCE_FILE

_MAX_HEADER_BYTES = 1 << 20
_DTYPES = {"F32": "float32", "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}


def with_outputs(folder: Path, document: object) -> object:
    """Return a document with the outputs of a module, as it has been since they are named.

    They are called `output_0` and so on; number, types and shapes are those of the reference in
    the folder, none where there is none. Other documents are returned as they are.
    """
    if not isinstance(document, dict) or document.get("kind") != MODULE:
        return document
    named: dict[str, Any] = {"constant_outputs": {}} | document
    if "outputs" not in named:
        varies = document.get("max_batch") is not None
        named["outputs"] = _outputs(folder / REFERENCE_FILE, varies)
    return named


def _outputs(path: Path, batch_varies: bool) -> list[dict[str, Any]]:
    """Read the outputs of a reference, its `exact.0` and so on; EdgekitError for damage."""
    refuse_irregular(path)
    if not path.is_file():
        return []
    try:
        header = _header(path)
        found: list[dict[str, Any]] = []
        while (facts := header.get(f"exact.{len(found)}")) is not None:
            shape = [None, *facts["shape"][1:]] if batch_varies else facts["shape"]
            dtype = _DTYPES[facts["dtype"]]
            found.append({"name": f"output_{len(found)}", "dtype": dtype, "shape": shape})
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise EdgekitError(f"{path}: holds no inputs and outputs of a module") from error
    return found


def _header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        header: dict[str, Any] = json.loads(file.read(length))
    return header
